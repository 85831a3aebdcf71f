"""Recompute the inputs of a layer's linears in the backward pass instead of keeping them. It costs little arithmetic.

Megatron-Core has the same for its own modules (``CheckpointWithoutOutput``), but it asks Transformer Engine for FP8
state even without FP8, and recomputes under a second autograd graph with restored random states. Nothing here draws
random numbers, so the first graph suffices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_RECOMPUTE = "_recompute"
# A name of ``parallel.recompute_modules`` -> the linears that read its output.
_READERS = {
    "layernorm": ("self_attention.linear_qkv", "mlp.linear_fc1"),
    "output_gate": ("self_attention.linear_proj",),
    "mlp_act": ("mlp.linear_fc2",),
}


def recomputable(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)``, a new tensor that ``discard`` can free.

    Args:
        function: deterministic; its backward pass needs ``inputs`` and not the result.
    """
    result = function(*inputs)
    if torch.is_grad_enabled():
        setattr(result, _RECOMPUTE, functools.partial(function, *inputs))
    return result


def discard(x: Tensor, used: Tensor) -> None:
    """Free ``x`` until the backward pass reaches ``used``, if ``x`` is ``recomputable``; else do nothing.

    Do not read ``x`` before the backward pass restores it. It supports one backward pass.

    Args:
        used: from the last use of ``x`` in the forward pass; the backward pass has its gradient before it reads ``x``.
    """
    again = getattr(x, _RECOMPUTE, None)
    if again is None or not used.requires_grad:
        return
    size = x.untyped_storage().size()
    x.untyped_storage().resize_(0)
    # Emptied on use, since the graph keeps its hooks until the whole backward pass is over.
    held = [(x.untyped_storage(), again)]

    def restore(_: Tensor) -> None:
        if not held:
            raise RuntimeError("--recompute-modules supports one backward pass; its activations are already freed")
        storage, again = held.pop()
        storage.resize_(size)
        with torch.no_grad():
            storage.copy_(again().untyped_storage())

    used.register_hook(restore)


def keep_no_copies(layers: Iterable[torch.nn.Module], modules: Iterable[str]) -> None:
    """Make Transformer Engine's FP8 linears save the input that ``modules`` recompute, not an FP8 copy of it, which
    would stay in memory."""
    for layer in layers:
        for name in modules:
            for reader in _READERS.get(name, ()):
                linear: Any = layer.get_submodule(reader)
                linear.save_original_input = True
