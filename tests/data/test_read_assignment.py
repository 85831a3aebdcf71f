"""Shared reading: each byte is read by one rank, all ranks get the same micro-batch and know the bad samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig
from genlip_megatron.data.index import load_index
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.quarantine import BadShare, DataFailure, Quarantine
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.test_loader import assert_equal

ROOT = Path(__file__).parent.parent.parent
TP2 = {"parallel__tensor_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2 without sequence parallelism": (2, {**TP2, "parallel__sequence_parallel": False}),
    "PP2": (2, {"parallel__pipeline_model_parallel_size": 2}),
    "PP3": (3, {"parallel__pipeline_model_parallel_size": 3}),
    "TP2xPP2": (4, {**TP2, "parallel__pipeline_model_parallel_size": 2}),
    "TP2xDP2": (4, TP2),
}


def first_steps(loader: Loader) -> list[PackedBatch]:
    """The loader's micro-batches of three steps, without prefetching."""
    steps = range(1, 4)
    return [loader.assemble([loader.plan.next_pack(lane)], step) for step in steps for lane in loader.lanes]


def loaded(config: RunConfig) -> dict[str, Any]:
    """This rank's first steps and the bytes read for them."""
    from megatron.core import parallel_state

    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import read_assignment

    groups.initialize(config)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = read_assignment(config)
    loader = Loader(config, "train", rank, size, share)
    batches = first_steps(loader)
    loader.close()
    return {
        "batches": batches,
        "bytes": loader.samples.bytes_read,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "data_parallel": (rank, size),
        "slots": share.slots(config.data.seq_length),
        "bad": (loader.quarantine.total, [(bad.shard, bad.key) for bad in loader.quarantine.records]),
    }


def of_rank(batches: list[PackedBatch], rank: int, size: int) -> list[PackedBatch]:
    """A data-parallel rank's part of the micro-batches of a single rank with all four lanes."""
    return [batch for i, batch in enumerate(batches) if i % 4 // (4 // size) == rank]


def reference(config: RunConfig) -> tuple[list[PackedBatch], Loader]:
    """The first steps of a single rank."""
    loader = Loader(config, "train")
    return first_steps(loader), loader


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_same_batch_and_reads_its_part(layout: str, demo_data: Path) -> None:
    expected, loader = reference(tiny_config(demo_data))
    world_size, flags = LAYOUTS[layout]
    results = run_distributed(world_size, loaded, tiny_config(demo_data, **flags))
    last = max(result["stage"] for result in results)
    for result in results:
        for ours, theirs in zip(result["batches"], of_rank(expected, *result["data_parallel"]), strict=True):
            between = 0 < result["stage"] < last
            # A stage that does not read data opens no index, so it has no keys.
            assert_equal(ours, theirs, but=("patches", "first_patch", *(["keys"] if between else [])))
            if result["stage"]:
                assert ours.patches is None
                continue
            assert ours.patches is not None and theirs.patches is not None
            first, rows = ours.first_patch, len(ours.patches)
            assert torch.equal(ours.patches, theirs.patches[first : first + rows])
            before, behind = (int(theirs.is_image[:slot].sum()) for slot in result["slots"])
            if result["slots"][1]:
                assert first <= before and first + rows >= behind
        if result["stage"]:
            assert result["bytes"]["image"] == 0
        if result["stage"] != last:
            assert result["bytes"]["caption"] == 0
    images, captions = (sum(result["bytes"][kind] for result in results) for kind in ("image", "caption"))
    assert captions == loader.samples.bytes_read["caption"]
    if layout in ("TP2", "TP2xPP2", "TP2xDP2"):
        # Images on the border of two parts are read by both ranks: at most one of about ten per pack.
        assert images <= 1.15 * loader.samples.bytes_read["image"]
        shares = [result["bytes"]["image"] for result in results if not result["stage"]]
        assert max(shares) < 0.8 * loader.samples.bytes_read["image"]
    else:
        assert images == loader.samples.bytes_read["image"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_context_parallel_ranks_get_the_patches_of_their_slots(count: int, demo_data: Path) -> None:
    config = tiny_config(demo_data)
    expected, loader = reference(config)
    read = []
    for index in range(count):
        share = ReadAssignment(index=index, count=count)
        ours = Loader(config, "train", share=share)
        for i, theirs in enumerate(expected[:4]):
            batch = ours.assemble([ours.plan.next_pack(i)], 1)
            first, last = share.slots(config.data.seq_length)
            rows = slice(int(theirs.is_image[:first].sum()), int(theirs.is_image[:last].sum()))
            assert batch.patches is not None and theirs.patches is not None
            mine = batch.patches[rows.start - batch.first_patch : rows.stop - batch.first_patch]
            assert torch.equal(mine, theirs.patches[rows])
        read.append(ours.samples.bytes_read["image"])
    assert max(read) < loader.samples.bytes_read["image"] / 3 * (2 / count + 0.35)


@pytest.fixture(scope="module")
def damaged(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The demo's data with a flipped bit in some images and captions; their keys."""
    folder = tmp_path_factory.mktemp("damaged")
    for file in demo_data.iterdir():
        shutil.copy2(file, folder / file.name)
    shard = folder / "train-00000.tar"
    fingerprint = load_tokenizer(folder / "tokenizer.model").fingerprint
    index = load_index(str(shard), fingerprint, tiny_config(folder).data.prompt)
    chosen = range(3, 160, 7)
    with open(shard, "r+b") as file:
        for number in chosen:
            kind = "image" if number % 2 else "caption"
            place = int(index.rows[number][f"{kind}_offset"]) + int(index.rows[number][f"{kind}_size"]) // 2
            file.seek(place)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    return folder, {index.keys[number] for number in chosen}


@pytest.mark.parametrize("layout", ["TP2", "PP3", "TP2xPP2"])
def test_a_bad_sample_is_masked_on_all_ranks_and_recorded_once(
    layout: str, damaged: tuple[Path, set[str]], demo_data: Path
) -> None:
    folder, bad = damaged
    good, _ = reference(tiny_config(demo_data))
    expected, loader = reference(tiny_config(folder))
    world_size, flags = LAYOUTS[layout]
    results = run_distributed(world_size, loaded, tiny_config(folder, **flags))
    met = [key for batch in good for key in batch.keys if key in bad]
    assert met and loader.quarantine.total == len(met)
    for result in results:
        assert result["bad"][0] == len(met)
        for ours, theirs, whole in zip(result["batches"], expected, good, strict=True):
            assert_equal(ours, theirs, but=("patches", "first_patch", "keys"))
            # Everything but the loss of the bad samples is unchanged.
            same = ("patches", "first_patch", "token_ids", "labels", "loss_weights", "loss_rows", "keys")
            assert_equal(ours, whole, but=same)
            masked = {whole.keys[n] for n in ours.sample_ids[ours.loss_rows[ours.loss_weights > 0]].unique().tolist()}
            assert masked == set(whole.keys) - bad
    shard = str(folder / "train-00000.tar")
    assert sorted(bad for result in results for bad in result["bad"][1]) == [(shard, key) for key in sorted(met)]


def test_training_continues_past_bad_samples_and_counts_them(damaged: tuple[Path, set[str]], tmp_path: Path) -> None:
    config = tiny_config(
        damaged[0],
        checkpoint__save=str(tmp_path),
        log__log_interval=1,
        train__train_iters=3,
        parallel__pipeline_model_parallel_size=2,
    )
    run_distributed(2, trained, config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    counts = [event.value for event in events.Scalars("quarantined-samples")]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(counts) == 3 and counts == sorted(counts) and counts[0] > 0 and counts[-1] <= len(lines)
    for line in lines:
        assert '"shard": ' in line and '"key": ' in line and "bytes changed since the index was made" in line


def trained(config: RunConfig) -> int:
    from genlip_megatron.train.loop import train

    return train(config)


def test_ranks_agree_on_an_empty_micro_batch(demo_data: Path) -> None:
    """A small validation set ends before the last step; without sequence parallelism patches are sent."""
    flags = LAYOUTS["TP2 without sequence parallelism"][1]
    config = tiny_config(demo_data, **flags, log__eval_iters=20)
    single = [batch.keys for batch in Loader(tiny_config(demo_data, log__eval_iters=20), "valid")]
    assert not single[-1] and run_distributed(2, validated, config) == [single, single]


def validated(config: RunConfig) -> list[tuple[str, ...]]:
    """The keys of this rank's validation samples per micro-batch."""
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import read_assignment

    groups.initialize(config)
    loader = Loader(config, "valid", share=read_assignment(config))
    names = [batch.keys for batch in loader]
    loader.close()
    return names


@pytest.mark.slow
def test_too_many_bad_samples_in_a_row_end_the_run(demo_data: Path, tmp_path: Path) -> None:
    """The last pipeline stage would wait forever for the first; torchrun must end it when the first leaves."""
    for file in demo_data.iterdir():
        shutil.copy2(file, tmp_path / file.name)
    shard = tmp_path / "train-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))  # the manifest and the index are still there
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_genlip.py",
        "--config", "demo", "--pp", "2", "--tokenizer", str(tmp_path / "tokenizer.model"), "--valid-data", "",
        "--train-data", str(tmp_path / "train.dataset.json"), "--max-consecutive-failures", "20",
        "--max-bad-share", "1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode
    assert "error: 20 samples in a row could not be used; the last one: " in done.stderr
    assert "Check the storage and the index, or raise data.max_consecutive_failures" in done.stderr
    assert "exitcode  : 18" in done.stderr


def test_good_samples_reset_the_count_of_consecutive_bad_ones(tmp_path: Path) -> None:
    quarantine = Quarantine(max_consecutive=3)
    quarantine.count([False, False, True, False, False])
    quarantine.count([True, False, False])
    assert quarantine.total == 6
    with pytest.raises(DataFailure, match="3 samples in a row"):
        quarantine.count([False])
    Quarantine(max_consecutive=0).count([False] * 1000)


def test_the_fraction_of_bad_samples_counts_the_last_samples_and_at_least_a_thousand() -> None:
    few = BadShare(0.01)
    few.add(20, 10)
    with pytest.raises(DataFailure, match="11 of the last 21 samples .* data.max_bad_share = 0.01 allows"):
        few.add(1, 1)
    long = BadShare(0.01)
    for _ in range(1000):
        long.add(10_000, 90)
    with pytest.raises(DataFailure):  # a fault that begins late is found within a window
        for _ in range(20):
            long.add(10_000, 400)
    rolled_back = BadShare(0.01)
    rolled_back.add(100, -50)
    rolled_back.add(100, 10)
    BadShare(1.0).add(10_000, 10_000)
    BadShare(0.0).add(10_000, 0)
    with pytest.raises(DataFailure, match="1 of the last 10,000"):
        BadShare(0.0).add(10_000, 1)


def test_slots_cover_a_sequence_exactly_once() -> None:
    for count in range(1, 9):
        spans = [ReadAssignment(index=i, count=count).slots(100) for i in range(count)]
        assert [slot for first, last in spans for slot in range(first, last)] == list(range(100))
