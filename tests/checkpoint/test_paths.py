"""Checkpoints appear complete; the remains of crashed saves are not checkpoints; setting aside deletes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron import atomic_write
from genlip_megatron.checkpoint import paths


def publish(root: Path, step: int, content: str = "x") -> Path:
    partial = paths.partial_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "file").write_text(content)
    target = paths.publish(root, step)
    paths.confirm(root, step)
    return target


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())


def test_a_published_checkpoint_is_the_newest_and_pointed_to(tmp_path: Path) -> None:
    assert paths.steps(tmp_path) == [] and paths.pointed(tmp_path) is None and paths.steps(tmp_path / "no") == []
    publish(tmp_path, 7)
    publish(tmp_path, 12_345_678)
    assert paths.steps(tmp_path) == [12_345_678, 7] and paths.pointed(tmp_path) == 12_345_678
    # Saved again: the pointer stays at the newest.
    publish(tmp_path, 7, "again")
    assert (paths.step_folder(tmp_path, 7) / "file").read_text() == "again"
    assert paths.pointed(tmp_path) == 12_345_678 and names(tmp_path) == ["iter_0000007", "iter_12345678"]


def test_names_are_synced_before_the_next_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not show a missing sync, but a power cut would."""
    done: list[str] = []
    rename, sync = os.rename, paths.sync

    def noted_rename(source: Path, target: Path) -> None:
        done.append(f"rename {Path(source).name}")
        rename(source, target)

    def noted_sync(path: Path) -> None:
        done.append(f"sync {path.name}")
        sync(path)

    publish(tmp_path, 7)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(paths, "sync", noted_sync)
    publish(tmp_path, 7)
    renames = ["rename iter_0000007", "rename .iter_0000007.partial"]
    assert done == ["sync .iter_0000007.partial", *renames, f"sync {tmp_path.name}", f"sync {tmp_path.name}"]


def test_only_step_folders_are_checkpoints(tmp_path: Path) -> None:
    for name in ("iter_7", "iter_0000008.bak", ".iter_0000009.partial", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000010").write_text("a file")
    (tmp_path / paths.LATEST).write_text("what\n")
    assert paths.steps(tmp_path) == [] and paths.pointed(tmp_path) is None
    assert paths.steps(tmp_path / "iter_0000010") == []


def test_clean_removes_the_remains_of_crashed_saves_and_nothing_else(tmp_path: Path) -> None:
    publish(tmp_path, 7)
    publish(tmp_path, 6).rename(tmp_path / ".iter_0000006.replaced")  # its replacement never appeared
    for name in ("kept", ".iter_notes.partial", ".iter_7.partial", ".iter_0000008.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".iter_0000009.partial").write_text("a file")
    (tmp_path / ".iter_0000009.removed").symlink_to(tmp_path / "kept")
    before = {path.name for path in tmp_path.iterdir()}
    for name in (".iter_0000008.partial", ".iter_0000007.replaced", ".iter_0000005.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    paths.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before - {".iter_0000006.replaced"} | {"iter_0000006"}


def test_set_aside_moves_later_steps_and_deletes_nothing(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        publish(tmp_path, step)
    moved = paths.set_aside(tmp_path, 7)
    assert [path.name for path in moved] == ["iter_0000009", "iter_0000008"]
    assert paths.steps(tmp_path) == [7] and paths.pointed(tmp_path) == 7
    publish(tmp_path, 8, "other")
    assert paths.set_aside(tmp_path, 7) == [tmp_path / paths.SET_ASIDE / "iter_0000008-2"]
    assert (tmp_path / paths.SET_ASIDE / "iter_0000008" / "file").read_text() == "x"


def test_a_checkpoint_that_was_being_replaced_is_set_aside_too(tmp_path: Path) -> None:
    for step in (7, 9):
        publish(tmp_path, step)
    (tmp_path / "iter_0000009").rename(tmp_path / ".iter_0000009.replaced")
    assert paths.set_aside(tmp_path, 7) == [tmp_path / paths.SET_ASIDE / "iter_0000009"]
    paths.clean(tmp_path)
    assert paths.steps(tmp_path) == [7]


class Crash(BaseException):
    """Simulates the end of the process."""


def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Raise before the ``at``-th operation that renames or removes something."""
    left = [at]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Crash
            return function(*arguments, **options)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (paths, "sync"), (atomic_write, "write"), (os, "unlink")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    monkeypatch.setattr(os, "rmdir", watched(os.rmdir))


@pytest.mark.parametrize(
    ("change", "outcomes"),
    [
        (lambda root: publish(root, 9, "again"), ({7: "x", 9: "x"}, {7: "x", 9: "again"})),
        (lambda root: paths.remove(root, 7), ({7: "x", 9: "x"}, {9: "x"})),
        (lambda root: paths.set_aside(root, 7), ({7: "x", 9: "x"}, {7: "x"})),
    ],
    ids=["replace", "remove", "set aside"],
)
def test_a_crash_between_any_two_operations_leaves_complete_checkpoints(
    change: Callable[[Path], Any], outcomes: tuple[dict[int, str], ...], tmp_path: Path
) -> None:
    for at in range(1, 50):
        root, crashed = tmp_path / str(at), False
        for step in (7, 9):
            publish(root, step)
        with pytest.MonkeyPatch.context() as patched:
            crashing(patched, at)
            try:
                change(root)
            except Crash:
                crashed = True
        paths.clean(root)
        assert {step: (paths.step_folder(root, step) / "file").read_text() for step in paths.steps(root)} in outcomes
        assert not list(root.glob(".iter*"))
        if not crashed:
            assert at > 3
            return
    raise AssertionError("it never came to an end")
