"""What `mkdocs build` derives from the code: the file list of the architecture page, and the reference."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "genlip_megatron"
FILE_LIST = "<!-- files -->"
FRONT = "top level"


def summary(file: Path) -> str:
    """The first sentence of a module's docstring."""
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(first.split()), maxsplit=1)[0].replace("|", "\\|")


def rooms() -> Iterator[tuple[str, list[Path]]]:
    """The folders of the package with their modules; first the modules that lie in no folder."""
    yield FRONT, sorted(file for file in PACKAGE.glob("*.py") if file.name != "__init__.py")
    for folder in sorted(PACKAGE.iterdir()):
        modules = sorted(file for file in folder.rglob("*.py") if file.name != "__init__.py")
        if modules:
            yield folder.name, modules


def name_of(file: Path) -> str:
    """The dotted name of a module."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def page_of(room: str) -> str:
    """Where a room's reference is."""
    return f"reference/{room.replace(' ', '-')}.md"


def on_config(config: Any, **_: Any) -> Any:
    """Put the rooms under "Reference" in the navigation."""
    pages: list[Any] = ["reference.md", *({room: page_of(room)} for room, _ in rooms())]
    for part in config["nav"]:
        for entry in next(iter(part.values())) if isinstance(next(iter(part.values())), list) else ():
            if entry.get("Reference") == "reference.md":
                entry["Reference"] = pages
    return config


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the reference pages."""
    for room, modules in rooms():
        blocks = [f"## {file.relative_to(PACKAGE)}\n\n::: {name_of(file)}\n" for file in modules]
        files.append(File.generated(config, page_of(room), content="\n".join([f"# {room}\n", *blocks])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the file list."""
    if FILE_LIST not in markdown:
        return markdown
    lines = []
    for room, modules in [*rooms(), ("tools", sorted((ROOT / "tools").rglob("*.py")))]:
        lines += [f"\n### {room}\n", "| file | what it is |", "|---|---|"]
        base = PACKAGE if room == FRONT else PACKAGE / room if room != "tools" else ROOT / "tools"
        lines += [f"| `{file.relative_to(base)}` | {summary(file)} |" for file in modules]
    return markdown.replace(FILE_LIST, "\n".join(lines))
