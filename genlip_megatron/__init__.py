"""GenLIP-Megatron: generative vision-language pretraining on Megatron-Core."""

__version__ = "0.1.0"
