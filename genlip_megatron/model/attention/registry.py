"""The attention backends by name, and which one runs. To add one: its file, and its name in config/schema.py."""

from __future__ import annotations

import importlib

from genlip_megatron.config import ATTENTION_BACKENDS
from genlip_megatron.model.attention.backend import Backend, Place

BACKENDS: dict[str, type[Backend]] = {
    name: getattr(importlib.import_module(f"{__package__}.{name}"), name.capitalize()) for name in ATTENTION_BACKENDS
}
# The backend of train.fp8_attention (fp8.py); each layer brings its own kernel.
FP8_BACKEND = "te-fp8"


def choose_backend(wanted: str, place: Place, transformer_engine: bool = False) -> tuple[str, str]:
    """(backend, why) for ``train.attention_backend``; auto takes the first of an order that runs.

    Args:
        transformer_engine: the layers are Transformer Engine's, so its attention comes first.

    Raises:
        ValueError: the wanted backend cannot run; names the reason and the backends that can.
    """
    reasons = {name: backend.why_not(place) for name, backend in BACKENDS.items()}
    if wanted != "auto":
        if wanted not in BACKENDS:
            raise ValueError(f"train.attention_backend = {wanted!r}: unknown. Use auto, {', '.join(BACKENDS)}")
        if reasons[wanted]:
            able = ", ".join(name for name, reason in reasons.items() if reason is None)
            raise ValueError(f"train.attention_backend = {wanted}: {reasons[wanted]}. Backends that run here: {able}")
        return wanted, "as set"
    order = ["te", "varlen", "grouped"] if transformer_engine else ["varlen", "te", "grouped"]
    chosen = next(name for name in order if reasons[name] is None)
    passed = [f"{name} {reasons[name]}" for name in order[: order.index(chosen)]]
    return chosen, "; ".join([f"the first of {', '.join(order)} that runs here", *passed])
