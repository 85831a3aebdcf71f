"""Crash points see every kind of file operation, and end or fail a process at the chosen one."""

from __future__ import annotations

import doctest
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from genlip_megatron.testing.processes import Zygote
from tests import crash


def every_kind(work: Path) -> None:
    """File operations of every kind in a folder; reading does not count."""
    os.makedirs(work / "a" / "b")
    (work / "a" / "b").mkdir(exist_ok=True)  # no operation: the folder exists
    file = work / "a" / "file"
    with open(file, "wb") as stream:
        stream.write(b"x" * 10)
        stream.write(b"x" * 10)
        stream.flush()
        stream.write(b"x" * 7)
        stream.flush()
        os.fsync(stream.fileno())
    with open(file, "ab", buffering=0) as stream:
        stream.write(b"yy")
        stream.truncate(5)
    with file.open("r+b") as stream:
        stream.seek(2)
        stream.write(b"z")
    with open(work / "lock", "a+") as stream:
        stream.write("one")
    (work / "text").write_text("two\nlines\n")
    descriptor = os.open(work / "a", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(work / "lock", work / "a" / "renamed")
    (work / "text").replace(work / "a" / "b" / "text")
    thread = threading.Thread(target=lambda: (work / "thread").write_bytes(b"t"))
    thread.start()
    thread.join()
    os.chdir(work)
    Path("relative").write_bytes(b"")
    os.remove("relative")
    # None of these is an operation.
    file.read_bytes()
    os.listdir(work)
    file.stat()
    (work.parent / "elsewhere").write_bytes(b"e")
    shutil.rmtree(work / "a")


EVERY_KIND = """
mkdir .|mkdir a|mkdir a/b
create a/file|write 20 bytes of a/file|write 7 bytes of a/file|sync a/file|close a/file
open a/file|write 2 bytes of a/file|truncate a/file|close a/file
open a/file|write 1 bytes of a/file|close a/file
create lock|write 3 bytes of lock|close lock
create text|write 10 bytes of text|close text
sync a
rename lock to a/renamed|rename text to a/b/text
create thread|write 1 bytes of thread|close thread
create relative|close relative|remove relative
"""
# In the order of the file system.
REMOVING_A_TREE = ["remove a/b/text", "remove a/file", "remove a/renamed", "rmdir a", "rmdir a/b"]


def unseen(work: Path) -> None:
    """Bytes that reach a file without a write."""
    work.mkdir()
    (work / "seen").write_bytes(b"1234")
    torch.from_file(str(work / "grown"), shared=True, size=16, dtype=torch.uint8).fill_(1)


def full_disk(work: Path) -> None:
    """A writer that removes its unfinished file and tries again."""
    work.mkdir(exist_ok=True)
    for attempt in "first", "second":
        try:
            with open(work / attempt, "wb", buffering=0) as stream:
                stream.write(b"1234")
                stream.write(b"5678")
        except OSError as error:
            print(attempt, error.strerror, (work / attempt).stat().st_size)
            (work / attempt).unlink()


def existing_folder(work: Path) -> None:
    """Creating an existing folder, before ``full_disk``."""
    os.mkdir(work)
    full_disk(work)


def rank() -> None:
    """The function that the environment names."""
    crash.install_from_environment()
    globals()[os.environ["FUNCTION"]](Path(os.environ["WORK"]))


def run(zygote: Zygote, function: str, folder: Path, code: int = 0, **plan: object) -> tuple[list[str], str]:
    """(operations, output) of a function below ``folder``/work."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = crash.Plan(str(folder / "work"), str(folder / "log"), **plan)  # type: ignore[arg-type]
    environment = {**made.env(), "FUNCTION": function, "WORK": str(folder / "work")}
    (ended,) = zygote.run(1, [], environment, target=f"{__name__}:rank")
    assert ended.code == code, ended.output
    return [str(operation) for operation in made.operations()], ended.output


@pytest.fixture(scope="module")
def operations(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The operations of ``every_kind``."""
    return run(zygote, "every_kind", tmp_path_factory.mktemp("operations") / "run")[0]


def test_every_kind_of_operation_is_counted(operations: list[str]) -> None:
    removals = len(REMOVING_A_TREE)
    assert "|".join(operations[:-removals]) == EVERY_KIND.strip().replace("\n", "|")
    assert sorted(operations[-removals:]) == REMOVING_A_TREE


def test_a_process_dies_after_the_chosen_operation(zygote: Zygote, operations: list[str], tmp_path: Path) -> None:
    for number in range(2, len(operations) + 1, 3):
        done, _ = run(zygote, "every_kind", tmp_path / "run", -signal.SIGKILL, action="kill", at=number)
        assert len(done) == number
        if number == 5:
            assert (tmp_path / "run" / "work" / "a" / "file").stat().st_size == 20


def test_a_write_is_torn(zygote: Zygote, tmp_path: Path) -> None:
    done, _ = run(zygote, "every_kind", tmp_path / "run", -signal.SIGKILL, action="tear", at=5)
    assert len(done) == 4
    assert (tmp_path / "run" / "work" / "a" / "file").stat().st_size == 10


@pytest.mark.parametrize("function", ["full_disk", "existing_folder"])  # the second uses up no failure
def test_a_write_fails_once(function: str, zygote: Zygote, tmp_path: Path) -> None:
    done, output = run(zygote, function, tmp_path / "run", action="fail", at=3, error="EIO")
    assert output == "first Input/output error 2\n"
    assert done[-1] == "close second"


def test_a_disk_is_full_until_something_is_removed(zygote: Zygote, tmp_path: Path) -> None:
    done, output = run(zygote, "full_disk", tmp_path / "run", action="fail", at=3, lasting=True)
    assert output == "first No space left on device 2\n"
    # Closing fails as well.
    assert done == [
        "mkdir .", "create first", "remove first",
        "create second", "write 4 bytes of second", "write 4 bytes of second", "close second",
    ]  # fmt: skip


def test_files_written_without_python_are_named(zygote: Zygote, tmp_path: Path) -> None:
    run(zygote, "unseen", tmp_path / "run")
    work = tmp_path / "run" / "work"
    operations = crash.Plan(str(work), str(tmp_path / "run" / "log")).operations()
    assert crash.unseen_files(work, operations) == ["grown"]


def test_worked_examples_hold() -> None:
    failed, tried = doctest.testmod(crash)
    assert tried and not failed
