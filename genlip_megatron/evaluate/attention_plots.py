"""Pictures of the attention analysis: mass, allocation, maps, and what else the layers tell.

Every function takes the results of ``attention_models.summarise`` of one or several models and writes a PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from genlip_megatron.evaluate import drawing
from genlip_megatron.evaluate.attention_capture import Tokens

Result = dict[str, Any]
# (group of queries, group of keys, title); Fig. 3 of the paper, then Fig. 10.
MASS = (
    ("image", "first", "image \u2192 first token"),
    ("generated", "first", "generated \u2192 first token"),
    ("generated", "image", "generated \u2192 image"),
)
ALLOCATION = (
    ("generated", "image", "generated \u2192 image"),
    ("generated", "sink", "generated \u2192 sink"),
    ("generated", "prompt", "generated \u2192 prompt"),
    ("generated", "generated", "generated \u2192 generated"),
)
EXTRAS = (
    ("gate", "mean output gate"),
    ("closed", "share of gate values < 0.05"),
    ("largest_image", "largest |activation|, image"),
    ("largest_text", "largest |activation|, text"),
    ("cosine", "mean cosine between patches"),
    ("outliers", "share of norms > 3 x median"),
)
_PANEL = 3.6, 3.0  # inches
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c510a")


def draw_mass(results: Sequence[Result], path: Path) -> None:
    """Fig. 3: attention mass on the first token and on the image, layer by layer; dashed: mean; dotted: chance."""
    figure, axes = _panels(1, len(MASS))
    for axis, (query, key, title) in zip(axes.flat, MASS, strict=True):
        _draw_curves(axis, results, "mass", query, key)
        axis.set(title=title, ylabel="attention mass")
    _finish(
        figure, results, path, "solid: layer; dashed: mean over layers; dotted: chance, equal attention to all keys"
    )


def draw_allocation(results: Sequence[Result], path: Path) -> None:
    """Fig. 10: where generated tokens look, as mass (above) and as density, mass / size of the group (below)."""
    figure, axes = _panels(2, len(ALLOCATION))
    for row, what in enumerate(("mass", "density")):
        for axis, (query, key, title) in zip(axes[row], ALLOCATION, strict=True):
            _draw_curves(axis, results, what, query, key)
            axis.set(title=title, ylabel=f"attention {what}")
    _finish(
        figure,
        results,
        path,
        "sink: first two of the prompt; density: mass / tokens of the group; dashed: mean over layers; dotted: chance",
    )


def draw_extras(results: Sequence[Result], path: Path) -> None:
    """Gates, largest activations, cosine between patches, and norms of patches."""
    figure, axes = _panels(2, 4)
    panels = list(axes.flat)
    for axis, (name, title) in zip(panels, EXTRAS, strict=False):
        for number, result in enumerate(results):
            if values := _numbers(result.get(name)):
                axis.plot(range(1, len(values) + 1), values, color=_colour(number), marker=_marker(values))
        low, high = axis.get_ylim()
        if "largest" in name and axis.lines and high > 30 * max(low, 1e-6):
            axis.set_yscale("log")
        elif "share" in title:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="layer")
        _say_if_empty(axis)
    axis = panels[len(EXTRAS)]
    for number, result in enumerate(results):
        edges, share = np.array(result["norms"]["edges"]), np.array(result["norms"]["share"])
        axis.stairs(share, edges, color=_colour(number))
    axis.set(title="norms of patches, last layer", xlabel="norm / median of its image", ylabel="share", xscale="log")
    panels[-1].axis("off")
    _finish(figure, results, path, "activations: largest over images; other curves: mean over images")


def draw_maps(name: str, maps: dict[int, Tensor], tokens: Tokens, path: Path) -> None:
    """Fig. 11: attention of every query (row) to every key (column), averaged over heads.

    Args:
        name: of the model.
        maps: {number of the layer, from 1: float32 [S, S]}.
        tokens: the sequence; white lines are drawn between its groups.
        path: PNG file.
    """
    from matplotlib.colors import LogNorm

    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(
        1, len(maps), figsize=(3.4 * len(maps) + 1.2, 4.4), squeeze=False, layout="constrained"
    )
    sizes = {name: size for name, size in tokens.sizes().items() if name not in ("first", "sink") and size}
    borders = np.cumsum([0, *sizes.values()])
    for axis, (layer, values) in zip(axes.flat, sorted(maps.items()), strict=True):
        picture = axis.imshow(np.maximum(values.numpy(), 1e-4), cmap="magma", norm=LogNorm(1e-4, 1))
        for border in borders[1:-1] - 0.5:
            axis.axhline(border, color="white", linewidth=0.8)
            axis.axvline(border, color="white", linewidth=0.8)
        middles, labels = (borders[:-1] + borders[1:] - 1) / 2, list(sizes)
        axis.set_xticks(middles, labels, rotation=45, ha="right")
        axis.set_yticks(middles, labels if axis is axes[0, 0] else [""] * len(labels))
        axis.tick_params(length=0)
        axis.set_title(f"layer {layer}")
    axes[0, 0].set_ylabel("queries")
    figure.supxlabel("keys", fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="attention, mean over heads")
    figure.suptitle(f"{_short(name)}: {len(tokens)} tokens")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    pyplot = drawing.pyplot()
    size = (_PANEL[0] * columns, _PANEL[1] * rows + 0.9)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, axes


def _draw_curves(axis: Any, results: Sequence[Result], what: str, query: str, key: str) -> None:
    """One panel: a line for each model, its mean, and the labelled level of chance."""
    levels: dict[str, float] = {}
    for number, result in enumerate(results):
        values = _numbers(result[what][query][key]) if what in result else []
        if not values:
            continue
        layers = range(1, len(values) + 1)
        axis.plot(layers, values, color=_colour(number), marker=_marker(values))
        axis.axhline(float(np.nanmean(values)), color=_colour(number), linestyle="--", linewidth=1)
        chance = result[f"chance_{what}"][query][key]
        levels.setdefault(f"{chance:.3g}", chance)
    for text, level in levels.items():
        axis.axhline(level, color="grey", linestyle=":", linewidth=1.2)
        axis.plot([], [], color="grey", linestyle=":", label=f"chance {text}")
    if levels:
        axis.set_ylim(bottom=0, top=1.28 * axis.get_ylim()[1])  # room for the legend above the curves
        axis.legend(loc="upper right", fontsize=8, frameon=False, ncols=min(len(levels), 3))
    axis.set_xlabel("layer")
    _say_if_empty(axis)


def _say_if_empty(axis: Any) -> None:
    if axis.lines:
        axis.xaxis.get_major_locator().set_params(integer=True)
        return
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, "not applicable", transform=axis.transAxes, ha="center", va="center", color="grey")


def _finish(figure: Any, results: Sequence[Result], path: Path, note: str) -> None:
    """Add the legend of models and the note below the panels, and write the file."""
    from matplotlib.lines import Line2D
    from matplotlib.pyplot import close

    lines = [Line2D([], [], color=_colour(number)) for number in range(len(results))]
    names = [_short(result["name"]) for result in results]
    columns = max(1, min(len(names), 200 // (8 + max(map(len, names)))))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, title=note, title_fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    close(figure)


def _numbers(values: Sequence[float | None] | None) -> list[float]:
    """Numbers with NaN for None; [] if there are none."""
    numbers = [float("nan") if value is None else float(value) for value in values or ()]
    return [] if np.isnan(numbers).all() else numbers


def _marker(values: Sequence[float]) -> str:
    return "." if len(values) <= 48 else ""


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 48 else "\u2026" + name[-47:]
