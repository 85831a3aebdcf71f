"""Every section of the data benchmark prints its figures; the values depend on the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "tools/benchmarks/data.py"
LINES = {
    "pipeline stage 1, samples/s": "ratio",
    "pipeline stage 1, tokens/s": "ratio",
    "pipeline stage 1, samples a CPU second: ours with decoder": "ratio",
    "pipeline stage 2, samples/s": "ratio",
    "scale, .*, start of the process to the first step": "s",
    "scale, .*, peak resident memory": "GiB",
    "scale, .*, anonymous memory": "GiB",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_every_section_prints_its_figures() -> None:
    pytest.importorskip("webdataset")
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *lines = done.stdout.splitlines()
    assert "torch" in machine and "cores" in machine
    for line in lines:
        assert re.search(r"(ratio [\d.]+|value [\d.]+ \S+)$", line), line
    for start, unit in LINES.items():
        figure = r"ratio [\d.]+$" if unit == "ratio" else rf"value [\d.]+ {unit}$"
        assert any(re.match(start, line) and re.search(figure, line) for line in lines), start


def test_an_unknown_section_is_refused() -> None:
    done = run("speed")
    assert done.returncode == 2 and "speed" in done.stderr and "pipeline" in done.stderr
