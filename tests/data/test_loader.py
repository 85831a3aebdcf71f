"""The loader: the same stream on any number of ranks, exact resume, and a bad sample does not affect others."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig, override
from genlip_megatron.data.index import load_index
from genlip_megatron.data.loader import Loader, Prefetcher, drop_path_factors, merge_cursors
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.tokenizer import load_tokenizer

STEPS, LANES = 3, 4


def take(loader: Loader, count: int) -> list[PackedBatch]:
    """The loader's next micro-batches with one pack each."""
    batches = iter(loader)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def resume(config: RunConfig, *states: dict[str, Any]) -> Loader:
    """A loader that continues from the cursors of all ranks."""
    loader = Loader(config, "train")
    loader.load_state_dict(merge_cursors([*states]))
    return loader


def assert_equal(ours: PackedBatch, expected: PackedBatch, but: tuple[str, ...] = ()) -> None:
    for field in fields(PackedBatch):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        if field.name not in but:
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.fixture(scope="module")
def reference(demo_data: Path) -> list[PackedBatch]:
    return take(Loader(tiny_config(demo_data), "train"), STEPS * LANES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_stream_of_a_single_rank(ranks: int, reference: list[PackedBatch], demo_data: Path) -> None:
    """With any number of decoder threads and of micro-batches ahead."""
    share = LANES // ranks
    for rank in range(ranks):
        config = tiny_config(demo_data, data__num_workers=rank + 1, data__prefetch=ranks)
        mine = take(Loader(config, "train", rank, ranks), STEPS * share)
        for step in range(STEPS):
            for i in range(share):
                assert_equal(mine[step * share + i], reference[step * LANES + rank * share + i])


def test_the_stream_is_the_same_on_one_to_eight_ranks(demo_data: Path) -> None:
    """(step, pack, sample) with any number of ranks, decoder threads and micro-batches ahead."""
    streams = []
    for ranks in (1, 2, 4, 8):
        flags = {"train__global_batch_size": 8, "data__num_workers": 1 + ranks % 3, "data__prefetch": ranks}
        share = 8 // ranks
        stream = {}
        for rank in range(ranks):
            for i, batch in enumerate(take(Loader(tiny_config(demo_data, **flags), "train", rank, ranks), 2 * share)):
                stream[i // share, rank * share + i % share] = batch.keys
        streams.append(stream)
    assert len(streams[0]) == 16 and all(stream == streams[0] for stream in streams)


def test_resume_continues_after_the_consumed_step(reference: list[PackedBatch], demo_data: Path) -> None:
    cursors = []
    for rank in range(2):
        loader = Loader(tiny_config(demo_data, data__prefetch=8), "train", rank, 2)
        take(loader, LANES // 2)  # one step is consumed; the thread has run ahead
        cursors.append(loader.state_dict())
    resumed = resume(tiny_config(demo_data), *cursors)
    for ours, expected in zip(take(resumed, LANES), reference[LANES:], strict=False):
        assert_equal(ours, expected)


def test_a_step_counts_as_consumed_with_its_last_micro_batch(reference: list[PackedBatch], demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data), "train")
    take(loader, LANES + 1)
    assert loader.state_dict()["step"] == 1
    assert_equal(take(resume(tiny_config(demo_data), loader.state_dict()), 1)[0], reference[LANES])


def test_iterating_again_continues_after_the_last_consumed_step(reference: list[PackedBatch], demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data, data__prefetch=8), "train")
    take(loader, LANES)
    for ours, expected in zip(take(loader, LANES), reference[LANES:], strict=False):
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


def test_a_bad_sample_keeps_its_place_without_loss(demo_data: Path, tmp_path: Path) -> None:
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


def test_a_long_caption_is_cut_and_counted_and_its_image_is_kept(demo_data: Path) -> None:
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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_by_default_validation_takes_the_whole_of_each_set_once(ranks: int, demo_data: Path) -> None:
    """Two sets, of two manifests; all ranks take equally many micro-batches."""
    sets = f"{demo_data}/val.dataset.json,{demo_data}/train.dataset.json"
    flags = {"log__eval_iters": 0, "data__valid_data": sets}
    loaders = [Loader(tiny_config(demo_data, **flags), "valid", rank, ranks) for rank in range(ranks)]
    of_sets = loaders[0].sets
    assert [(one.name, one.size, one.samples) for one in of_sets] == [("val", 24, 24), ("train", 160, 160)]
    assert all(loader.sets == of_sets for loader in loaders)
    batches = [list(loader) for loader in loaders]
    steps = [one.steps for one in of_sets]
    assert all(len(mine) == sum(steps) * LANES // ranks for mine in batches)
    first = [key for mine in batches for batch in mine[: steps[0] * LANES // ranks] for key in batch.keys]
    rest = [key for mine in batches for batch in mine[steps[0] * LANES // ranks :] for key in batch.keys]
    names = [loaders[0].samples.key(i) for i in range(24 + 160)]
    assert sorted(first) == sorted(names[:24]) and sorted(rest) == sorted(names[24:])
    # A step fewer would not hold the set.
    assert any(
        batch.keys for mine in batches for batch in mine[(steps[0] - 1) * LANES // ranks : steps[0] * LANES // ranks]
    )


def test_more_ranks_than_samples_is_refused(demo_data: Path) -> None:
    config = tiny_config(demo_data, train__global_batch_size=512)
    with pytest.raises(ValueError, match="160 good samples for 512 data-parallel ranks. Use fewer ranks or more data"):
        Loader(config, "train", 0, 512)


def test_drop_path_draws_depend_only_on_sample_and_step() -> None:
    def draw(step: int, samples: list[int], **other: Any) -> np.ndarray:
        return drop_path_factors(**{"seed": 1, "layers": 6, "rate": 0.25, **other}, step=step, samples=samples).numpy()

    assert (draw(3, [7, 8, 9])[:, :, 1] == draw(3, [8])[:, :, 0]).all()
    assert (draw(3, [8]) != draw(4, [8])).any() and (draw(3, [8]) != draw(3, [8], seed=2)).any()
    many = draw(0, list(range(2000)))
    assert set(np.unique(many)) == {0.0, np.float32(1 / 0.75)}
    # Mean 1 and a standard error of sqrt(1/3 / 24000) = 0.004.
    assert abs(many.mean() - 1) < 0.02


def mixture(folder: Path, **flags: Any) -> RunConfig:
    """Training and validation shards as two sources."""
    return tiny_config(folder, data__train_data=f"{folder}/train-*.tar,{folder}/val.dataset.json", **flags)


def keys_of(loader: Loader, count: int) -> list[str]:
    return [key for batch in take(loader, count) for key in batch.keys]


def test_a_mixture_is_drawn_by_weight_or_by_epochs(demo_data: Path) -> None:
    equal = keys_of(Loader(mixture(demo_data, data__train_weights="1:1"), "train"), 24)
    assert sum(key.startswith("val") for key in equal) / len(equal) == pytest.approx(0.5, abs=0.08)
    # 2 x 160 and 10 x 24 samples in an epoch of all sources.
    epochs = keys_of(Loader(mixture(demo_data, data__train_epochs="2:10"), "train"), 24)
    assert sum(key.startswith("val") for key in epochs) / len(epochs) == pytest.approx(240 / 560, abs=0.08)
    whole = Loader(mixture(demo_data), "train")
    assert len(whole.datasets) == 1 and len(whole) == 184
    later = keys_of(Loader(mixture(demo_data, data__train_weights="1:0,0:1@2", data__pack_buffer=8), "train"), 40)
    assert not any(key.startswith("val") for key in later[:20]) and all(key.startswith("val") for key in later[-20:])


def test_resuming_with_other_weights_is_refused(demo_data: Path) -> None:
    config = mixture(demo_data, data__train_weights="3:1")
    loader = Loader(config, "train")
    expected = take(Loader(config, "train"), 3 * LANES)
    take(loader, LANES)
    for ours, theirs in zip(take(resume(config, loader.state_dict()), 2 * LANES), expected[LANES:], strict=True):
        assert_equal(ours, theirs)
    with pytest.raises(ValueError, match="data fingerprint: "):
        resume(tiny_config(demo_data), loader.state_dict())


def test_another_global_batch_size_continues_the_epoch(demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data), "train")
    seen = keys_of(loader, 2 * LANES)
    with pytest.raises(ValueError, match=r"has 4 lanes, this run 2 \(train.global_batch_size\).*--change-lanes"):
        resume(tiny_config(demo_data, train__global_batch_size=2), loader.state_dict())
    fewer = tiny_config(demo_data, train__global_batch_size=2, data__change_lanes=True)
    rest = keys_of(resume(fewer, loader.state_dict()), 60)
    counts = Counter(seen + rest)
    # Exactly once per epoch, and lanes are never more than one epoch apart.
    assert len(counts) == 160 and max(counts.values()) - min(counts.values()) <= 2


def test_skipped_steps_stay_skipped(reference: list[PackedBatch], demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data), "train")
    take(loader, LANES)
    resumed = resume(tiny_config(demo_data), loader.state_dict())
    resumed.skip(1)
    cursor = resumed.state_dict()
    assert cursor["skipped"] == [[2, 2]] and cursor["step"] == 2
    third = resume(tiny_config(demo_data), cursor)
    for ours, expected in zip(take(third, LANES), reference[2 * LANES :], strict=True):
        assert_equal(ours, expected)


def test_bad_samples_are_counted_across_resumes(demo_data: Path) -> None:
    loader = Loader(tiny_config(demo_data), "train")
    loader.quarantine.total = 3
    assert loader.state_dict()["quarantined"] == 0, "bad samples of steps not yet taken do not count"
    take(loader, LANES)
    resumed = resume(tiny_config(demo_data), loader.state_dict(), {**loader.state_dict(), "quarantined": 4})
    assert resumed.quarantined == (7, 0)
    assert resume(tiny_config(demo_data), resumed.state_dict()).quarantined == (7, 0)


def test_a_failure_in_the_thread_reaches_the_step(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(tiny_config(demo_data), "train")

    def fail(*args: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(loader.samples, "micro_batch", fail)
    batches = iter(loader)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no memory"):
            next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_close_waits_for_the_thread() -> None:
    """A rollback changes the plan that the thread uses, so it must wait even for a slow read."""
    read = threading.Event()

    def slow() -> Iterator[Any]:
        read.wait()
        yield None

    ahead = Prefetcher(slow(), 1, ReadAssignment(), lambda *_: None)
    ahead.close(0.05)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    read.set()
    closing.join(10)
    assert not closing.is_alive()


def test_missing_data_is_named_as_it_was_parsed(demo_data: Path, tmp_path: Path) -> None:
    for missing in ("x.tar", "x.dataset.json"):
        config = tiny_config(demo_data, data__train_data=f"{demo_data}/train-*.tar,{tmp_path}/{missing}")
        with pytest.raises(ValueError, match=rf"{missing}.*was read as 2 entries: '.*train-\*.tar', '.*{missing}'\)$"):
            Loader(config, "train")
        with pytest.raises(ValueError, match="was read as 2 entries"):
            Loader(override(config, {"data.train_weights": ["7:3"]}), "train")


def test_globs_and_brace_lists_can_name_manifests(demo_data: Path) -> None:
    train = len(Loader(tiny_config(demo_data, data__train_data=f"{demo_data}/train.dataset.json"), "train"))
    for pattern in ("tr*.dataset.json", "{train,val}.dataset.json", "**/[tv]*.dataset.json"):
        config = tiny_config(demo_data, data__train_data=f"{demo_data}/{pattern}")
        assert len(Loader(config, "train")) == train + 24 * ("v" in pattern)
    with pytest.raises(ValueError, match="x.dataset.json: no such manifest"):
        Loader(tiny_config(demo_data, data__train_data=f"{demo_data}/{{train,x}}.dataset.json"), "train")
