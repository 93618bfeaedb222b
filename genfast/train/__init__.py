"""Data, the training loop, checkpoints and pictures behind `genfast train` and `generate`."""
