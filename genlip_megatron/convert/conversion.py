"""Both directions: which tensors are written, in what dtype, and the loop that moves them a parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint.manifest import Manifest
from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.megatron_source import MegatronSource
from genlip_megatron.convert.safetensors_file import Planned, SafetensorsWriter
from genlip_megatron.convert.source import Source
from genlip_megatron.convert.table import TEXT_ONLY, groups


def open_checkpoint(
    path: Path, log: Callable[[str], None], progress: Callable[[int], Any]
) -> tuple[Path, Manifest, MegatronSource]:
    """(checkpoint, its manifest, its weights) of the newest good checkpoint in a run's folder, or of ``path`` itself.

    Every file is read and compared with the manifest first; ``progress`` is told the bytes of each.

    Raises:
        ValueError: no checkpoint there, none that is good, or one whose tensors are not its model's.
    """
    found = loading.find(path, True, log, progress)
    if found is None:
        raise ValueError(f"{path}: no checkpoint there; expected a folder iter_NNNNNNN, or the folder of a run with some")
    place, saved = found
    return place, saved, MegatronSource(place, saved, loading.read_config(place).model)


def in_encoder(name: str) -> bool:
    """Whether a canonical tensor belongs to the vision encoder alone."""
    return not name.startswith(TEXT_ONLY)


def planned(source: Source, dtype: torch.dtype | None, encoder_only: bool) -> dict[str, Planned]:
    """What an export writes: canonical name -> shape and dtype, in the order in which it is read.

    Args:
        dtype: of all tensors; None keeps that of each.
        encoder_only: leave out the text's embedding, projections and head.
    """
    return {
        name: Planned(shape, dtype or source.dtypes[name])
        for group in groups(source.model)
        for name, shape in zip(group.canonical, group.shapes, strict=True)
        if in_encoder(name) or not encoder_only
    }


def export_weights(
    source: Source,
    tensors: dict[str, Planned],
    folder: Path,
    max_shard_size: int,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write ``tensors``, which ``planned`` chose, as safetensors files into a folder.

    Raises:
        ValueError: a value does not fit its new dtype.
    """
    writer = SafetensorsWriter(folder, tensors, max_shard_size)
    for group in groups(source.model):
        wanted = [name for name in group.canonical if name in tensors]
        for name, tensor in zip(wanted, source.read(group) if wanted else (), strict=True):
            writer.write(name, tensor)
            progress(tensors[name].nbytes)
    writer.close(folder)


def parameters(model: ModelConfig) -> int:
    """Parameters of a model."""
    return sum(torch.Size(shape).numel() for group in groups(model) for shape in group.shapes)
