"""A GPU that is none: torch's CUDA build, and what lies above it, on a machine without a GPU."""
