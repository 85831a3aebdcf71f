"""A failed save affects nothing else, one run saves to a folder, and old checkpoints are pruned."""

from __future__ import annotations

import collections
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from genlip_megatron.checkpoint import lock as lock_module
from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.retention import Keeper
from genlip_megatron.checkpoint.saving import check_free_space
from genlip_megatron.checkpoint.write import PlannedWrite
from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import failing_set_up, run_steps, tiny_config
from genlip_megatron.train import resume
from genlip_megatron.train.resume import finish_saves, save
from genlip_megatron.train.setup import set_up


def failing_then_good(config: RunConfig, rank: int, report: bool) -> tuple[list[bool], list[str]]:
    """(results of two saves, names of their files): the first finds a full disk on one rank.

    Args:
        report: complete the first save before the second begins.
    """

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    run, root = set_up(config), Path(config.checkpoint.save)
    assert run.saver is not None
    write = full if torch.distributed.get_rank() == rank else PlannedWrite._write_file
    run.iteration = 1
    with mock.patch.object(PlannedWrite, "_write_file", write):
        first = save(run)
        while not run.saver.written:
            time.sleep(0.01)
    if report:
        first = finish_saves(run) and first
        torch.distributed.barrier()
        assert not list(root.glob("*iter*"))
        torch.distributed.barrier()
    run.iteration = 2
    return [first, save(run, last=True)], sorted(path.name for path in root.glob("*iter*"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("behind", "report"), [(False, True), (True, True), (True, False)])
@pytest.mark.slow
def test_a_full_disk_on_one_rank_fails_only_that_save_on_all_ranks(
    rank: int, behind: bool, report: bool, demo_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"), checkpoint__async_save=behind)
    for results, names in run_distributed(2, failing_then_good, config, rank, report):
        assert results == [not report, True]  # a background save fails when it is completed
        assert names == ["iter_0000002", "latest_checkpointed_iteration.txt"]


def test_replicas_share_the_writing(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_distributed(2, run_steps, tiny_config(demo_data, checkpoint__save=str(root)), 1)
    sizes: dict[str, int] = collections.Counter()
    for name, facts in manifest.read(paths.step_folder(root, 1)).files.items():
        if name.endswith(".distcp"):
            sizes[name.split("_")[2]] += facts.size
    assert sizes.keys() == {"0", "1"} and max(sizes.values()) < 1.2 * min(sizes.values())


def test_the_manifest_records_the_save(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    run_distributed(1, run_steps, config, 1)
    found = manifest.read(paths.step_folder(root, 1))
    assert found.versions["torch"] == torch.__version__ and found.versions["megatron-core"] == "0.16.1"
    assert {"cpu", "tracker.model-parallel-rng"} <= found.random.keys()
    assert found.layout["precision"] == "fp32" and found.layout["world_size"] == 1 and found.tokenizer and found.data
    assert set(found.files) == {
        path.name for path in paths.step_folder(root, 1).iterdir() if path.name != manifest.MANIFEST
    }


def test_too_little_disk_space_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=10**6))
    with pytest.raises(ValueError, match=r"0\.00 GB free, but a checkpoint of 1000000 parameters takes 0\.02 GB. Free"):
        check_free_space(tmp_path / "new", RunConfig(), 10**6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.slow
def test_a_run_saved_before_its_first_update_starts_like_a_new_one(last: bool, demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    unbroken = run_distributed(1, run_steps, tiny_config(demo_data), 3)[0]
    run_distributed(1, run_steps, config, 0, last)
    assert run_distributed(1, run_steps, config, 3)[0]["losses"] == unbroken["losses"]


def second_process(config: RunConfig, root: Path) -> str:
    """The error of a run whose folder is locked by another process or not visible to rank 1."""
    seen = lock_module.why_not_shared
    there = root if torch.distributed.get_rank() == 1 else config.checkpoint.save
    with (
        mock.patch.object(resume, "_PATIENCE", 0.5),
        mock.patch.object(lock_module, "why_not_shared", lambda folder, text: seen(there, text)),
    ):
        return failing_set_up(config)


def test_one_run_at_a_time_saves_to_a_folder_that_all_ranks_share(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    lock, _ = lock_module.acquire(root)
    (error,) = run_distributed(1, second_process, config, root)
    assert f"process {os.getpid()} is saving to {root}. End it, or choose another folder" in error
    lock.close()
    assert run_distributed(1, second_process, config, root) == ["no error"]
    (tmp_path / "other").mkdir()
    errors = run_distributed(2, second_process, config, tmp_path / "other")
    assert all("rank 1: " in error and "does not see rank 0's folder" in error for error in errors)


def with_little_memory(config: RunConfig) -> list[bool]:
    """The log of two saves for any layout on each rank; for the first, rank 1 has too little memory."""
    run, plenty = set_up(config), psutil.virtual_memory
    little = mock.Mock(return_value=mock.Mock(available=1000))
    run.iteration = 1
    with mock.patch.object(psutil, "virtual_memory", little if torch.distributed.get_rank() == 1 else plenty):
        first = save(run, last=True)
    return [first, save(run, last=True)]


def test_too_little_memory_to_gather_is_found_before_gathering(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    assert run_distributed(2, with_little_memory, config) == [[False, True]] * 2


def with_slow_pruning(config: RunConfig) -> list[Any]:
    """(number of checkpoints after three saves during a slow verification, steps after it)."""
    run, prune, entered = set_up(config), Keeper.prune, threading.Event()

    def slow(self: Keeper, *arguments: Any) -> Any:
        self.reading = True
        entered.wait(60)
        return prune(self, *arguments)

    assert run.saver is not None
    with mock.patch.object(Keeper, "prune", slow):
        for run.iteration in (1, 2, 3):
            assert save(run, last=True)
    before = len(paths.steps(config.checkpoint.save))
    entered.set()
    run.saver.settle()
    run.iteration = 4
    assert save(run, last=True)
    run.saver.settle()
    return [before, paths.steps(config.checkpoint.save)]


def test_no_save_waits_for_the_verification_of_old_checkpoints(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"), checkpoint__keep_last=1)
    assert run_distributed(1, with_slow_pruning, config) == [[3, [4]]]


def onto_another_folder(config: RunConfig) -> bool:
    """Save a step whose folder name was created by something else during the run."""
    run = set_up(config)
    place = paths.step_folder(config.checkpoint.save, 1)
    place.mkdir()
    (place / "thesis.txt").write_text("five years of work")
    run.iteration = 1
    return save(run, last=True)


def test_a_folder_in_the_place_of_a_checkpoint_is_set_aside(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    assert run_distributed(1, onto_another_folder, config) == [True]
    assert (root / paths.SET_ASIDE / "iter_0000001" / "thesis.txt").read_text() == "five years of work"
    assert manifest.read(paths.step_folder(root, 1)).iteration == 1


def test_a_lock_file_of_another_program_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / lock_module.LOCK).write_text("a list of our locks\n")
    with pytest.raises(paths.NotSaved, match=r"run\.lock was not written by a run"):
        lock_module.acquire(tmp_path)
    assert (tmp_path / lock_module.LOCK).read_text() == "a list of our locks\n"
    for content in ("", "host process 12 0123456789abcdef\n", "\0\0"):
        (tmp_path / lock_module.LOCK).write_text(content)
        lock_module.acquire(tmp_path)[0].close()
