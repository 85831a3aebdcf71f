"""Writes the faults that the fault tests tried as a table into a page of the documentation.

``pytest -m faults --fault-table=docs/reliability.md`` replaces the text between two markers of that page, but only if
every test passed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
Row = tuple[str, str, str]
FaultRow = Callable[..., None]
_rows = pytest.StashKey[Counter[Row]]()  # of a session's passed tests, and of each test


def table(rows: Mapping[Row, int]) -> str:
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


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fault-table``: the page that gets the table."""
    parser.addoption("--fault-table", metavar="PAGE", help="Markdown page whose table of tried faults is rewritten")


def pytest_configure(config: pytest.Config) -> None:
    """Start with an empty table."""
    config.stash[_rows] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the rows of a test that passed."""
    report = yield
    if report.when == "call" and report.passed:  # type: ignore[attr-defined]
        item.config.stash[_rows].update(item.stash.get(_rows, Counter()))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Put the table between the markers of the page."""
    option, rows = session.config.getoption("--fault-table"), session.config.stash[_rows]
    if option and rows and exitstatus == pytest.ExitCode.OK:
        page = Path(option)
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> FaultRow:
    """``fault_row(fault, where, outcome, count=1)`` adds a row if the test passes; counts of equal rows are added."""
    rows = request.node.stash[_rows] = Counter()

    def add(fault: str, where: str, outcome: str, count: int = 1) -> None:
        rows[fault, where, outcome] += count

    return add
