"""``make`` checks Python and its environment before it makes anything, and says in one line what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from genlip_megatron.testing import CHECKOUT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that ``make`` needs before it installs something."""
    for name in ("Makefile", "setup.py"):
        shutil.copy(CHECKOUT / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str) -> str:
    """The first line of errors of a ``make`` that fails."""
    done = subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[0]


@pytest.mark.parametrize("target", ["demo", "test", "plugging"])
def test_an_old_python_is_named_and_nothing_is_made(target: str, checkout: Path) -> None:
    before = sorted(os.listdir(checkout))
    wanted = (
        f"PYTHON = {sys.executable}: does not run or is older than Python 9.1. Name a newer one: make {target} PYTHON="
    )
    assert make(checkout, target, f"PYTHON={sys.executable}", "OLDEST=9.1").startswith(wanted)
    assert make(checkout, target, "PYTHON=/nowhere").startswith("PYTHON = /nowhere: does not run")
    assert sorted(os.listdir(checkout)) == before


def test_a_broken_environment_is_named(checkout: Path) -> None:
    """The system's Python is gone, or an install was cut off before pip was there, with and without a stamp."""
    environment = checkout / ".venv"
    environment.symlink_to("/nowhere")
    assert make(checkout, "demo").startswith(".venv: its Python does not run or is older than Python 3.10. Remove it")
    environment.unlink()
    venv.create(environment, with_pip=False, symlinks=True)
    assert make(checkout, "demo").startswith(".venv: has no working pip. Remove it (rm -r .venv)")
    (environment / "installed").touch()
    os.utime(checkout / "setup.py", (0, 0))
    (environment / "bin" / "python").unlink()
    assert make(checkout, "check").startswith(".venv: its Python does not run")
