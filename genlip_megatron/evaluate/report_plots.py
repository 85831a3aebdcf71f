"""Pictures of the report and of sweeps: curves over steps, histograms, and scores over image sizes.

Each shows one panel, 5 inches wide, so that its text is readable on a page of 400 pixels.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlip_megatron.evaluate import drawing
from genlip_megatron.evaluate.run_log import RunLog

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c510a")
_MARKS = {"resumed": ":", "rolled back": "-."}
_LOG_SCALE = 30.0  # ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Panel:
    """A picture of some of a run's curves.

    Attributes:
        title: above the picture.
        unit: label of the vertical axis.
        tags: TensorBoard tag -> label.
    """

    title: str
    unit: str
    tags: Mapping[str, str]


PANELS = (
    Panel("Loss", "loss per answer token", {"lm loss": "training", "lm loss validation": "validation"}),
    Panel("Throughput", "tokens per second", {"tokens-per-second": "tokens/s"}),
    Panel("Arithmetic", "TFLOP/s per rank", {"throughput": "TFLOP/s"}),
    Panel("Time of a step", "seconds", {"iteration-time": "step", "data-wait": "longest wait for data"}),
    Panel("Gradient norm", "norm before clipping", {"grad-norm": "gradient norm"}),
    Panel("Learning rate", "learning rate", {"learning-rate": "learning rate"}),
)


@contextmanager
def _figure() -> Iterator[tuple[Any, io.BytesIO]]:
    """(axes, the PNG once the block has ended)."""
    pyplot = drawing.pyplot()
    content = io.BytesIO()
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(5, 3.3), layout="constrained")
        yield axes, content
        # The layout may be decided before the last tick labels; "tight" never cuts a label.
        figure.savefig(content, format="png", dpi=192, bbox_inches="tight")
        pyplot.close(figure)


def curves(log: RunLog, panel: Panel) -> bytes | None:
    """The curves of a panel; steps that were repeated in grey, resumes and rollbacks as vertical lines.

    Returns None if the run logged none of them.
    """
    drawn = {label: log.curves[tag] for tag, label in panel.tags.items() if tag in log.curves}
    if not any(curve.kept for curve in drawn.values()):
        return None
    from matplotlib import ticker

    with _figure() as (axes, content):
        grey = "repeated steps"
        for curve in drawn.values():
            for points in curve.repeated:
                axes.plot(*_columns(points), color="#bbbbbb", linewidth=1, label=grey)
                grey = "_"
        for colour, (label, curve) in zip(_COLOURS, drawn.items(), strict=False):
            steps, values = _columns(curve.kept)
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, color=colour, linewidth=1.3, marker=marker, markersize=3, label=label)
        for kind, style in _MARKS.items():
            label = kind
            for step in {mark.step for mark in log.marks if mark.kind == kind}:
                axes.axvline(step, color="#555555", linestyle=style, linewidth=1, label=label)
                label = "_"
        values = [value for curve in drawn.values() for _, value in curve.kept if np.isfinite(value)]
        if values and min(values) > 0 and max(values) > _LOG_SCALE * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set(xlabel="step", ylabel=panel.unit)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=10)
    return content.getvalue()


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """(steps, values), sorted by step."""
    ordered = sorted(points, key=lambda point: point[0])
    return [step for step, _ in ordered], [value for _, value in ordered]


def histogram(counts: np.ndarray, bins: Sequence[int], label: str) -> bytes:
    """Shares of samples by value.

    Args:
        counts: int64 [n]; element i counts the samples of value i.
        bins: edges of the bars; the last bar has no upper limit.
        label: what is counted.
    """
    pairs = list(itertools.pairwise([*bins, len(counts)]))
    shares = [100 * int(counts[low:high].sum()) / max(int(counts.sum()), 1) for low, high in pairs]
    names = [f"{low}+" if high == len(counts) else f"<{high}" for low, high in pairs]
    with _figure() as (axes, content):
        axes.bar(range(len(shares)), shares, color=_COLOURS[0])
        axes.set_xticks(range(len(shares)), names, rotation=45)
        axes.set(xlabel=label, ylabel="% of samples")
    return content.getvalue()


def sweep(scores: Mapping[str, Mapping[int, float]], measure: str) -> bytes:
    """Scores over image sizes.

    Args:
        scores: encoder -> {side of the images in pixels: score}.
        measure: what the scores are.
    """
    with _figure() as (axes, content):
        for colour, (name, found) in zip(itertools.cycle(_COLOURS), scores.items(), strict=False):
            sizes = sorted(found)
            label = name if len(name) <= 40 else f"...{name[-37:]}"
            axes.plot(sizes, [found[size] for size in sizes], marker="o", color=colour, label=label)
        axes.set_xticks(sorted({size for found in scores.values() for size in found}))
        axes.tick_params(axis="x", labelrotation=45)
        axes.set(xlabel="side of the images, pixels", ylabel=measure)
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=10)
    return content.getvalue()
