"""A resolution sweep: one tool's scores at several image sizes, from the folders of its results."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genlip_megatron import atomic_write
from genlip_megatron.encoders.flags import AFTER_NORM
from genlip_megatron.encoders.interface import Encoder, check_equal_grids
from genlip_megatron.encoders.registry import open_encoder
from genlip_megatron.evaluate import report_plots
from genlip_megatron.evaluate.attention_capture import KEY_GROUPS, QUERY_GROUPS
from genlip_megatron.evaluate.attention_models import CURVES
from genlip_megatron.evaluate.probe_results import provenance

_FACTS = "sweep.json"
_KIND = "genlip sweep"
# Results of one size: file -> (key of its rows, measure without --measure).
_FILES = {"results.json": ("encoders", ""), "attention.json": ("models", "mass.image.first")}
# Numbers in the rows of a tool with its task, * for any key; (): it measures none. Others are known after a size.
_COMMON = ("settings.*", "seconds", "steps", "train_images", "held_out_images", "val_images")
_HEADS = ("held_out_accuracy", "learning_rate", "weight_decay", "neighbours")
_PPL = ("ppl?", "ppl?_shuffled", "ppl?_without_image", "ppl?_bits_per_byte", "stages.ppl?.*", "settings.*")
_GROUPS = [f"{query}.{key}" for query in QUERY_GROUPS for key in KEY_GROUPS]
_MEASURES: dict[str, tuple[str, ...]] = {
    "probe.py classify": ("accuracy", *_HEADS, *_COMMON),
    "probe.py segment": ("miou", "pixel_accuracy", "iou", "held_out_miou", "neighbours", *_COMMON),
    "zeroshot.py classify": ("accuracy", "accuracies.*.*", "per_class.*", "settings.*"),
    "zeroshot.py retrieve": ("recall_at_1", "image_to_text", "text_to_image", "recalls.*.*.*", "settings.*"),
    "zeroshot.py select": (),
    "zeroshot.py captions": ("loss", "bits_per_byte", "tokens", "attributes.*", "settings.*"),
    "perplexity.py": _PPL,
    "attention.py": (
        *(f"{table}.{group}" for table in ("mass", "density", "chance_mass", "chance_density") for group in _GROUPS),
        *(f"tokens.{key}" for key in KEY_GROUPS),
        *(*CURVES, "images", "layers", "step", "norms.share", "norms.edges"),
    ),
    "extract_features.py": (),
    "patch_readout.py": (),
}


def check_measure(tool: str, task: str, measure: str) -> None:
    """Check what can be known before a size runs.

    Args:
        tool: name of its file.
        task: its subcommand; "": it has none.
        measure: as ``collect`` takes it.

    Raises:
        ValueError: the tool measures no encoder, or its rows have no such number.
    """
    name = f"{tool} {task}".strip()
    known = _MEASURES.get(name)
    if known is None:
        return
    if not known:
        raise ValueError(
            f"-- tools/{name}: measures no encoder. Name probe.py, zeroshot.py, perplexity.py, attention.py."
        )
    if measure and not any(fnmatch.fnmatchcase(measure, pattern) for pattern in known):
        near = difflib.get_close_matches(measure, known, 3, 0) if len(known) > 20 else known
        raise ValueError(f"--measure {measure}: tools/{name} has no such number. Allowed are {', '.join(near)}.")


def size_folder(output: Path, size: int) -> Path:
    """The folder of one size's results."""
    return output / f"size-{size}"


def finished(output: Path, size: int) -> bool:
    """Whether a size has results."""
    return any((size_folder(output, size) / file).is_file() for file in _FILES)


def open_and_check(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    layer: str = AFTER_NORM,
    allow_unequal: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, str], dict[int, tuple[int, int]]]:
    """({encoder: fingerprint}, {size: grid of the first encoder}).

    Args:
        names: as ``--encoder`` takes them.
        sizes: sides of the images in pixels.
        layer: as ``--layer`` takes it.
        allow_unequal: encoders may see different numbers of patches.
        log: as ``open_encoder`` takes it.

    Raises:
        ValueError: an encoder cannot be opened or cannot read one of the sizes, or the grids are unequal.
    """
    encoders: list[Encoder] = [open_encoder(name, layer=layer, log=log) for name in names]
    for size in sizes:
        for encoder in encoders:
            encoder.check_size(size, size)
        check_equal_grids(encoders, [size] * len(encoders), allow_unequal)
    return {one.name: one.fingerprint for one in encoders}, {size: encoders[0].grid(size, size) for size in sizes}


def begin(output: Path, words: Sequence[str], fingerprints: Mapping[str, str]) -> None:
    """Start or continue a sweep in a folder.

    Args:
        output: the folder.
        words: command line of the tool, without size and output.
        fingerprints: of the encoders, by name.

    Raises:
        ValueError: the folder holds a sweep of another command or of other weights.
    """
    path = output / _FACTS
    facts = {"kind": _KIND, "tool": list(words), "fingerprints": dict(fingerprints)}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, what in (("tool", "another command"), ("fingerprints", "other weights of the encoders")):
            if found.get(key) != facts[key]:
                raise ValueError(
                    f"--output {output}: holds a sweep of {what}. Name another folder, or remove this one."
                )
    output.mkdir(parents=True, exist_ok=True)
    atomic_write.write(path, json.dumps(facts, indent=1))


def collect(output: Path, sizes: Sequence[int], measure: str) -> tuple[str, dict[str, dict[int, float]]]:
    """(measure, {encoder: {size: score}}) of the finished sizes.

    Args:
        output: folder of the sweep.
        sizes: those of the sweep.
        measure: key in the rows of results, with dots for inner keys; "": that of the results. Of a list, such as
            a number for each layer, the mean is taken.

    Raises:
        ValueError: the results have no such measure.
    """
    scores: dict[str, dict[int, float]] = {}
    for size in filter(lambda size: finished(output, size), sizes):
        folder = size_folder(output, size)
        file = next(file for file in _FILES if (folder / file).is_file())
        facts = json.loads((folder / file).read_text(encoding="utf-8"))
        key, default = _FILES[file]
        measure = measure or str(facts.get("measure", default))
        for row in facts[key]:
            name = str(row["settings"]["encoder"] if "settings" in row else row["name"])
            scores.setdefault(name, {})[size] = _score(row, measure, folder / file)
    return measure, scores


def _score(row: Any, measure: str, path: Path) -> float:
    value = row
    for part in measure.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    values = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, (int, float))]
    if not values:
        known = ", ".join(name for name, one in row.items() if isinstance(one, (int, float, list)))
        raise ValueError(f"--measure {measure}: {path} has no such number. Numbers in its rows: {known}.")
    return sum(values) / len(values)


def write(
    output: Path,
    words: Sequence[str],
    measure: str,
    scores: Mapping[str, Mapping[int, float]],
    fingerprints: Mapping[str, str],
    grids: Mapping[int, tuple[int, int]],
) -> None:
    """``results.json`` with the scores of each encoder by size, and ``results.png`` with a curve for each."""
    rows = [
        {"settings": {"encoder": name, "fingerprint": fingerprints.get(name)}, "scores": found}
        for name, found in scores.items()
    ]
    facts = {"kind": _KIND, "tool": " ".join(words), "measure": measure, "grids": grids, "encoders": rows}
    atomic_write.write(output / "results.json", json.dumps({**provenance(), **facts}, indent=1))
    atomic_write.write(output / "results.png", report_plots.sweep(scores, measure))
