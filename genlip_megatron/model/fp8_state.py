"""The state of delayed FP8 scaling: a scale and an amax history for each quantised tensor.

Transformer Engine keeps both in its modules and would pickle them. Here they are plain named tensors that a checkpoint
holds beside the weights, for example ``decoder.layers.mlp.linear_fc1.fp8.scale_fwd``. Every pass changes them.

Every update reduces amax over all ranks that hold parts or copies of a layer. So these ranks have the same state; it is
stored once, and any layout loads it. Only the first row of a history differs between ranks until the next update;
``share_largest_values`` makes it equal too.

Legend: T quantised tensors of a module, L passes in a history.
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


@torch.no_grad()  # with gradients enabled, leaving the context would update the scales of existing models
def prepare_fp8_state(layers: Iterable[Any], transformer: TransformerConfig) -> None:
    """Create the state of FP8 layers before their first forward pass: scales of 1, empty histories."""
    for layer in layers if transformer.fp8 else ():
        with get_fp8_context(transformer, layer.layer_number - 1):
            for module in layer.modules():
                if hasattr(module, "init_fp8_metadata"):
                    module.init_fp8_metadata()


def fp8_state(part: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model or a layer: float32 scales [T] and amax histories [L, T], not copied."""
    for name, module in part.named_modules():
        for direction in ("fwd", "bwd"):
            state = getattr(module, "fp8_meta", {}).get(f"scaling_{direction}")
            for kind in ("scale", "amax_history"):
                if hasattr(state, kind):  # with current scaling only FP8 attention has it
                    yield f"{name}{FP8_STATE}{kind}_{direction}", getattr(state, kind)


def sharded_fp8_state(layer: Any, prefix: str, sharded_offsets: Any) -> dict[str, Any]:
    """Copies of a layer's state for a checkpoint; copies, because training changes the state while a save is written.

    Empty where some layers run in bfloat16, since a checkpoint's tensor covers all layers. Delayed scaling takes all
    layers or none, so only FP8 attention with current scaling is affected.
    """
    if layer.config.first_last_layers_bf16:
        return {}
    copies = {name: tensor.clone() for name, tensor in fp8_state(layer)}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(copies, prefix, {}, sharded_offsets)
    return sharded


def set_fp8_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Set a model's state; entries that ``state`` lacks are reset to scale 1 and an empty history."""
    for name, tensor in fp8_state(model):
        if name in state:
            tensor.copy_(state[name])
        else:
            tensor.fill_(0.0 if "amax_history" in name else 1.0)


class FP8Snapshot:
    """A snapshot of the state of models; empty without delayed scaling. Takes few kernel launches."""

    def __init__(self, models: Iterable[Any]) -> None:
        self._live = [tensor for model in models for _, tensor in fp8_state(model)]
        self._kept = [tensor.clone() for tensor in self._live]

    @torch.no_grad()
    def take(self) -> None:
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


def share_largest_values(models: Iterable[Any]) -> None:
    """Reduce the amax values since the last update over all ranks, as the next update would. A collective."""
    rows = [tensor[0] for model in models for name, tensor in fp8_state(model) if "amax_history" in name]
    if rows:
        largest = torch.cat(rows)
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        for row, values in zip(rows, largest.split([row.numel() for row in rows]), strict=True):
            row.copy_(values)
