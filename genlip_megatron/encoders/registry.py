"""``--encoder KIND:WHERE`` to an encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from genlip_megatron.convert.source import DTYPES
from genlip_megatron.encoders.flags import AFTER_NORM
from genlip_megatron.encoders.genlip import open_genlip
from genlip_megatron.encoders.hugging_face import open_hugging_face
from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.encoders.others import PixelEncoder, open_efficientnet, open_open_clip, open_timm

_BASELINES = ("pixels", "colour")
_KINDS = {"hf": open_hugging_face, "timm": open_timm, "open_clip": open_open_clip, "efficientnet": open_efficientnet}


def open_encoder(
    name: str,
    *,
    layer: str = AFTER_NORM,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    log: Callable[[str], None] = print,
) -> Encoder:
    """Open an encoder by the name that ``--encoder`` takes.

    Args:
        name: ``[random:][KIND:]WHERE``.
        layer: "after_norm", "last_block", or "-1", "-2" and so on.
        device: where its weights go.
        dtype: "fp32", "bf16", "fp16", or "auto": fp32 on a CPU, bf16 on a GPU; "stored": that of the
            stored weights, where the library that opens them does not make them fp32.
        log: called with a line about each damaged checkpoint that is skipped.

    Raises:
        ValueError: unknown kind, no such folder, a family that is not known, or a layer that it does not have.
    """
    device = torch.device(device)
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    kind, where, random_weights = parse_name(name)
    if kind in _BASELINES:
        if layer != AFTER_NORM or random_weights:
            raise ValueError(
                f"--encoder {name}, --layer {layer}: this baseline has no layers and no weights. Leave out --layer and "
                "random:."
            )
        return PixelEncoder(name, colour=kind == "colour")
    if kind == "genlip":
        dtype = "auto" if dtype == "stored" else dtype
        return open_genlip(where, name, layer=layer, device=device, dtype=dtype, random_weights=random_weights, log=log)
    if kind == "hf" and dtype == "stored":
        return open_hugging_face(where, name, layer=layer, device=device, dtype="auto", random_weights=random_weights)
    wanted = DTYPES["fp32" if dtype == "stored" else dtype]
    return _KINDS[kind](where, name, layer=layer, device=device, dtype=wanted, random_weights=random_weights)


def parse_name(name: str, flag: str = "--encoder") -> tuple[str, str, bool]:
    """(kind, where, whether its weights are to be random) of ``[random:][KIND:]WHERE``.

    Args:
        name: what the user wrote; without a kind, WHERE is a folder or a baseline.
        flag: named in the error.

    Raises:
        ValueError: no known kind, and no folder of this name.
    """
    rest = name.removeprefix("random:")
    kind, colon, where = rest.partition(":")
    if rest in _BASELINES:
        kind, where = rest, ""
    elif not colon or kind not in (*_KINDS, "genlip"):
        if not Path(rest).exists():
            kinds = ", ".join(("genlip:", *(f"{kind}:" for kind in _KINDS), *_BASELINES))
            raise ValueError(f"{flag} {name}: no such folder. Name a folder, or one of the kinds {kinds}.")
        kind, where = _kind_of(Path(rest)), rest
    return kind, where, rest != name


def _kind_of(folder: Path) -> str:
    """The kind of a folder: "hf" if its config.json names one of the families, "timm" if timm wrote it."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "genlip"
    if not isinstance(fields, dict):
        return "genlip"
    if "pretrained_cfg" in fields:
        return "timm"
    model_type = str(fields.get("model_type", ""))
    return "hf" if model_type and "genlip" not in model_type.lower() else "genlip"
