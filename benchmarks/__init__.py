"""Benchmarks, one file per family; `genfast bench` runs them."""
