"""The model, built from Megatron-Core's modules; ``state_dict.py`` is the table of its parameters."""
