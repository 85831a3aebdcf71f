"""The page of ``tools/report.py``: parts with pictures, tables, and the commands that made them, as one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from genlip_megatron.outputs import begins_with

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_CSS_DPI = 96
_READABLE = 0.72  # a wide picture is shrunk to this share of its size; then it scrolls
_WIDE = 560  # CSS pixels

is_page = begins_with(b'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>GenLIP report')


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
        title: what it shows.
        png: the file.
    """

    title: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def width(self) -> int:
        """Its width in CSS pixels."""
        with Image.open(io.BytesIO(self.png)) as image:
            return round(image.width * _CSS_DPI / image.info.get("dpi", (_CSS_DPI,))[0])

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of the page."""
        return self.width > _WIDE

    @property
    def least(self) -> int:
        """Width in CSS pixels below which its text would be unreadable; 0 for pictures that are not wide."""
        return round(self.width * _READABLE) if self.wide else 0


@dataclass(frozen=True)
class Table:
    """Rows of text below named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Something with one origin.

    Attributes:
        title: its heading; "": none.
        text: a sentence about it.
        facts: names and values.
        pictures: in order.
        table: below the pictures.
        commands: what made it, or if it is missing, what would make it.
        missing: why it is missing; "": it is not.
    """

    title: str = ""
    text: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    table: Table | None = None
    commands: Sequence[str] = ()
    missing: str = ""


@dataclass(frozen=True)
class Part:
    """A chapter of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def missing(self) -> bool:
        """Whether all of it is missing."""
        return all(block.missing for block in self.blocks)


def render(name: str, facts: Mapping[str, str], parts: Sequence[Part], command: str) -> str:
    """The page.

    Args:
        name: of the run.
        facts: names and values for the heading.
        parts: in order.
        command: that made the page.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(name=name, facts=facts, parts=parts, command=command)
