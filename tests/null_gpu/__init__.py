"""A null GPU: torch's CUDA build and the libraries above it, on a machine without a GPU."""
