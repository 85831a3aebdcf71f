"""A crash at any moment of a save leaves a complete checkpoint, from which the run resumes bit for bit.

A run with a good checkpoint of step 2 is killed at every file operation of its save at step 4. Afterwards loading
always finds a complete checkpoint of step 2 or 4, and a restarted run ends with the same bits as one that was never
killed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint import paths as checkpoints
from genlip_megatron.faults.exits import EXIT_NOT_SAVED
from genlip_megatron.testing.processes import Ended, Job, Zygote
from tests import crash
from tests.fault_table import FaultRow
from tests.reliability.training import Training, all_of

pytestmark = pytest.mark.faults

LAST = 6
# Few tensors, so few writes. A save at step 4 also deletes the checkpoint of step 2.
TINY = {
    "model__num_layers": 1,
    "model__text_hidden_size": 32,
    "checkpoint__keep_last": 1,
    "checkpoint__fully_reshardable_every": 0,
}
# Command lines that make the save at step 4 the last one, which training waits for, or a background save.
SAVES = {"last": ("--exit-interval", "4"), "behind": ()}
# These depend on the folder or the time of saving.
VARYING = ("config.yaml", ".metadata", "manifest.json")


def contents(folder: Path) -> dict[str, str]:
    """The contents of a checkpoint's files by name, without those that differ between two saves of a step."""
    return {
        str(path.relative_to(folder)): "empty"
        if not path.stat().st_size
        else "written"
        if path.name in VARYING
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Scene:
    """An undisturbed run, and the state from which killed runs start."""

    def __init__(self, zygote: Zygote, data: Path, folder: Path, world_size: int) -> None:
        self.whole = Training(zygote, data, folder / "whole", world_size, TINY)
        self.start = Training(zygote, data, folder / "start", world_size, TINY)
        assert all(ended.code == 0 for ended in self.whole.go())
        assert all(ended.code == 0 for ended in self.start.go("--exit-interval", "2"))
        self.history = self.whole.history()
        self.folder = folder
        # Computed once for each rank and kind of save.
        self.operations = functools.cache(self._operations)
        self.whole_checkpoint = functools.cache(self._whole_checkpoint)

    def _operations(self, rank: int, save: str) -> list[crash.Operation]:
        """The file operations of a rank, from the start at step 2 to the end of the save at step 4. They must explain
        all files on the disk."""
        training = self.start.copy(self.folder / f"counted-{save}-{rank}")
        before = set(contents(training.run))
        assert all(ended.code == 0 for ended in training.go(*SAVES[save], plan={"rank": rank}))
        operations = training.plan(rank=rank).operations()
        if self.start.world_size == 1:
            unseen = crash.unseen_files(training.run, operations)
            assert set(unseen) <= before, f"writes that the hooks missed: {unseen}"
        next_save = [n for n, done in enumerate(operations) if f"iter_{LAST:07d}" in done.path]
        return operations[: next_save[0] if next_save else None]

    def _whole_checkpoint(self, step: int, save: str) -> dict[str, str]:
        """The contents of a step's checkpoint after a run that starts from step 2 and deletes nothing."""
        if step == 2:
            return contents(checkpoints.step_folder(self.start.run, 2))
        # Not from the undisturbed run, because pickles of loaded values have other bytes.
        training = self.start.copy(self.folder / f"complete-{save}")
        assert all(ended.code == 0 for ended in training.go(*SAVES[save], checkpoint__keep_last=0))
        return contents(checkpoints.step_folder(training.run, 4))

    def fault_of(self, run: Path, save: str) -> str | None:
        """The problem of a folder of checkpoints, or None. Its newest must be complete and of step 2 or 4."""
        said: list[str] = []
        try:
            found = loading.find(run, True, said.append)
        except ValueError as error:
            return f"no checkpoint is good: {error}"
        if found is None:
            return "no checkpoint is found"
        if damaged := [text for text in said if "damaged" in text]:
            return f"a checkpoint appeared before it was whole: {damaged}"
        folder, step = found[0], found[1].iteration
        if step not in (2, 4):
            return f"step {step} is found"
        held, expected = contents(folder), self.whole_checkpoint(step, save)
        differing = sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))
        return f"the checkpoint of step {step} is not whole: {differing}" if differing else None

    def fault_of_resuming(self, training: Training) -> str | None:
        """The problem of a restarted run, or None."""
        ended = training.go()
        if any(one.code for one in ended):
            return f"the restart ended with {[one.code for one in ended]}: {ended[0].output[-1500:]}"
        try:
            history = training.history()
        except AssertionError as error:
            return str(error)
        differing = sorted(step for step in self.history if history.get(step) != self.history[step])
        if differing:
            return f"steps {differing} (rank, step) differ from the undisturbed run's"
        left = sorted(path.name for path in training.run.iterdir() if path.name.startswith("."))
        return f"{left} is left over" if left else None


def outcome(run: Path, closely: bool) -> tuple[Any, ...]:
    """A hashable summary of the remains of a killed save, so that equal remains are tried once: checkpoints and their
    files, the pointer, and whether something is unfinished (with ``closely``, also its progress)."""
    names = {str(path.relative_to(run)): path.stat().st_size for path in run.rglob("*") if path.is_file()}
    unfinished = {name: size for name, size in names.items() if name.startswith(".")}
    state = "empty" if not unfinished else "unfinished"
    return (
        (run / checkpoints.LATEST).read_text(),
        tuple(sorted(names.keys() - unfinished.keys())),
        tuple(sorted((name, size > 0) for name, size in unfinished.items())) if closely else state,
        tuple(sorted(path.name for path in run.iterdir())),
    )


def deletes(operation: crash.Operation) -> bool:
    """Whether the operation belongs to the deletion of checkpoint 2, after checkpoint 4 is complete."""
    return "iter_0000002" in operation.path


def kill_at(scene: Scene, tmp_path: Path, action: str, rank: int, closely: bool, save: str) -> tuple[int, int]:
    """Kill a save at each of its operations, and start again once for each state found; (operations, states).

    Raises:
        AssertionError: naming the operations at which the promise broke.
    """
    operations = scene.operations(rank, save)
    numbers = list(range(1, len(operations) + 1))
    runs: dict[int, Training] = {}
    seen: dict[tuple[Any, ...], int] = {}
    faults: list[str] = []

    def start(number: int) -> Job:
        runs[number] = scene.start.copy(tmp_path / str(number))
        return runs[number].start(*SAVES[save], plan={"action": action, "at": number, "rank": rank})

    for number, ended in all_of(numbers, start):
        training = runs[number]
        fault = None
        if ended[rank].code != -signal.SIGKILL:
            fault = f"the run ends with {ended[rank].code} instead of being killed: {ended[rank].output[-1500:]}"
        fault = fault or scene.fault_of(training.run, save)
        state = outcome(training.run, closely)
        if fault is None and state not in seen:
            seen[state] = number
            fault = scene.fault_of_resuming(training)
        if fault:
            # As recorded by the killed run, because the order of parallel writers varies.
            done = training.plan().operations()
            place = f"after {done[-1] if done else 'the start'}" if action == "kill" else f"in {operations[number - 1]}"
            faults.append(f"rank {rank} killed {place} (operation {number}): {fault}")
    assert not faults, "\n".join(faults)
    return len(numbers), len(seen)


@pytest.fixture(scope="module")
def scene_of(zygote: Zygote, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Scene]:
    """Runs of a number of data-parallel processes."""
    return functools.cache(lambda size: Scene(zygote, demo_data, tmp_path_factory.mktemp(f"ranks{size}"), size))


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    ("world_size", "rank", "action", "closely"),
    [
        (1, 0, "kill", False),
        *(
            pytest.param(size, rank, action, True, marks=pytest.mark.long)
            for size, rank in ((1, 0), (2, 0), (2, 1))
            for action in ("kill", "tear")
        ),
    ],
)
def test_killed_at_each_operation(
    world_size: int,
    rank: int,
    action: str,
    closely: bool,
    save: str,
    scene_of: Callable[[int], Scene],
    tmp_path: Path,
    fault_row: FaultRow,
) -> None:
    """Without ``closely``, restart only from states of the disk that differ in more than an unfinished folder."""
    tried, states = kill_at(scene_of(world_size), tmp_path, action, rank, closely, save)
    if closely:
        fault_row(
            "SIGKILL " + ("right after" if action == "kill" else "in the middle of") + " a file operation",
            f"{'asynchronous' if save == 'behind' else 'last, synchronous'} save, rank {rank} of {world_size}",
            f"newest checkpoint complete; run continues bit for bit from each of {states} states of the disk",
            count=tried,
        )


NOT_SAVED = "WARNING: NOT SAVED: the checkpoint of step 4 could not be written to "
NOT_POINTED = f"WARNING: the checkpoint is complete, but {checkpoints.LATEST} may name an older one: "
NOT_DELETED = "WARNING: old checkpoints in "


def said_of(operations: list[crash.Operation], number: int) -> str:
    """The line that a run must print if an operation of its save at step 4 fails."""
    if deletes(operations[number - 1]):
        return NOT_DELETED
    return NOT_POINTED if any(o.target == "iter_0000004" for o in operations[: number - 1]) else NOT_SAVED


def begins(operations: list[crash.Operation]) -> int:
    """The number of the first operation of the save at step 4."""
    return next(n for n, operation in enumerate(operations, 1) if ".iter_0000004.partial" in operation.path)


def fault_of_failed_save(training: Training, ended: list[Ended], error: str, expected: str, last: int) -> str | None:
    """The problem of a run that continued after a failed operation of its save at step 4, or None.

    Args:
        expected: a line that it must print, followed by the reason.
        last: the step of its newest checkpoint.
    """
    output = ended[0].output
    if ended[0].code != (0 if last == LAST else EXIT_NOT_SAVED):
        return f"the run ends with {ended[0].code}: {output[-1500:]}"
    if not any(expected in line and os.strerror(getattr(errno, error)) in line for line in output.splitlines()):
        return f"the output lacks {expected!r} with a reason: {output[-1500:]}"
    left = sorted(path.name for path in training.run.iterdir() if path.name.startswith("."))
    if last == LAST and left:
        return f"{left} is left over"
    said: list[str] = []
    found = loading.find(training.run, True, said.append)
    if found is None or found[1].iteration != last or (last == LAST and checkpoints.steps(training.run) != [LAST]):
        return f"the checkpoint of step {last} is not the newest, or others are left: {sorted(training.run.iterdir())}"
    return f"the checkpoints are wrong: {said}" if said and last == LAST else None


# Outcomes by the printed line and whether the run can save again.
OUTCOMES = {
    (NOT_SAVED, True): "save fails with a warning, leaves no files, training continues, next save succeeds",
    (NOT_SAVED, False): f"nothing to remove, so it stays full: each save warns, training continues, status "
    f"{EXIT_NOT_SAVED}, newest checkpoint good",
    (NOT_POINTED, True): "saved, with a warning that the pointer is old; the next save replaces the pointer",
    (NOT_DELETED, True): "saved, with a warning that an old checkpoint is left; the next save deletes it",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        pytest.param("ENOSPC", True, id="full"),
        pytest.param("ENOSPC", False, id="full for a moment", marks=pytest.mark.long),
        pytest.param("EIO", False, id="one failed operation", marks=pytest.mark.long),
    ],
)
def test_a_failing_disk_loses_only_one_checkpoint(
    scene_of: Callable[[int], Scene], tmp_path: Path, error: str, lasting: bool, fault_row: FaultRow
) -> None:
    """The save fails and says why, its files are removed, training continues, and the next save succeeds."""
    scene = scene_of(1)
    operations = scene.operations(0, "behind")
    first = begins(operations)
    numbers = [n for n, o in enumerate(operations, 1) if n >= first and crash.can_fail(error, o.kind)]
    faults = []
    tried: Counter[str] = Counter()

    def start(number: int) -> Job:
        plan = {"action": "fail", "at": number, "error": error, "lasting": lasting}
        return scene.start.copy(tmp_path / str(number)).start(plan=plan)

    for number, ended in all_of(numbers, start):
        training = Training(scene.start.zygote, scene.start.data, tmp_path / str(number), 1, TINY)
        expected = said_of(operations, number)
        # Only files of the failed save can be removed, and checkpoint 2 once checkpoint 4 is complete.
        last = 2 if lasting and number == first else LAST
        fault = fault_of_failed_save(training, ended, error, expected, last)
        history = training.history()
        if not fault and any(history.get(step) != values for step, values in scene.history.items()):
            fault = "training did not continue like the undisturbed run"
        if fault:
            faults.append(f"{error} at operation {number}, {operations[number - 1]}: {fault}")
        tried[OUTCOMES[expected, last == LAST]] += 1
    assert not faults, "\n".join(faults)
    what = f"{error} {'until something is removed' if lasting else 'once'}"
    for outcome_of_it, count in tried.items():
        fault_row(what, "each file operation of an asynchronous save", outcome_of_it, count=count)


def test_kinds_of_operations_of_a_save(scene_of: Callable[[int], Scene]) -> None:
    """Crash points cover a save: it creates, writes, syncs, and renames last."""
    operations = scene_of(1).operations(0, "last")
    operations = [operation for operation in operations[begins(operations) - 1 :] if not deletes(operation)]
    assert operations[0] == crash.Operation("mkdir", ".iter_0000004.partial")
    assert [str(operation) for operation in operations if operation.kind == "rename"] == [
        "rename .iter_0000004.partial/.metadata.tmp to .iter_0000004.partial/.metadata",
        "rename .iter_0000004.partial to iter_0000004",
        f"rename .{checkpoints.LATEST}.partial to {checkpoints.LATEST}",
    ]
    writing = [o for o in operations if o.path.startswith(".iter_0000004.partial/")]
    kinds = Counter(operation.kind for operation in writing)
    # Six files and the manifest.
    assert kinds["create"] == kinds["sync"] == kinds["close"] == 7 and kinds["write"] >= 7
