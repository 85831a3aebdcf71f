"""What delayed FP8 scaling remembers: a scale of each tensor that is quantised, and a history of its largest values.

Transformer Engine keeps both in its modules and would pickle them. Here they are plain tensors by name, which stand in
a checkpoint beside the weights, as ``decoder.layers.mlp.linear_fc1.fp8.scale_fwd``. Forward and backward passes change
them.

Every update takes the largest values of all ranks that hold parts of a layer, or copies of it. So these have the same
state, which is stored once, and any layout reads it. In the history's first row alone each gathers its own until the
next update; ``share_largest_values`` makes that the same as well.

Legend: T tensors of a module that are quantised, L passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from genlip_megatron.model.state_dict import FP8_STATE

_TENSORS = ("scale", "amax_history")


@torch.no_grad()  # with gradients, leaving the context would update the scales of models that there are already
def prepare_fp8_state(layers: Iterable[Any], transformer: TransformerConfig) -> None:
    """Make the state of FP8 layers, which their first forward pass would: scales of 1, empty histories."""
    for layer in layers if transformer.fp8 else ():
        with get_fp8_context(transformer, layer.layer_number - 1):
            for module in layer.modules():
                if hasattr(module, "init_fp8_metadata"):
                    module.init_fp8_metadata()


def fp8_state(part: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model or a layer: float32 scales [T] and histories [L, T], the tensors that are in use."""
    for name, module in part.named_modules():
        for direction in ("fwd", "bwd"):
            state = getattr(module, "fp8_meta", {}).get(f"scaling_{direction}")
            for kind in _TENSORS:
                if hasattr(state, kind):  # with current scaling in FP8 attention alone
                    yield f"{name}{FP8_STATE}{kind}_{direction}", getattr(state, kind)


def sharded_fp8_state(layer: Any, prefix: str, sharded_offsets: Any) -> dict[str, Any]:
    """Copies of a layer's state as parts of a checkpoint: training changes it while a save is written.

    None where some layers are in bfloat16, since a checkpoint's tensors are those of all layers. Delayed scaling takes
    all layers or none, so that this concerns FP8 attention beside current scaling alone.
    """
    if layer.config.first_last_layers_bf16:
        return {}
    copies = {name: tensor.clone() for name, tensor in fp8_state(layer)}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(copies, prefix, {}, sharded_offsets)
    return sharded


def set_fp8_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Set a model's state; what ``state`` lacks begins anew."""
    for name, tensor in fp8_state(model):
        if name in state:
            tensor.copy_(state[name])
        else:
            tensor.fill_(0.0 if "amax_history" in name else 1.0)


class FP8Snapshot:
    """The state of models at one moment, to go back to; empty without delayed scaling. Few launches on a device."""

    def __init__(self, models: Iterable[Any]) -> None:
        self._live = [tensor for model in models for _, tensor in fp8_state(model)]
        self._kept = [tensor.clone() for tensor in self._live]

    @torch.no_grad()
    def take(self) -> None:
        """Keep what is now."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to what was kept."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


def share_largest_values(models: Iterable[Any]) -> None:
    """Give every rank the largest values that any has seen since the last update of scales. The next update would take
    these, so nothing else changes. A collective."""
    rows = [tensor[0] for model in models for name, tensor in fp8_state(model) if "amax_history" in name]
    if rows:
        largest = torch.cat(rows)
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        for row, values in zip(rows, largest.split([row.numel() for row in rows]), strict=True):
            row.copy_(values)
