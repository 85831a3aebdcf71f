"""The table and the picture of a perplexity comparison."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genlip_megatron import atomic_write
from genlip_megatron.evaluate import drawing
from genlip_megatron.evaluate.probe_results import provenance

MEASURE = "ppl1"  # the number of a row that every comparison has
# Condition: label, marker, colour.
_CONDITIONS = {
    "image": ("with its image", "o", "#3b6ea8"),
    "shuffled": ("with another image", "x", "#c26a2d"),
    "without_image": ("without image", "|", "#666666"),
}


def row(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An encoder's row of ``results.json``: ``settings``, the scores as numbers, and all else under ``stages``.

    Args:
        results: of each stage, as ``perplexity.measure`` returns them; the settings of the last hold those of all.
    """
    scores = {
        stage if condition == "image" else f"{stage}_{condition}": found[condition]["perplexity"]
        for stage, found in results.items()
        for condition in _CONDITIONS
    }
    scores |= {f"{stage}_bits_per_byte": found["image"]["bits_per_byte"] for stage, found in results.items()}
    return {"settings": [found["settings"] for found in results.values()][-1], **scores, "stages": dict(results)}


def write(folder: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """``results.json`` with ``facts`` and a row for each encoder, and ``results.png``.

    Args:
        folder: where they go.
        facts: of the whole comparison.
        rows: of ``row``.
    """
    text = json.dumps({**provenance(), **facts, "measure": MEASURE, "encoders": list(rows)}, indent=1)
    atomic_write.write(folder / "results.json", text)
    atomic_write.write(folder / "results.png", picture(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each encoder and stage."""
    lines = [f"{'encoder':40} {'stage':5} {'PPL':>9} {'shuffled':>9} {'no image':>9} {'bits/byte':>9}"]
    for one in rows:
        for stage, found in one["stages"].items():
            values = [found[condition]["perplexity"] for condition in _CONDITIONS]
            numbers = " ".join(f"{value:9.3f}" for value in [*values, found["image"]["bits_per_byte"]])
            lines.append(f"{_short(one['settings']['encoder']):40} {stage.upper():5} {numbers}")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a panel for each stage and a line of three marks for each encoder; the first encoder is on top."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    pyplot = drawing.pyplot()
    stages = list(rows[0]["stages"])
    titles = {"ppl1": "PPL1: projector tuned", "ppl2": "PPL2: projector and LLM tuned"}
    with pyplot.rc_context({"font.size": 10}):
        size = (3 + 4.2 * len(stages), 1.9 + 0.5 * len(rows))
        figure, panels = pyplot.subplots(1, len(stages), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, stage in zip(panels[0], stages, strict=True):
            for condition, (label, marker, colour) in _CONDITIONS.items():
                values = [one["stages"][stage][condition]["perplexity"] for one in rows]
                axes.scatter(values, range(len(rows)), s=60, marker=marker, color=colour, label=label, zorder=2)
            for place, one in enumerate(rows):
                value = one["stages"][stage]["image"]["perplexity"]
                axes.annotate(
                    f"{value:.3g}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9
                )
            axes.margins(x=0.1)
            shown = [one["stages"][stage][condition]["perplexity"] for one in rows for condition in _CONDITIONS]
            if max(shown) > 5 * min(shown):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(len(rows) - 0.5, -0.7)
            axes.grid(axis="y", color="#e5e5e5", zorder=0)
            axes.set_xlabel("perplexity, held out (lower is better)")
            axes.set_title(titles[stage], fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_yticks(range(len(rows)), [_short(one["settings"]["encoder"]) for one in rows])
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        pyplot.close(figure)
    return content.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"
