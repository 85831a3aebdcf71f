"""A folder appears complete or not at all, and never replaces something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genlip_megatron.checkpoint import paths
from genlip_megatron.convert.staging import new_folder

# A tool that receives SIGTERM while it writes, and again while it removes its folder.
TWICE = """
import os, shutil, signal, sys
from pathlib import Path
from genlip_megatron.command import command
from genlip_megatron.convert import staging

remove = shutil.rmtree
def again(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    remove(*args, **kwargs)
shutil.rmtree = again

@command
def main():
    with staging.new_folder(Path(sys.argv[1]), 1, True, lambda _: "") as partial:
        (partial / "file").write_text("new")
        os.kill(os.getpid(), signal.SIGTERM)

sys.exit(main())
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_folder(target, 1, False, lambda _: "thesis") as partial:
        (partial / "file").write_text("1")
        assert not target.exists() and partial.parent == target.parent and partial.name.startswith(".")
    assert names(target.parent) == ["new"] and names(target) == ["file"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(target, 1, True, lambda _: "") as partial:
        (partial / "file").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["old"] and (target / "file").read_text() == "old"
    with (
        pytest.raises(ValueError, match="cannot be written: .*No space left"),
        new_folder(target, 1, True, lambda _: ""),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["old"]


def test_leftovers_of_a_killed_process_are_removed_or_restored(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in (".target.partial-0123abcd", ".target.replaced"):
        (tmp_path / name / "folder").mkdir(parents=True)
    # Killed during the swap: the old folder is restored, and not replaced without overwrite.
    with pytest.raises(ValueError, match="not empty"), new_folder(target, 1, False, lambda _: ""):
        raise AssertionError
    assert names(target) == ["folder"]
    with new_folder(target, 1, True, lambda _: "") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["target"] and names(target) == ["file"]


def test_folders_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    target, kept = tmp_path / "target", tmp_path / "kept"
    for name in (".target.partial-notes", ".target.partial-0123abcd9", "kept"):
        (tmp_path / name).mkdir()
    (kept / "thesis").write_text("five years of work")
    (tmp_path / ".target.partial-0123abcd").symlink_to(kept)
    with new_folder(target, 1, False, lambda _: "") as partial:
        (partial / "file").write_text("new")
    assert len(names(tmp_path)) == 5 and names(kept) == ["thesis"]
    (tmp_path / ".target.replaced").mkdir()
    refused = pytest.raises(ValueError, match="target.replaced: this tool needs the name, but .*thesis.*. Move it")
    with refused, new_folder(target, 1, True, lambda place: "thesis" if place.name != "target" else ""):
        raise AssertionError
    assert (tmp_path / ".target.replaced").is_dir() and names(target) == ["file"]


def test_concurrent_writers_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "target"
    refused = pytest.raises(ValueError, match="not empty")
    with refused, new_folder(target, 1, False, lambda _: "") as first:
        with new_folder(target, 1, False, lambda _: "") as second:
            (first / "file").write_text("first")
            (second / "file").write_text("second")
        with new_folder(target, 1, True, lambda _: "") as third:
            (third / "file").write_text("third")
        assert (target / "file").read_text() == "third" and (first / "file").read_text() == "first"
    assert names(tmp_path) == ["target"] and (target / "file").read_text() == "third"


def test_a_folder_removed_before_it_is_locked_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[Path](), Path.mkdir

    def removed_at_first(self: Path, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if ".partial-" in self.name:
            made.append(self)
            if len(made) == 1:
                self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_at_first)
    with new_folder(tmp_path / "target", 1, False, lambda _: "") as partial:
        assert made[1:] == [partial]
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("able", [True, False])
def test_a_disk_failure_after_the_swap_restores_the_old_folder(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not able:
        monkeypatch.setattr(paths, "exchange", lambda first, second: False)
    target, sync = tmp_path / "target", paths.sync
    target.mkdir()
    (target / "file").write_text("old")

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(paths, "sync", failing)
    with pytest.raises(ValueError, match="Input/output"), new_folder(target, 1, True, lambda _: "") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["target"] and (target / "file").read_text() == "old"
    monkeypatch.setattr(paths, "sync", sync)
    with new_folder(target, 1, True, lambda _: "") as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["target"] and (target / "file").read_text() == "new"


def test_an_empty_folder_is_filled_and_any_other_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target, 1, False, lambda _: "thesis") as partial:
        (partial / "file").write_text("1")
    for overwrite, why in ((False, "is not empty.*--overwrite"), (True, "holds something else .thesis")):
        with pytest.raises(ValueError, match=why), new_folder(target, 1, overwrite, lambda _: "thesis"):
            raise AssertionError
    with pytest.raises(ValueError, match="is a file"), new_folder(target / "file", 1, True, lambda _: ""):
        raise AssertionError
    with pytest.raises(ValueError, match="GB are free"), new_folder(tmp_path / "big", 10**18, True, lambda _: ""):
        raise AssertionError
    with (
        pytest.raises(ValueError, match="cannot be written"),
        new_folder(target / "file" / "x", 1, True, lambda _: ""),
    ):
        raise AssertionError
    assert names(tmp_path) == ["target"] and names(target) == ["file"]


def test_a_second_sigterm_does_not_interrupt_the_clean_up(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.mkdir()
    (target / "file").write_text("old")
    assert subprocess.run([sys.executable, "-c", TWICE, str(target)], check=False).returncode == 143
    assert names(tmp_path) == ["old"] and (target / "file").read_text() == "old"
