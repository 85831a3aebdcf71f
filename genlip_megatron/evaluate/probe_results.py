"""The table and the picture of a comparison of encoders."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genlip_megatron import atomic_write
from genlip_megatron.evaluate import drawing

_PACKAGES = ("genlip-megatron", "torch", "transformers", "timm", "open-clip-torch", "numpy", "pillow")


def provenance() -> dict[str, Any]:
    """The command and the versions that made a result."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"command": sys.argv, "versions": versions}


def write(
    folder: Path,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    title: str,
    percent: bool = True,
) -> None:
    """``results.json`` with ``facts`` and a row for each encoder, and ``results.png`` with a bar for each.

    Args:
        folder: where they go.
        facts: of the whole comparison.
        rows: each with the encoder's name under ``settings`` and a score under ``measure``.
        measure: such as "accuracy" or "miou".
        title: of the picture.
        percent: the scores are from 0 to 1 and drawn in percent.
    """
    text = json.dumps({**provenance(), **facts, "measure": measure, "encoders": list(rows)}, indent=1)
    atomic_write.write(folder / "results.json", text)
    names = [str(row["settings"]["encoder"]) for row in rows]
    atomic_write.write(folder / "results.png", bar_chart(names, [row[measure] for row in rows], title, percent))


def bar_chart(names: Sequence[str], scores: Sequence[float], title: str, percent: bool = True) -> bytes:
    """A PNG with one horizontal bar for each name, labelled with its score; the first is on top."""
    pyplot = drawing.pyplot()
    values = [100 * score if percent else score for score in scores]
    shown = [name if len(name) <= 40 else f"...{name[-37:]}" for name in names]
    with pyplot.rc_context({"font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(names)), layout="constrained")
        bars = axes.barh(range(len(names)), values, height=0.65, color="#3b6ea8")
        axes.bar_label(bars, [f"{value:.1f}" if percent else f"{value:.4g}" for value in values], padding=4)
        axes.set_yticks(range(len(names)), shown)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, max(1.0, 1.12 * max(values)) if percent else 1.12 * max(values))
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        pyplot.close(figure)
    return content.getvalue()
