"""A save holds the state of its step while training continues; a failed save affects nothing else."""

from __future__ import annotations

import collections
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.checkpoint import lock as lock_module
from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.saving import check_free_space
from genlip_megatron.checkpoint.write import PlannedWrite, Written
from genlip_megatron.config import RunConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, run_steps, tiny_config, weights


def saved_and_changed(config: RunConfig, behind: bool) -> dict[str, Any]:
    """Begin a save, change the state before it is written, finish and load it; (state before, loaded state)."""
    from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE
    from genlip_megatron.checkpoint.parts import State
    from genlip_megatron.checkpoint.saving import Facts
    from genlip_megatron.train.resume import load
    from genlip_megatron.train.setup import set_up

    write = PlannedWrite.write
    run = set_up(config)
    assert run.saver is not None and run.train_loader is not None
    optimizer = run.optimizer.chained_optimizers[0]
    tensors = {f"{i}.{name}": p for i, chunk in enumerate(run.model) for name, p in chunk.named_parameters()}
    tensors |= {f"main {i}": p for i, p in enumerate(optimizer.get_parameters())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def late(self: PlannedWrite) -> Written:
        if behind:
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor.add_(1.0)
        return write(self)

    PlannedWrite.write = late  # type: ignore[method-assign]
    try:
        common = {"data": run.train_loader.state_dict(), "consumed_samples": 3, "consumed_tokens": 4}
        common["guard"] = run.verdicts.state_dict()
        run.saver.save(1, common, DP_RESHARDABLE, Facts(run.train_loader.tokenizer.fingerprint), behind=behind)
        run.saver.finish()
    finally:
        PlannedWrite.write = write  # type: ignore[method-assign]
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    load(run)
    run.train_loader.close()
    assert (run.iteration, run.consumed_samples, run.consumed_tokens) == (1, 3, 4)
    assert State(run.model, run.optimizer, run.scheduler) == run.saver.state
    return {"equal": [name for name in before if torch.equal(before[name], tensors[name])], "all": list(before)}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_save_holds_its_step_while_training_continues(
    behind: bool, precision: str, demo_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"), train__precision=precision)
    result = run_distributed(1, saved_and_changed, config, behind)[0]
    assert result["equal"] == result["all"] and len(result["all"]) > 20


def failing_then_good(config: RunConfig, rank: int) -> list[Any]:
    """Two saves of a run; the first fails on one rank. Returns the log and the folder's content after each."""
    from genlip_megatron.train.resume import finish_saves, save
    from genlip_megatron.train.setup import set_up
    from genlip_megatron.train.step import train_step

    write, me = PlannedWrite._write_file, torch.distributed.get_rank()

    def full(self: PlannedWrite, *arguments: Any) -> Any:
        if me == rank:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    run = set_up(config)
    assert run.train_loader is not None
    batches, seen = iter(run.train_loader), []
    root = Path(config.checkpoint.save)
    for failing in (True, False):
        train_step(run, batches)
        run.iteration += 1
        PlannedWrite._write_file = full if failing else write  # type: ignore[method-assign]
        good = save(run) and finish_saves(run)
        torch.distributed.barrier()
        seen.append((good, sorted(path.name for path in root.iterdir() if "iter" in path.name)))
        torch.distributed.barrier()
    PlannedWrite._write_file = write  # type: ignore[method-assign]
    run.train_loader.close()
    return seen


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("behind", [False, True])
def test_a_full_disk_on_one_rank_fails_only_that_save_on_all_ranks(
    rank: int, behind: bool, demo_data: Path, tmp_path: Path
) -> None:
    world_size, flags = layout("DP2")
    config = tiny_config(demo_data, **flags, checkpoint__save=str(tmp_path / "run"), checkpoint__async_save=behind)
    latest = "latest_checkpointed_iteration.txt"
    for first, second in run_distributed(world_size, failing_then_good, config, rank):
        assert first == (False, [])
        assert second == (True, ["iter_0000002", latest])


def failing_behind_the_next(config: RunConfig) -> bool:
    """Whether a save succeeds after a failed one whose failure was not reported yet."""
    from genlip_megatron.train.resume import save
    from genlip_megatron.train.setup import set_up

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    run, write = set_up(config), PlannedWrite._write_file
    assert run.train_loader is not None and run.saver is not None
    run.iteration = 1
    PlannedWrite._write_file = full  # type: ignore[method-assign]
    assert save(run)
    while not run.saver.written:
        time.sleep(0.01)
    PlannedWrite._write_file = write  # type: ignore[method-assign]
    run.iteration = 2
    good = save(run, last=True)
    run.train_loader.close()
    return good


def test_a_save_succeeds_after_a_failed_one(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    assert run_distributed(1, failing_behind_the_next, config) == [True]
    assert paths.steps(tmp_path / "run") == [2]


def test_replicas_share_the_writing(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_distributed(2, run_steps, tiny_config(demo_data, checkpoint__save=str(root)), 1)
    sizes: dict[str, int] = collections.Counter()
    for name, facts in manifest.read(paths.step_folder(root, 1)).files.items():
        if name.endswith(".distcp"):
            sizes[name.split("_")[2]] += facts.size
    assert sizes.keys() == {"0", "1"} and max(sizes.values()) < 1.2 * min(sizes.values())


def test_old_checkpoints_are_pruned_and_the_best_is_kept(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root), checkpoint__keep_last=2, checkpoint__keep_best=0)
    for steps in (1, 2, 3, 4):
        run_distributed(1, run_steps, config, steps)
    # Pruning runs after the save; the next save has waited for it.
    assert paths.steps(root)[:2] == [4, 3] and len(paths.steps(root)) <= 3


def test_the_manifest_records_the_save(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    trained = run_distributed(1, run_steps, config, 1)
    found = manifest.read(paths.step_folder(root, 1))
    assert found.versions["torch"] == torch.__version__ and found.versions["megatron-core"] == "0.16.1"
    assert {"cpu", "tracker.model-parallel-rng"} <= found.random.keys()
    assert found.layout["precision"] == "fp32" and found.layout["world_size"] == 1 and found.tokenizer and found.data
    assert set(found.files) == {
        path.name for path in paths.step_folder(root, 1).iterdir() if path.name != manifest.MANIFEST
    }
    assert weights(trained)


def test_too_little_disk_space_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError, match=r"0\.00 GB free, but a checkpoint of 1000000 parameters takes 0\.02 GB. Free"):
        check_free_space(tmp_path / "new", RunConfig(), 10**6)


@pytest.mark.parametrize("last", [False, True])
def test_a_run_saved_before_its_first_update_starts_like_a_new_one(last: bool, demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    unbroken = run_distributed(1, run_steps, tiny_config(demo_data), 3)[0]
    run_distributed(1, run_steps, config, 0, last)
    assert run_distributed(1, run_steps, config, 3)[0]["losses"] == unbroken["losses"]


def second_process(config: RunConfig, root: Path) -> str:
    """The error of a run whose folder is locked by another process or not visible to rank 1."""
    from genlip_megatron.train import resume
    from genlip_megatron.train.setup import set_up

    patience, seen = resume._PATIENCE, lock_module.why_not_shared
    resume._PATIENCE = 0.5
    if torch.distributed.get_world_size() > 1 and torch.distributed.get_rank() == 1:
        lock_module.why_not_shared = lambda folder, text: seen(root, text)
    try:
        set_up(config)
    except ValueError as error:
        return str(error)
    finally:
        resume._PATIENCE, lock_module.why_not_shared = patience, seen
    return ""


def test_one_run_at_a_time_saves_to_a_folder_that_all_ranks_share(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = tiny_config(demo_data, checkpoint__save=str(root))
    lock, _ = lock_module.acquire(root)
    (error,) = run_distributed(1, second_process, config, root)
    assert f"process {os.getpid()} is saving to {root}. End it, or choose another folder" in error
    lock.close()
    assert run_distributed(1, second_process, config, root) == [""]
    (tmp_path / "other").mkdir()
    errors = run_distributed(2, second_process, config, tmp_path / "other")
    assert all("rank 1: " in error and "does not see rank 0's folder" in error for error in errors)


def with_little_memory(config: RunConfig) -> list[Any]:
    """The log of two saves for any layout on each rank; for the first, rank 1 has too little memory."""
    import psutil

    from genlip_megatron.train.resume import save
    from genlip_megatron.train.setup import set_up

    run, plenty = set_up(config), psutil.virtual_memory
    little = collections.namedtuple("memory", "available")(1000)
    run.iteration = 1
    if torch.distributed.get_rank() == 1:
        psutil.virtual_memory = lambda: little
    first = save(run, last=True)
    psutil.virtual_memory = plenty
    return [first, save(run, last=True)]


def test_too_little_memory_to_gather_is_found_before_gathering(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"))
    assert run_distributed(2, with_little_memory, config) == [[False, True]] * 2


def with_slow_pruning(config: RunConfig) -> list[Any]:
    """(number of checkpoints after three saves during a slow verification, steps after it)."""
    from genlip_megatron.checkpoint.retention import Keeper
    from genlip_megatron.train.resume import save
    from genlip_megatron.train.setup import set_up

    run, prune, entered = set_up(config), Keeper.prune, threading.Event()

    def slow(self: Keeper, *arguments: Any) -> Any:
        self.reading = True
        entered.wait(60)
        return prune(self, *arguments)

    Keeper.prune = slow  # type: ignore[method-assign]
    assert run.saver is not None
    for run.iteration in (1, 2, 3):
        assert save(run, last=True)
    Keeper.prune = prune  # type: ignore[method-assign]
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
    from genlip_megatron.train.resume import save
    from genlip_megatron.train.setup import set_up

    run = set_up(config)
    assert run.train_loader is not None
    place = paths.step_folder(config.checkpoint.save, 1)
    place.mkdir()
    (place / "thesis.txt").write_text("five years of work")
    run.iteration = 1
    good = save(run, last=True)
    run.train_loader.close()
    return good


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
