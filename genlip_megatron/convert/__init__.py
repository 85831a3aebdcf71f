"""Convert weights between Megatron checkpoints and Hugging Face folders."""
