"""Writes the faults that the fault tests tried as a table into a page of the documentation.

``pytest -m faults --fault-table=docs/reliability.md`` replaces the text between two markers of that page, but only if
every test passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
Row = tuple[str, str, str]
FaultRow = Callable[..., None]

_rows = pytest.StashKey[dict[Row, int]]()
_passed = pytest.StashKey[bool]()


def table(rows: dict[Row, int]) -> str:
    """A Markdown table of (fault, where, outcome) and its count, grouped by fault in order of appearance.

    >>> print(table({("SIGKILL", "in a step", "resumed"): 2, ("bit flip", "a file", "refused"): 1}))
    | fault | where | tried | outcome |
    |---|---|---|---|
    | SIGKILL | in a step | 2 | resumed |
    | bit flip | a file | 1 | refused |
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for (fault, where, outcome), count in rows.items():
        groups[fault].append(f"| {'' if groups[fault] else fault} | {where} | {count} | {outcome} |")
    lines = ["| fault | where | tried | outcome |", "|---|---|---|---|", *(line for g in groups.values() for line in g)]
    return "\n".join(lines)


def write_table(page: Path, rows: dict[Row, int]) -> None:
    """Put the table between the markers of a page; creates a missing page or markers."""
    text = page.read_text() if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = f"{text.rstrip()}\n\n" if text.strip() else "", "\n"
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fault-table``: the page that gets the table."""
    parser.addoption("--fault-table", metavar="PAGE", help="Markdown page whose table of tried faults is rewritten")


def pytest_configure(config: pytest.Config) -> None:
    """Start with an empty table."""
    config.stash[_rows] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember whether the test's call passed, for its rows."""
    report = yield
    if report.when == "call":  # type: ignore[attr-defined]
        item.stash[_passed] = report.passed  # type: ignore[attr-defined]
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table."""
    page, rows = session.config.getoption("--fault-table"), session.config.stash[_rows]
    if page and rows and exitstatus == pytest.ExitCode.OK:
        write_table(Path(page), rows)


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Iterator[FaultRow]:
    """``fault_row(fault, where, outcome, count=1)`` adds a row if the test passes; counts of equal rows are added."""
    mine: list[tuple[Row, int]] = []

    def add(fault: str, where: str, outcome: str, count: int = 1) -> None:
        mine.append(((fault, where, outcome), count))

    yield add
    if request.node.stash.get(_passed, False):
        rows = request.config.stash[_rows]
        for row, count in mine:
            rows[row] = rows.get(row, 0) + count
