"""Crash points see every kind of file operation, and end or fail a process at the chosen one."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from genlip_megatron.testing.processes import Zygote
from tests import crash

TARGET = "tests.reliability.test_crash_points:"


def every_kind() -> None:
    """File operations of every kind in a folder; reading does not count."""
    crash.install_from_environment()
    work = Path(os.environ["WORK"])
    os.makedirs(work / "a" / "b", exist_ok=True)
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
    (work / "text").write_text("two\nlines\n")
    descriptor = os.open(work / "low", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"12345678")
    os.pwrite(descriptor, b"9", 8)
    os.ftruncate(descriptor, 4)
    os.fdatasync(descriptor)
    os.close(descriptor)
    os.truncate(work / "low", 2)
    with os.fdopen(os.open(work / "low", os.O_WRONLY), "w") as stream:
        stream.write("ab")
    descriptor = os.open(work / "a", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(work / "low", work / "a" / "renamed")
    (work / "text").replace(work / "a" / "b" / "text")
    os.link(file, work / "hard")
    (work / "soft").symlink_to("hard")
    os.chmod(work / "hard", 0o600)
    with tempfile.NamedTemporaryFile(dir=work, prefix="t", suffix="-", delete=False) as stream:
        stream.write(b"temporary")
    os.remove(stream.name)
    shutil.copyfile(file, work / "copy")
    thread = threading.Thread(target=lambda: (work / "thread").write_bytes(b"t"))
    thread.start()
    thread.join()
    child = os.fork()
    if not child:
        (work / "child").write_bytes(b"c")
        os._exit(0)
    os.waitpid(child, 0)
    os.chdir(work)
    Path("relative").touch()
    os.unlink("relative")
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
create text|write 10 bytes of text|close text
create low|write 8 bytes of low|write 1 bytes of low|truncate low|sync low|close low|truncate low
open low|write 2 bytes of low|close low
sync a
rename low to a/renamed|rename text to a/b/text|link a/file to hard|symlink hard to soft|chmod hard
create TEMPORARY|write 9 bytes of TEMPORARY|close TEMPORARY|remove TEMPORARY
create copy|write 5 bytes of copy|write 0 bytes of copy|close copy
create thread|write 1 bytes of thread|close thread
create child|write 1 bytes of child|close child
create relative|close relative|remove relative
"""
# In the order of the file system.
REMOVING_A_TREE = ["remove a/b/text", "remove a/file", "remove a/renamed", "rmdir a", "rmdir a/b"]


def torch_saves() -> None:
    """A tensor written by torch to a path and to a file."""
    crash.install_from_environment()
    work = Path(os.environ["WORK"])
    work.mkdir()
    values = torch.arange(100_000)
    torch.save(values, work / "by_path.partial")
    with open(work / "by_file.pt", "wb") as stream:
        torch.save(values, stream)
    os.rename(work / "by_path.partial", work / "by_path.pt")


def unseen() -> None:
    """Bytes that reach a file without a write."""
    crash.install_from_environment()
    work = Path(os.environ["WORK"])
    work.mkdir()
    (work / "seen").write_bytes(b"1234")
    torch.from_file(str(work / "grown"), shared=True, size=16, dtype=torch.uint8).fill_(1)


def full_disk() -> None:
    """A writer that removes its unfinished file and tries again."""
    crash.install_from_environment()
    work = Path(os.environ["WORK"])
    work.mkdir()
    for attempt in "first", "second":
        try:
            with open(work / attempt, "wb", buffering=0) as stream:
                stream.write(b"1234")
                stream.write(b"5678")
        except OSError as error:
            print(attempt, error.strerror, (work / attempt).stat().st_size)
            (work / attempt).unlink()


def make_folders() -> None:
    """An existing folder, and one whose creation fails at first."""
    work = Path(os.environ["WORK"])
    work.mkdir()
    crash.install_from_environment()
    for _ in range(2):
        work.mkdir(exist_ok=True)
        try:
            (work / "new").mkdir()
        except OSError as error:
            print(error.strerror)


def run(zygote: Zygote, function: str, folder: Path, code: int = 0, **plan: object) -> tuple[list[str], str]:
    """(operations, output) of a function below ``folder``/work."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = crash.Plan(str(folder / "work"), str(folder / "log"), **plan)  # type: ignore[arg-type]
    (ended,) = zygote.run(1, [], {**made.env(), "WORK": str(folder / "work")}, target=TARGET + function)
    assert ended.code == code, ended.output
    return [str(operation) for operation in made.operations()], ended.output


@pytest.fixture(scope="module")
def operations(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The operations of ``every_kind``."""
    return run(zygote, "every_kind", tmp_path_factory.mktemp("operations") / "run")[0]


def test_every_kind_of_operation_is_counted(operations: list[str]) -> None:
    plain = [re.sub(r"\bt\w{8}-", "TEMPORARY", operation) for operation in operations]
    removals = len(REMOVING_A_TREE)
    assert "|".join(plain[:-removals]) == EVERY_KIND.strip().replace("\n", "|")
    assert sorted(plain[-removals:]) == REMOVING_A_TREE


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


def test_a_write_fails_once(zygote: Zygote, tmp_path: Path) -> None:
    done, output = run(zygote, "full_disk", tmp_path / "run", action="fail", at=3, error="EIO")
    assert output == "first Input/output error 2\n"
    assert done[-1] == "close second"


def test_creating_an_existing_folder_does_not_use_up_the_failure(zygote: Zygote, tmp_path: Path) -> None:
    done, output = run(zygote, "make_folders", tmp_path / "run", action="fail", at=1, error="EIO")
    assert (done, output) == (["mkdir new"], "Input/output error\n")


def test_a_disk_is_full_until_something_is_removed(zygote: Zygote, tmp_path: Path) -> None:
    done, output = run(zygote, "full_disk", tmp_path / "run", action="fail", at=3, lasting=True)
    assert output == "first No space left on device 2\n"
    # Closing fails as well.
    assert done == [
        "mkdir .", "create first", "remove first",
        "create second", "write 4 bytes of second", "write 4 bytes of second", "close second",
    ]  # fmt: skip


def test_writes_of_torch_save_are_seen(zygote: Zygote, tmp_path: Path) -> None:
    run(zygote, "torch_saves", tmp_path / "run")
    work = tmp_path / "run" / "work"
    assert torch.equal(torch.load(work / "by_path.pt", weights_only=True), torch.arange(100_000))
    operations = crash.Plan(str(work), str(tmp_path / "run" / "log")).operations()
    assert crash.unseen_files(work, operations) == []


def test_files_written_without_python_are_named(zygote: Zygote, tmp_path: Path) -> None:
    run(zygote, "unseen", tmp_path / "run")
    work = tmp_path / "run" / "work"
    operations = crash.Plan(str(work), str(tmp_path / "run" / "log")).operations()
    assert crash.unseen_files(work, operations) == ["grown"]


def test_worked_examples_hold() -> None:
    failed, tried = doctest.testmod(crash)
    assert tried and not failed
