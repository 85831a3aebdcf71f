"""A hundred steps give the committed losses; refactorings of model, loss, optimizer or schedule must keep them.

The samples are drawn here, so the data engine and the fonts of rendered scenes do not matter. After a change that
should move the curve, ``python -m tests.train.test_golden_curve`` rewrites it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, tiny_config

FILE = Path(__file__).parent.parent / "golden" / "curve.json"
STEPS, PACKS = 100, 2


def curve_config(**flags: Any) -> RunConfig:
    """The tiny model with DropPath, warmup and cosine over the hundred steps."""
    settings = {"train__train_iters": STEPS, "train__lr_warmup_iters": 10, "train__lr": 3e-3}
    settings |= {"train__global_batch_size": PACKS, "data__seq_length": 256}
    return tiny_config(Path("unused"), **settings, **flags)


def drawn_batches(config: RunConfig, lane: int, lanes: int) -> Iterator[PackedBatch]:
    """Packs of twelve images with fixed captions, which the model can learn; their order and DropPath are random."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    samples = []
    for number in range(12):
        rows, columns, length = draw(1, 7, 3).tolist()
        patches = draw(0, 256, rows * columns, 768).to(torch.uint8)
        tokens = draw(0, config.model.vocab_size, 2 + length).tolist()
        samples.append(Sample(patches, rows, columns, tokens, [False, *[True] * (1 + length)], key=str(number)))
    while True:
        for pack in range(PACKS):
            chosen = [samples[i] for i in draw(0, len(samples), 6).tolist()]
            batch = pack_samples([chosen], config.data.seq_length)
            kept = torch.rand(config.model.num_layers, 2, len(batch.sample_starts), generator=generator) >= 0.2
            if pack % lanes == lane:
                yield replace(batch, drop_path=kept.float() / 0.8)


def curve(config: RunConfig) -> list[float]:
    """The loss of every step."""
    from megatron.core import parallel_state

    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import build_run
    from genlip_megatron.train.step import train_step

    groups.initialize(config)
    run = build_run(config)
    ranks = parallel_state.get_data_parallel_world_size()
    batches = drawn_batches(config, parallel_state.get_data_parallel_rank(), ranks)
    return [train_step(run, batches).loss for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2xPP2"])
def test_a_hundred_steps(name: str) -> None:
    world_size, flags = layout(name)
    expected = json.loads(FILE.read_text())["losses"]
    losses = run_distributed(world_size, curve, curve_config(**flags))[0]
    assert expected[-1] < expected[0] - 1
    # The largest difference measured between layouts was 3e-7.
    assert losses == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    losses = run_distributed(1, curve, curve_config())[0]
    FILE.write_text(json.dumps({"losses": [float(f"{loss:.7g}") for loss in losses]}, indent=0) + "\n")
    print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {FILE}")
