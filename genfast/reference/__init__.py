"""Plain PyTorch (and numpy) truth of every family; also what `backend="reference"` runs."""
