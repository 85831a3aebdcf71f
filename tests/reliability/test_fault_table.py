"""The table of faults lists the tested faults, and is written only if all tests pass."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from tests import fault_table

PAGE = f"# Title\n\n{fault_table.BEGIN}\nold\n{fault_table.END}\nafter\n"
SUITE = """
import pytest
@pytest.mark.parametrize("n", [1, 2])
def test_kill(n, fault_row):
    fault_row("kill", "a step", "resumed")
def test_other(fault_row):
    fault_row("full disk", "a save", "went on", count=61)
"""
FAILING = """
def test_bad(fault_row):
    fault_row("bit flip", "a file", "refused")
    assert False
"""


def run(folder: Path, suite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page after a run of ``suite``."""
    page = folder / "page.md"
    page.write_text(PAGE)
    (folder / "test_it.py").write_text(suite)
    monkeypatch.chdir(folder)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "--fault-table", str(page), "test_it.py"]
    pytest.main([*arguments, "-p", "tests.fault_table"])  # no conftest loads it here
    return page.read_text()


def test_rows_are_counted_and_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(tmp_path, SUITE, monkeypatch).splitlines()
    assert lines[:3] == ["# Title", "", fault_table.BEGIN] and lines[-2:] == [fault_table.END, "after"]
    assert lines[5:-2] == ["| kill | a step | 2 | resumed |", "| full disk | a save | 61 | went on |"]


def test_a_failed_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, SUITE + FAILING, monkeypatch) == PAGE


def test_worked_examples_hold() -> None:
    failed, tried = doctest.testmod(fault_table)
    assert tried and not failed
