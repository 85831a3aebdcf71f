"""A save writes the state of its step, also in the background, and also if a rank has a problem."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.planner_helpers import _create_write_items

from genlip_megatron.checkpoint import manifest, parts, saving, write
from genlip_megatron.checkpoint.collectives import rank
from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE
from genlip_megatron.checkpoint.paths import NotSaved, step_folder
from genlip_megatron.config import RunConfig
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import layout, tiny_config
from genlip_megatron.train.loop import train
from genlip_megatron.train.setup import build_run


def build(config: RunConfig) -> Any:
    groups.initialize(config)
    return build_run(config)


def saver_of(run: Any, folder: Path, lines: list[str]) -> saving.Saver:
    config = tiny_config(Path("unused"), checkpoint__save=str(folder), checkpoint__keep_last=0)
    return saving.Saver(config, parts.State(run.model, run.optimizer, run.scheduler), lines.append)


def change(run: Any) -> None:
    """An update with random gradients."""
    for chunk in run.model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.normal_()
    run.optimizer.step()


def tensor_files(folder: Path, step: int) -> dict[str, manifest.FileFacts]:
    files = manifest.read(step_folder(folder, step)).files
    return {name: facts for name, facts in files.items() if name.endswith(".distcp")}


@contextlib.contextmanager
def late_copies() -> Iterator[None]:
    """Copies to host memory begin late."""
    copy = write.HostCopies.copy

    def late(*args: Any) -> None:
        time.sleep(0.3)
        copy(*args)

    with mock.patch.object(write.HostCopies, "copy", late):
        yield


def save_in_both_ways(config: RunConfig, folder: Path, kind: str) -> int:
    """Make four background saves and change the state before it is copied; repeat the last save in the foreground.

    Returns how often the background saves were planned.
    """
    run, whole = build(config), write.Planner.prepare
    behind, at_once = saver_of(run, folder / "behind", []), saver_of(run, folder / "at_once", [])
    with late_copies():
        with mock.patch.object(write.Planner, "prepare", autospec=True, side_effect=whole) as prepare:
            for step in range(1, 5):
                change(run)
                behind.save(step, {}, kind, saving.Facts(), behind=True)
                change(run)
                behind.finish()
        at_once.save(5, {}, kind, saving.Facts())
        behind.save(5, {}, kind, saving.Facts(), behind=True)
        change(run)
        behind.finish()
    behind.close()
    at_once.close()
    return prepare.call_count


@pytest.mark.parametrize("kind", [DP_RESHARDABLE, FULLY_RESHARDABLE])
@pytest.mark.parametrize("name", ["DP2", "TP2xPP2"])
@pytest.mark.slow
def test_a_background_save_writes_the_same_as_a_foreground_save(name: str, kind: str, tmp_path: Path) -> None:
    world_size, flags = layout(name)
    results = run_distributed(world_size, save_in_both_ways, tiny_config(Path("unused"), **flags), tmp_path, kind)
    assert results == [1] * world_size
    files = tensor_files(tmp_path / "behind", 5)
    assert files == tensor_files(tmp_path / "at_once", 5)
    assert files != tensor_files(tmp_path / "behind", 4)


def train_and_save(config: RunConfig) -> int:
    with late_copies():
        return train(config)


OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
DRILL = {"faults__allow_fault_injection": True, "faults__check_replicas_interval": 0}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("DP2", {"train__precision": "bf16", **OVERLAP}),
        ("1", {**DRILL, "faults__inject_fault": ("nan-loss@3:0", "flip@3:0")}),
        ("DP2", {"parallel__fsdp": True}),
    ],
    ids=["overlap", "no update", "fsdp"],
)
@pytest.mark.slow
def test_training_does_not_change_the_saved_state(
    name: str, flags: dict[str, Any], demo_data: Path, tmp_path: Path
) -> None:
    """Step 3 reaches its update, or skips it after a fault, before the copy of step 2 is done."""
    world_size, sizes = layout(name)
    files = []
    for behind in (True, False):
        folder = tmp_path / str(behind)
        common = {"train__train_iters": 3, "checkpoint__save_interval": 2, "checkpoint__async_save": behind}
        config = tiny_config(demo_data, **common, **sizes, **flags, checkpoint__save=str(folder))
        run_distributed(world_size, train_and_save, config)
        files.append(tensor_files(folder, 2))
    assert files[0] == files[1]


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("can't start new thread")


def test_without_a_thread_training_waits_for_the_disk(tmp_path: Path) -> None:
    (line,) = run_distributed(1, save_without_a_thread, tiny_config(Path("unused")), tmp_path)
    assert "WARNING: rank 0: training waited for the disk (RuntimeError: can't start new thread)" in line


def save_without_a_thread(config: RunConfig, folder: Path) -> str:
    run, lines = build(config), list[str]()
    saver = saver_of(run, folder, lines)
    with mock.patch.object(saving, "WriteBehind", raising):
        saver.save(1, {}, DP_RESHARDABLE, saving.Facts(), behind=True)
    change(run)
    saver.finish()
    saver.close()
    return lines[-1]


def test_a_writer_that_fails_does_not_block_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "balanced", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    behind = write.WriteBehind(write.HostCopies(), write.PlannedWrite(tmp_path, [], None))
    behind.wait_for_copy()
    assert "can't start new thread" in behind.result.result().error


def save_with_another_tensor(config: RunConfig, folder: Path) -> None:
    """Two saves: one with a new tensor, one whose old plan would leave it out."""
    run, whole = build(config), parts.weights_of
    saver = saver_of(run, folder, [])
    new = ShardedTensor.from_rank_offsets("new", torch.arange(4.0), replica_id=rank())
    saver.save(1, {}, DP_RESHARDABLE, saving.Facts(), behind=True)
    with mock.patch.object(parts, "weights_of", lambda model: whole(model) | {"new": {"new": new}}):
        saver.save(2, {}, DP_RESHARDABLE, saving.Facts(), behind=True)
    saver.finish()
    saver.close()
    with pytest.raises(AssertionError, match="not of this state"):  # the safeguard if ranks disagree on the plan
        saver._planners[DP_RESHARDABLE].plan({"random": {}}, folder)


def test_a_new_tensor_is_planned_and_written(tmp_path: Path) -> None:
    run_distributed(2, save_with_another_tensor, tiny_config(Path("unused")), tmp_path)
    sizes = [sum(facts.size for facts in tensor_files(tmp_path, step).values()) for step in (1, 2)]
    assert sizes[1] > sizes[0]


def save_with_trouble_on_one_rank(config: RunConfig, folder: Path) -> list[str]:
    """Errors of this rank and warnings: rank 1 fails to save, then has no memory for copies."""
    run, lines = build(config), list[str]()
    saver = saver_of(run, folder, lines)
    states, copy = parts.random_states, write.HostCopies.copy
    failing = mock.Mock(side_effect=MemoryError("no memory left"))
    with (
        mock.patch.object(parts, "random_states", failing if rank() else states),
        pytest.raises(NotSaved) as error,
    ):
        saver.save(1, {}, DP_RESHARDABLE, saving.Facts(), behind=True)
    with mock.patch.object(write.HostCopies, "copy", failing if rank() else copy):
        saver.save(2, {}, DP_RESHARDABLE, saving.Facts(), behind=True)
        change(run)
    saver.finish()
    saver.close()
    return [str(error.value), *(line for line in lines if "WARNING" in line)]


def test_an_error_on_one_rank_reaches_all(tmp_path: Path) -> None:
    first, second = run_distributed(2, save_with_trouble_on_one_rank, tiny_config(Path("unused")), tmp_path)
    for errors in (first, second):
        assert "the checkpoint of step 1 could not be written" in errors[0]
        assert "rank 1: MemoryError: no memory left" in errors[0]
    assert "rank 1: no copy in host memory, so training waited for the disk (no memory left)" in first[1]
    assert [path.name for path in sorted(tmp_path.glob("*iter_*"))] == ["iter_0000002"]


def test_a_full_disk_is_named_although_torch_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(3_000_000)

    def put(self: Any, view: memoryview) -> None:
        if len(view) == tensor.nbytes:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.HashingFile, "_put", put)
    items = [(item, tensor) for item in _create_write_items("weight", tensor)]
    assert write.PlannedWrite(tmp_path, items, None).write().error == "OSError: [Errno 28] No space left on device"


def test_a_file_written_in_pieces_of_any_size_is_complete(tmp_path: Path) -> None:
    pieces = [bytes([size % 251]) * size for size in (1, 700_000, 700_000, 0, 3_000_000, 5, 2**20, 1)]
    with write.HashingFile(tmp_path / "file") as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
            file.flush()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.tell() == file.size == sum(map(len, pieces))
    assert file.facts == manifest.facts_of(tmp_path / "file")
