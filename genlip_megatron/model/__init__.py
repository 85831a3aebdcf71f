"""The model: what it is, stated on Megatron-Core's building blocks."""
