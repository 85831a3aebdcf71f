"""GenLIP-Megatron: generative vision-language pretraining on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says at its import what it lacks; a run's log and docs/install-gpu.md say what that means.
for _message in (
    ".*(Transformer Engine|Apex|nvrx|flash).*not installed.*",
    ".*(Transformer Engine|Apex).*Falling back.*",
):
    warnings.filterwarnings("ignore", message=_message)
