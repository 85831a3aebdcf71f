"""Bugs that a test plants into a parallel run, one at a time; each must make the comparison of layouts fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch


def _unmarked(*names: str) -> Any:
    """Parameters lack the mark that sums their gradients over the tensor-parallel group."""
    from genlip_megatron.model import weights

    fill = weights.fill_weights

    def unmarking(model: Any, get: Any) -> None:
        fill(model, get)
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.sequence_parallel = False

    return mock.patch.object(weights, "fill_weights", unmarking)


def _changed_batch(change: Any) -> Any:
    """Every rank trains on ``change(batch, context-parallel rank)`` instead of the batch."""
    from megatron.core import parallel_state

    from genlip_megatron.train import forward_backward

    prepare = forward_backward.prepare

    def changed(run: Any, batch: Any, counted: bool) -> Any:
        return prepare(run, change(batch, parallel_state.get_context_parallel_rank()), counted)

    return mock.patch.object(forward_backward, "prepare", changed)


def _positions(batch: Any, rank: int) -> Any:
    share = batch.num_tokens // 2
    return replace(batch, position_ids=batch.position_ids.roll(share if rank else 0, dims=1))


def _leaking(batch: Any, rank: int) -> Any:
    """The first sample's text includes the second sample."""
    total = batch.image_lengths + batch.text_lengths
    texts, starts = batch.text_lengths.clone(), batch.sample_starts.clone()
    texts[0] += total[1]
    images = batch.image_lengths.clone()
    images[1] = texts[1] = starts[1] = 0
    return replace(batch, text_lengths=texts, image_lengths=images, sample_starts=starts)


def _shifted_labels() -> Any:
    from genlip_megatron.model.head import Head

    share = Head._share

    def shifted(self: Any, x: Any) -> Any:
        mine = share(self, x)
        return mine if mine.dtype.is_floating_point else mine.roll(1)

    return mock.patch.object(Head, "_share", shifted)


def _counted_by_every_rank() -> Any:
    from genlip_megatron.train import forward_backward

    def counting(batch: Any, total: Any) -> Any:
        count = (batch.loss_weights > 0).sum()
        return total, count.to(torch.int), {"loss": torch.stack((total.detach().double(), count.double()))}

    return mock.patch.object(forward_backward, "loss_sum", counting)


def _drop_path_per_rank(batch: Any, rank: int) -> Any:
    if batch.drop_path is None:  # in validation
        return batch
    return replace(batch, drop_path=batch.drop_path.roll(rank, dims=2))


def _forgotten_context_sum() -> Any:
    """The forward pass gathers keys and values, but the backward pass drops other ranks' gradients of them."""
    from megatron.core import tensor_parallel

    from genlip_megatron.model.attention import core

    def gather(x: Any, group: Any) -> Any:
        return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)

    return mock.patch.object(core, "gather_sequence", gather)


_GATHERED = {"parallel__cp_comm_type": "all_gather"}

# Fault: (layout that shows it, further settings, context manager, text that the comparison must report).
FAULTS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "norm's gradient not summed": ("TP2", {}, lambda: _unmarked("input_layernorm.weight"), "0.input_layernorm.weight"),
    "LayerScale's gradient not summed": ("TP2", {}, lambda: _unmarked("mlp_bda.scale"), "0.mlp_bda.scale"),
    "bias's gradient not summed": ("TP2", {}, lambda: _unmarked("linear_proj.bias"), "0.self_attention.linear_proj"),
    "patch embedding's gradient not summed": ("TP2", {}, lambda: _unmarked("patch_weight"), "embed.patch_weight"),
    "positions off by one rank": ("CP2", {}, lambda: _changed_batch(_positions), "gradient differs"),
    "a sample sees its neighbour": ("DP2", {}, lambda: _changed_batch(_leaking), "gradient differs"),
    "labels shifted": ("CP2", {}, _shifted_labels, "loss differs"),
    "token counts not scaled": ("CP2", {}, _counted_by_every_rank, "loss differs"),
    "DropPath drawn per rank": ("CP2", {}, lambda: _changed_batch(_drop_path_per_rank), "gradient differs"),
    "keys' gradients not summed": ("CP2", _GATHERED, _forgotten_context_sum, "gradient differs"),
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Inside the block this rank has the fault; None plants nothing."""
    with FAULTS[fault][2]() if fault else contextlib.nullcontext():
        yield
