"""The loader: the same stream on any number of ranks, exact after a resume, and one bad sample costs only itself."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genlip_megatron.batch import PackedBatch
from genlip_megatron.data.index import load_index
from genlip_megatron.data.loader import Loader, drop_path_factors, merge_cursors
from genlip_megatron.data.share import Share
from genlip_megatron.data.text import load_tokenizer
from tests.train.test_layouts_and_resume import tiny_config

STEPS, LANES = 3, 4


def take(loader: Loader, count: int) -> list[PackedBatch]:
    """The loader's next micro-batches, of one pack each."""
    batches = iter(loader)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def assert_equal(ours: PackedBatch, expected: PackedBatch, but: tuple[str, ...] = ()) -> None:
    for field in fields(PackedBatch):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        if field.name not in but:
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.fixture(scope="module")
def reference(demo_data: Path) -> list[PackedBatch]:
    return take(Loader(tiny_config(demo_data), "train"), STEPS * LANES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_stream_of_one(ranks: int, reference: list[PackedBatch], demo_data: Path) -> None:
    share = LANES // ranks
    for rank in range(ranks):
        mine = take(Loader(tiny_config(demo_data, data__num_workers=rank + 1), "train", rank, ranks), STEPS * share)
        for step in range(STEPS):
            for i in range(share):
                assert_equal(mine[step * share + i], reference[step * LANES + rank * share + i])


def test_without_images_everything_else_is_the_same(reference: list[PackedBatch], demo_data: Path) -> None:
    for ours, expected in zip(
        take(Loader(tiny_config(demo_data), "train", share=Share(images=False)), 4), reference, strict=False
    ):
        assert ours.patches is None
        assert_equal(ours, expected, but=("patches",))


def test_resume_continues_after_the_consumed_step(reference: list[PackedBatch], demo_data: Path) -> None:
    cursors = []
    for rank in range(2):
        loader = Loader(tiny_config(demo_data, data__prefetch=8), "train", rank, 2)
        take(loader, LANES // 2)  # one step is consumed; the thread has run ahead
        cursors.append(loader.state_dict())
    resumed = Loader(tiny_config(demo_data), "train")
    resumed.load_state_dict(merge_cursors(cursors))
    for ours, expected in zip(take(resumed, LANES), reference[LANES:], strict=False):
        assert_equal(ours, expected)


def test_labels_are_the_next_tokens_and_start_after_the_prompt(reference: list[PackedBatch], demo_data: Path) -> None:
    tokenizer = load_tokenizer(demo_data / "tokenizer.model")
    prompt = len(tokenizer.encode(tiny_config(demo_data).data.prompt))
    for batch in reference:
        real = batch.loss_weights > 0
        rows, labels = batch.loss_rows[real], batch.labels[real]
        assert torch.equal(batch.token_ids[rows + 1], labels)
        count = int((batch.text_lengths > 0).sum())
        ends = batch.sample_starts + batch.image_lengths + batch.text_lengths
        first = batch.sample_starts + batch.image_lengths + prompt - 1
        expected = [torch.arange(int(a), int(b) - 1) for a, b in zip(first[:count], ends[:count], strict=True)]
        assert torch.equal(rows, torch.cat(expected))
        assert torch.equal(batch.token_ids[ends[:count] - 2], torch.full((count,), tokenizer.closing_ids[0]))
        assert len(batch.keys) == count and int(batch.image_lengths.sum()) == batch.patches.shape[0]


def test_a_sample_that_went_bad_keeps_its_place_without_loss(demo_data: Path, tmp_path: Path) -> None:
    for file in demo_data.iterdir():
        shutil.copy2(file, tmp_path / file.name)
    shard = tmp_path / "train-00000.tar"
    config = tiny_config(tmp_path)
    index = load_index(str(shard), load_tokenizer(config.data.tokenizer).fingerprint, config.data.prompt)
    key, row = index.keys[5], index.rows[5]
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    with open(shard, "r+b") as file:
        file.seek(int(row["image_offset"]) + int(row["image_size"]) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=times)
    loader = Loader(config, "train")
    good = {batch.keys: batch for batch in take(Loader(tiny_config(demo_data), "train"), 150)}
    hit = 0
    for batch in take(loader, 150):
        if key not in batch.keys:
            continue
        hit += 1
        number = batch.keys.index(key)
        mine = batch.sample_ids[batch.loss_rows] == number
        used = good[batch.keys].loss_weights > 0
        assert not batch.loss_weights[mine & used].any()
        assert torch.equal(batch.loss_weights[~mine], good[batch.keys].loss_weights[~mine])
        assert_equal(batch, good[batch.keys], but=("patches", "loss_weights"))
    bad = loader.quarantine.records[0]
    assert hit and (bad.shard, bad.key) == (str(shard), key)
    assert bad.reason == "the image's bytes changed since the index was made (crc32)"


def test_a_long_caption_is_cut_and_counted_and_its_image_whole(demo_data: Path) -> None:
    config = tiny_config(demo_data, data__seq_length=66, data__prompt="Describe the image in detail.")
    loader = Loader(config, "train")
    batches = take(loader, 40)
    assert loader.samples.truncated > 0
    lengths = torch.cat([batch.image_lengths + batch.text_lengths for batch in batches])
    assert int(lengths.max()) == 66
    (dataset,) = loader.datasets
    heights, widths = dataset.image_sizes(dataset.plan_rows(np.arange(len(dataset))))
    by_key = {dataset.key(i): int(heights[i] * widths[i] // 256) for i in range(len(dataset))}
    for batch in batches:
        for number, key in enumerate(batch.keys):
            assert int(batch.image_lengths[number]) == by_key[key]


def test_validation_is_one_pass_in_order_and_the_same_every_time(demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data, log__eval_iters=10), "valid")
    first, second = ([batch.keys for batch in loader] for _ in range(2))
    assert first == second and len(first) == 10 * LANES
    assert sorted(key for keys in first for key in keys) == sorted(loader.samples.key(i) for i in range(len(loader)))


def test_more_ranks_than_samples_is_refused(demo_data: Path) -> None:
    config = tiny_config(demo_data, train__global_batch_size=512)
    with pytest.raises(ValueError, match="160 good samples for 512 data-parallel ranks; use fewer ranks or more data"):
        Loader(config, "train", 0, 512)


def test_drop_path_draws_belong_to_the_sample_and_step() -> None:
    def draw(step: int, samples: list[int], **other: Any) -> np.ndarray:
        return drop_path_factors(**{"seed": 1, "layers": 6, "rate": 0.25, **other}, step=step, samples=samples).numpy()

    assert (draw(3, [7, 8, 9])[:, :, 1] == draw(3, [8])[:, :, 0]).all()
    assert (draw(3, [8]) != draw(4, [8])).any() and (draw(3, [8]) != draw(3, [8], seed=2)).any()
    many = draw(0, list(range(2000)))
    assert set(np.unique(many)) == {0.0, np.float32(1 / 0.75)}
    # Mean 1 and a standard error of sqrt(1/3 / 24000) = 0.004.
    assert abs(many.mean() - 1) < 0.02
