"""Public functions: one file per family, each with its road, op registration and backward."""
