"""Values that are made a second time rather than kept: the inputs of a layer's linears, which take nearly no arithmetic
to make from what is kept anyway.

Megatron-Core has the same for its own modules (``CheckpointWithoutOutput``), but asks Transformer Engine for FP8 state
even where there is none, and runs what it repeats under a second autograd graph, with random states put back. Nothing
here draws random numbers, and the first graph serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_AGAIN = "_made_again_by"
# Which linears of a layer read what the modules of ``parallel.recompute_modules`` make.
_READERS = {
    "layernorm": ("self_attention.linear_qkv", "mlp.linear_fc1"),
    "output_gate": ("self_attention.linear_proj",),
    "mlp_act": ("mlp.linear_fc2",),
}


def recomputable(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)``, a new tensor, which ``discard`` may then free.

    Args:
        function: gives the same bits each time; its backward pass needs ``inputs`` and not the result.
    """
    made = function(*inputs)
    if torch.is_grad_enabled():
        setattr(made, _AGAIN, functools.partial(function, *inputs))
    return made


def discard(x: Tensor, used: Tensor) -> None:
    """Free ``x`` until the backward pass has come to ``used``, if ``recomputable`` has made it; else do nothing.

    Whoever else holds ``x``, a hook on a module say, must not read it in between. One backward pass finds it there.

    Args:
        x: whose last use in the forward pass was to make ``used``.
        used: what was made of it; its gradient is there before anything asks for ``x`` again.
    """
    again = getattr(x, _AGAIN, None)
    if again is None or not used.requires_grad:
        return
    size = x.untyped_storage().size()
    x.untyped_storage().resize_(0)
    # Emptied when used, since the graph holds its hooks until the whole backward pass is over.
    held = [(x.untyped_storage(), again)]

    def restore(_: Tensor) -> None:
        if not held:
            raise RuntimeError("a second backward pass over a layer with --recompute-modules, which lets go after one")
        storage, again = held.pop()
        storage.resize_(size)
        with torch.no_grad():
            storage.copy_(again().untyped_storage())

    used.register_hook(restore)


def keep_no_copies(layers: Iterable[torch.nn.Module], modules: Iterable[str]) -> None:
    """Have Transformer Engine's linears, in FP8, keep the very input that is made again by ``modules``, and no FP8 copy
    of it, which nothing would make again."""
    for layer in layers:
        for name in modules:
            for reader in _READERS.get(name, ()):
                linear: Any = layer.get_submodule(reader)
                linear.save_original_input = True
