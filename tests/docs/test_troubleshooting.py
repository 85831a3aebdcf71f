"""Every error that the code can raise belongs to a section of docs/troubleshooting.md, which quotes real messages.

A comment ``<!-- errors: ... -->`` below each heading of the page lists settings (``data.tokenizer``, or a whole section
``parallel``), and files or folders of the package (``train/oom.py``, ``convert/``) or of ``tools/``. An error belongs
to the section of the setting that its text begins with, else of its file or folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from genlip_megatron.config import SECTIONS

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SETTINGS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in fields(section)} | set(SECTIONS)
GAP = "…"


class Error(NamedTuple):
    file: str
    line: int
    text: str


def words(node: ast.AST) -> str:
    """The literal text of an expression; ``…`` replaces values."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    if isinstance(node, ast.Call):
        return next((text for argument in node.args if re.search(r"\w", text := words(argument))), GAP)
    return GAP


def sources() -> dict[str, ast.Module]:
    """File, as the page names it -> its literal texts."""
    files = [ROOT / "pretrain_genlip.py", *ROOT.glob("genlip_megatron/**/*.py"), *ROOT.glob("tools/**/*.py")]
    names = {str(file.relative_to(ROOT)).removeprefix("genlip_megatron/"): file for file in sorted(files)}
    return {name: ast.parse(file.read_text()) for name, file in names.items()}


def errors() -> Iterator[Error]:
    """Every ``raise``, except those that pass on a caught error."""
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                yield Error(name, node.lineno, words(node.exc))


def sections(page: str) -> dict[str, list[str]]:
    """Heading -> the settings and paths below it."""
    found = re.findall(r"^## (.+)\n<!-- errors: (.*) -->", page, re.MULTILINE)
    return {heading: names.split() for heading, names in found}


def section_of(error: Error, page: dict[str, list[str]]) -> str | None:
    """The section that an error belongs to.

    >>> page = {"Tokenizer": ["data.tokenizer", "tokenizer.py"], "Data": ["data/"]}
    >>> section_of(Error("data/loader.py", 1, "data.tokenizer = …: no such file"), page)
    'Tokenizer'
    >>> section_of(Error("data/loader.py", 1, "… is damaged"), page)
    'Data'
    >>> section_of(Error("news/loader.py", 1, "… is damaged"), page) is None
    True
    """
    places = {name: heading for heading, names in page.items() for name in names}
    setting = re.match(r"(\w+)\.\w+", error.text)
    wanted = [setting[0], setting[1]] if setting and setting[0] in SETTINGS else []
    parts = error.file.split("/")
    wanted += [error.file, *("/".join(parts[:depth]) + "/" for depth in range(len(parts) - 1, 0, -1))]
    return next((places[name] for name in wanted if name in places), None)


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def test_every_error_has_a_section(page: str) -> None:
    known = sections(page)
    lost = [f"{error.file}:{error.line}: {error.text}" for error in errors() if section_of(error, known) is None]
    assert not lost, f"no section of {PAGE.name} names the file or the setting of: {lost}"


def test_a_section_names_only_what_exists(page: str) -> None:
    files = sources()
    gone = [
        name
        for names in sections(page).values()
        for name in names
        if name not in SETTINGS and not any(file == name or file.startswith(name) for file in files)
    ]
    assert not gone, f"{PAGE.name} names settings or files that do not exist: {gone}"


def test_no_setting_or_file_is_named_twice(page: str) -> None:
    names = [name for section in sections(page).values() for name in section]
    assert len(names) == len(set(names))


def test_quoted_messages_exist(page: str) -> None:
    """The first cell of a row quotes messages; ``…`` replaces values."""
    said = "\n".join(
        " ".join(words(node).split())
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    )
    rows = re.findall(r"^\| (`.+?`) \|", page.split("\n## ", 1)[1], re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`(.+?)`", row)]
    assert quoted
    stale = [message for message in quoted if not all(part.strip() in said for part in message.split(GAP))]
    assert not stale, f"{PAGE.name} quotes messages that are not in the code: {stale}"
