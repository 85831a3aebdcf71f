"""Context-parallel ranks with only image, only text or only padding; packs without an image or an answer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import RunConfig
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.parity import FLOAT32, gradients, merged
from genlip_megatron.testing.runs import build_run, layout, tiny_config
from genlip_megatron.train.forward_backward import forward_backward
from genlip_megatron.train.validation import sum_over_ranks

SLOTS = 128
SETTINGS: dict[str, Any] = {"train__global_batch_size": 2, "data__seq_length": SLOTS}
# (rows, columns, prompt, answer) of each sample in a pack of 128 slots; each of four ranks holds 32 slots.
PACKS: dict[str, list[tuple[int, int, int, int]]] = {
    "image, image and text, text, padding": [(6, 8, 2, 46)],
    "samples cut in two": [(5, 4, 1, 20), (4, 5, 2, 25), (1, 1, 0, 9), (2, 3, 3, 20)],
    "only text": [(0, 0, 2, 60)],
    "only an image": [(8, 8, 0, 0)],
    "an answer on one rank": [(5, 5, 60, 3)],
}


def make_batch(pack: list[tuple[int, int, int, int]]) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for rows, columns, prompt, answer in pack:
        patches = torch.randint(0, 256, (rows * columns, 768), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(0, 511, (prompt + answer,), generator=generator).tolist()
        samples.append(Sample(patches, rows, columns, tokens, [False] * prompt + [True] * answer))
    batch = pack_samples([samples], SLOTS)
    if batch.patches is not None and not len(batch.patches):  # as the data engine does for a batch without images
        return PackedBatch(**{**vars(batch), "patches": torch.zeros(1, 768, dtype=torch.uint8)})
    return batch


def loss_and_gradients(config: RunConfig, pack: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    groups.initialize(config)
    run = build_run(config)
    # Two micro-batches; the fixed second one has a loss for every pack.
    batches = [make_batch(pack), make_batch(PACKS["samples cut in two"])]
    total = forward_backward(run, iter(batches), forward_only=False)
    return {"loss": sum_over_ranks(total).tolist(), "gradients": gradients(run)}


@functools.cache
def on_one_process(pack: str) -> dict[str, Any]:
    return run_distributed(1, loss_and_gradients, tiny_config(Path("unused"), **SETTINGS), PACKS[pack])[0]


@pytest.mark.slow
@pytest.mark.parametrize("communication", ["a2a", "all_gather"])
@pytest.mark.parametrize("name", ["CP4", "TP2xCP2"])
@pytest.mark.parametrize("pack", PACKS)
def test_any_split_of_a_pack(pack: str, name: str, communication: str) -> None:
    expected = on_one_process(pack)
    world_size, sizes = layout(name)
    config = tiny_config(Path("unused"), **SETTINGS, **sizes, parallel__cp_comm_type=communication)
    results = run_distributed(world_size, loss_and_gradients, config, PACKS[pack])
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=FLOAT32.loss)
    for tensor, gradient in merged(results, "gradients").items():
        error = (gradient - expected["gradients"][tensor]).norm() / expected["gradients"][tensor].norm()
        assert error < FLOAT32.gradient, tensor
