"""A tool prints one line for a user's error or Ctrl-C, ends its workers and removes its partial files."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from genlip_megatron.command import command

ROOT = Path(__file__).parent.parent
TOOL = """
import sys, time
from pathlib import Path
from genlip_megatron.command import WorkerPool, command

def work(folder, number):
    file = Path(folder) / f"{number}.partial"
    file.touch()
    try:
        time.sleep(600)
    finally:
        file.unlink()

@command
def main():
    with WorkerPool(2) as pool:
        for job in [pool.submit(work, sys.argv[1], number) for number in range(4)]:
            job.result()

if __name__ == "__main__":
    sys.exit(main())
"""


STUBBORN = """
import sys, time
from genlip_megatron import command

command._GRACE = 0.2

def work():
    try:
        print("working", flush=True)
        time.sleep(600)
    finally:
        print("cleaning up", flush=True)
        for _ in range(2):
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                pass

@command.command
def main():
    if sys.argv[1] == "tool":
        work()
    with command.WorkerPool(1) as pool:
        pool.submit(work).result()

if __name__ == "__main__":
    sys.exit(main())
"""


def in_terminal(*words: str) -> tuple[int, int]:
    """(pid, terminal) of a command that runs in the foreground of a new terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, *words])
    return pid, terminal


def output_of(terminal: int, text: bytes | None = None, seconds: float = 60) -> str:
    """The output of a command up to a text, or to its end."""
    output, deadline = b"", time.monotonic() + seconds
    while text is None or text not in output:
        assert time.monotonic() < deadline, output
        try:
            if select.select([terminal], [], [], 0.1)[0]:
                output += os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
    return output.decode()


def ended(pid: int, terminal: int, seconds: float = 60) -> tuple[int, str]:
    """(exit status or minus the signal, output) of a command in a terminal."""
    try:
        output = output_of(terminal, seconds=seconds)
    finally:
        os.close(terminal)  # SIGHUP ends a command that still runs
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tool_ends_its_workers_and_leaves_no_files(number: int, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches all processes of the tool; SIGTERM reaches only the tool."""
    tool = tmp_path / "tool.py"
    tool.write_text(TOOL)
    pid, terminal = in_terminal(str(tool), str(tmp_path))
    while len(list(tmp_path.glob("*.partial"))) < 2:
        assert psutil.pid_exists(pid)
        time.sleep(0.02)
    workers = psutil.Process(pid).children(recursive=True)
    if number == signal.SIGINT:
        os.write(terminal, b"\x03")
    else:
        os.kill(pid, number)
    status, output = ended(pid, terminal)
    # Ended by SIGINT itself, which also ends a loop in a shell.
    assert status == (-signal.SIGINT if number == signal.SIGINT else 128 + number), output
    assert output.split() == (["^C", "tool.py:", "interrupted"] if number == signal.SIGINT else [])
    assert not list(tmp_path.glob("*.partial"))
    psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.parametrize("place", ["tool", "worker"])
def test_processes_that_ignore_ctrl_c_are_killed(place: str, tmp_path: Path) -> None:
    """A second Ctrl-C kills the tool; the tool kills its workers."""
    tool = tmp_path / "tool.py"
    tool.write_text(STUBBORN)
    pid, terminal = in_terminal(str(tool), place)
    seen = output_of(terminal, b"working")
    workers = psutil.Process(pid).children(recursive=True)
    os.write(terminal, b"\x03")
    seen += output_of(terminal, b"cleaning up")
    if place == "tool":
        os.write(terminal, b"\x03")
    status, output = ended(pid, terminal, 15)
    assert status == -signal.SIGINT and "Traceback" not in seen + output, output
    _, alive = psutil.wait_procs(workers, timeout=5)
    for worker in alive:
        worker.kill()
    assert not alive


@pytest.mark.parametrize("name", ["estimate.py", "export_encoder.py", "inspect_data.py", "prepare_data.py"])
@pytest.mark.slow
def test_ctrl_c_while_a_tool_imports_is_one_line(name: str) -> None:
    pid, terminal = in_terminal(str(ROOT / "tools" / name), "--help")
    process = psutil.Process(pid)
    # Before exec the child is still a copy of this process. NumPy is imported after the project's first module.
    while name not in " ".join(process.cmdline()) or not any("numpy" in part.path for part in process.memory_maps()):
        time.sleep(0.01)
    os.write(terminal, b"\x03")
    status, output = ended(pid, terminal)
    assert "Traceback" not in output, output
    assert status == 0 or (status == -signal.SIGINT and f"{name}: interrupted" in output), output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--limit -1: must be\nat least 0"), "--limit -1: must be at least 0"),
        (PermissionError(13, "Permission denied", "/proc/x"), "/proc/x: Permission denied"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_a_user_error_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> None:
        raise error

    before = signal.getsignal(signal.SIGINT)
    assert main() == 2
    assert capsys.readouterr().err == f"{Path(__file__).name}: error: {line}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_another_error_keeps_its_traceback() -> None:
    @command
    def main() -> None:
        raise TypeError

    with pytest.raises(TypeError):
        main()


def test_a_reader_that_closes_the_pipe_ends_a_tool_quietly() -> None:
    code = (
        "import sys; from genlip_megatron.command import command\n"
        "@command\ndef main():\n    for number in range(10**6): print(number)\n"
        "sys.exit(main())"
    )
    words = ["bash", "-c", f"'{sys.executable}' -c '{code}' | head -n 1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


TOOLS = {
    "inspect_data.py": ["INPUT", "--tokenizer", "/nowhere.json", "--output", "OUT"],
    "prepare_data.py": ["INPUT", "--tokenizer", "/nowhere.json"],
    "train_tokenizer.py": ["INPUT", "--output", "OUT"],
    "render_demo_data.py": ["--output", "FILE/OUT", "--train-samples", "1", "--val-samples", "1"],
    "checkpoints.py": ["list", "/nowhere"],
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_missing_path_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken.tar").symlink_to("/nowhere")
    places = {"INPUT": "broken.tar", "OUT": "out", "FILE/OUT": "file/out"}
    words = [places.get(word, word) for word in TOOLS[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tool = [sys.executable, str(ROOT / "tools" / name), *words]
    done = subprocess.run(tool, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{name}: error: " in done.stderr.splitlines()[-1]


def unpacks_nothing() -> None:
    (_,) = []


@pytest.mark.parametrize("fails", [unpacks_nothing, lambda: int("x"), lambda: json.loads("{")])
def test_a_value_error_of_a_bug_keeps_its_traceback(fails: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        command(lambda: fails())()
