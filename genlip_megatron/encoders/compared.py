"""Encoders that are compared must see equally many patches."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch

from genlip_megatron.encoders.interface import Encoder, check_equal_grids
from genlip_megatron.encoders.registry import open_encoder
from genlip_megatron.log import to_stderr

Size = TypeVar("Size", int, int | None)


def open_compared(
    options: argparse.Namespace, device: torch.device, default_size: Callable[[Encoder], Size]
) -> list[tuple[Encoder, Size]]:
    """(encoder, side of its images in pixels) of each ``--encoder``.

    Args:
        options: the flags of ``flags.add_encoder_flags``.
        device: where the weights go.
        default_size: of an encoder without ``--size``; None for native shapes.

    Raises:
        ValueError: an encoder cannot be opened or cannot read its size, or the grids are unequal.
    """
    encoders = [
        open_encoder(name, layer=options.layer, device=device, dtype=options.dtype, log=to_stderr)
        for name in options.encoder
    ]
    sizes = options.size or [default_size(encoder) for encoder in encoders]
    sizes = sizes * len(encoders) if len(sizes) == 1 else sizes
    for encoder, size in zip(encoders, sizes, strict=True):
        if size is not None:
            encoder.check_size(size, size)
    check_equal_grids(encoders, sizes, options.allow_unequal)
    return list(zip(encoders, sizes, strict=True))
