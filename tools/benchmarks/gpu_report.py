"""Reports of ``gpu.py``: tables, a JSON file, a bar chart, and a block in a page of the documentation."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from genlip_megatron.outputs import begins_with, json_object, write

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
# Targets of a step, in % MFU, and of ratios: the step over the baseline, the loader over l16's step.
MFU_TARGETS = {"l16 stage 1 BF16": 50.0, "so16 stage 1 BF16": 55.0, "g16 stage 1 BF16": 58.0}
OVER_BASELINE, OVER_MODEL = 2.0, 1.5
_NOTHING = "Nothing was measured"
# Bar colours of the kinds of steps.
_COLOURS = {
    "BF16": "#2b6cb0", "selective": "#90cdf4", "TE": "#805ad5", "FP8": "#2f855a", "FP8 current": "#68d391",
    "graph": "#63b3ed", "baseline": "#a0aec0",
}  # fmt: skip
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="'
_TITLE = "MFU of a training step, % of 989.5 TFLOP/s; line: target"
is_figures, is_chart = json_object("rehearsal", "figures"), begins_with(_SVG.encode(), _TITLE.encode())
Details = dict[str, float | str]


@dataclass(frozen=True)
class Figure:
    """One figure, measured or not.

    Attributes:
        section, name: unique together.
        value: in ``unit``; None if it was not measured.
        target: smallest value wanted; None without a target.
        missing: why it was not measured.
        details: further results of the same measurement: {unit: number} or {name: text}.
    """

    section: str
    name: str
    value: float | None = None
    unit: str = ""
    target: float | None = None
    missing: str = ""
    details: Details = field(default_factory=dict)


def derived(figures: Sequence[Figure]) -> list[Figure]:
    """``figures`` with their targets, and with the ratios to the baseline added."""
    by_name = {(figure.section, figure.name): figure for figure in figures}
    result = []
    model = by_name.get(("step", "l16 stage 1 BF16"))
    for figure in figures:
        target = MFU_TARGETS.get(figure.name)
        if figure.section == "data" and model is not None and model.value is not None:
            target = OVER_MODEL * float(model.details["samples/s"])
        result.append(replace(figure, target=target))
        baseline = by_name.get(("step", figure.name.replace("BF16", "baseline")))
        if figure.section != "step" or not figure.name.endswith("BF16") or baseline is None:
            continue
        name = figure.name.replace("BF16", "over the baseline")
        if figure.value is None or baseline.value is None:
            result.append(
                Figure("step", name, target=OVER_BASELINE, missing=figure.missing or f"baseline: {baseline.missing}")
            )
        else:
            ratio = float(figure.details["samples/s"]) / float(baseline.details["samples/s"])
            result.append(Figure("step", name, ratio, "times", OVER_BASELINE))
    return result


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table of all figures.

    >>> print(table([Figure("step", "a", 51.27, "% MFU", 55, details={"samples/s": 600.4, "attention": "te"}),
    ...     Figure("head", "b", missing="out of memory")]))
    | section | what | measured | target | more |
    |---|---|---|---|---|
    | step | a | 51.3 % MFU | 55 | 600 samples/s, attention te |
    | head | b | not measured: out of memory |  |  |
    """
    lines = ["| section | what | measured | target | more |", "|---|---|---|---|---|"]
    section = ""
    for figure in figures:
        measured = f"not measured: {figure.missing}".replace("|", "/")
        if figure.value is not None:
            measured = f"{_number(figure.value)} {figure.unit}"
        target = "" if figure.target is None else _number(figure.target)
        more = ", ".join(
            f"{name} {value}" if isinstance(value, str) else f"{_number(value)} {name}"
            for name, value in figure.details.items()
        )
        shown = "" if figure.section == section else figure.section
        section = figure.section
        lines.append(f"| {shown} | {figure.name} | {measured} | {target} | {more} |")
    return "\n".join(lines)


def heading(figures: Sequence[Figure], machine: dict[str, str]) -> str:
    """Device, date and versions of the measurement."""
    if all(figure.value is None for figure in figures):
        return f"{_NOTHING} yet on a GPU."
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "date"))
    return f"Measured on {machine['device']}, {machine['date']}; {versions}."


def write_json(file: Path, figures: Sequence[Figure], machine: dict[str, str], rehearsal: bool) -> None:
    """Every figure with device, versions and date."""
    tree: dict[str, Any] = {"rehearsal": rehearsal, "figures": [{**asdict(figure), **machine} for figure in figures]}
    write(file, json.dumps(tree, indent=1) + "\n", is_figures)


def chart(figures: Sequence[Figure]) -> str:
    """An SVG of the steps' MFU: one bar per step, its target as a line, grey text if it was not measured."""
    steps = [figure for figure in figures if figure.section == "step"]
    rows = [figure for figure in steps if re.search(rf"stage \d ({'|'.join(_COLOURS)})$", figure.name)]
    left, scale, high = 170, 5.0, 22
    width, height = left + int(100 * scale) + 60, high * len(rows) + 44
    parts = [
        f'{_SVG}0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="8" y="16">{_TITLE}</text>'
    ]
    for i, figure in enumerate(rows):
        y = 28 + high * i
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{html.escape(figure.name)}</text>')
        if figure.value is None:
            parts.append(f'<text x="{left}" y="{y + 13}" fill="#888">not measured</text>')
        else:
            length = min(figure.value, 100) * scale
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{high - 5}" '
                f'fill="{_COLOURS[figure.name.split(maxsplit=3)[3]]}"/>'
                f'<text x="{left + length + 4:.1f}" y="{y + 13}">{figure.value:.1f}</text>'
            )
        if figure.target is not None:
            x = left + figure.target * scale
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y - 2}" y2="{y + high - 3}" stroke="#c53030"/>')
    return "".join([*parts, "</svg>\n"])


def split_page(page: Path) -> tuple[str, str, str]:
    """(text before, between and after the markers of a page).

    Raises:
        ValueError: it cannot be read, or has no markers.
    """
    try:
        before, begin, rest = page.read_text().partition(BEGIN)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--write {page}: cannot be read: {error}") from None
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"--write {page}: the page has no {BEGIN} and {END}")
    return before, old, after


def write_page(page: Path, figures: Sequence[Figure], machine: dict[str, str]) -> None:
    """Write the tables between the markers of ``page``, and the chart beside the page.

    Raises:
        ValueError: the page has no markers; or it holds figures and ``figures`` has none; or the chart would replace
            another file.
    """
    before, old, after = split_page(page)
    nothing = all(figure.value is None for figure in figures)
    if nothing and old.strip() and not old.strip().startswith(_NOTHING):
        raise ValueError(f"--write {page}: it holds figures, and this machine measured none to replace them")
    picture = ""
    if not nothing:
        drawing = page.with_suffix(".svg")
        write(drawing, chart(figures), is_chart, "--write")
        picture = f"\n![MFU of a training step]({drawing.name})\n"
    page.write_text(f"{before}{BEGIN}\n{heading(figures, machine)}\n{picture}\n{table(figures)}\n{END}{after}")
