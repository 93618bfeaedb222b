"""Metrics of what models draw: `images` and `text`."""
