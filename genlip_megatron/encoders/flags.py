"""Flags of encoders that are compared. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

AFTER_NORM, LAST_BLOCK = "after_norm", "last_block"
_HELP = (
    "a run, a checkpoint iter_NNNNNNN, an exported folder, or a transformers folder; KIND: genlip, hf (also a name on "
    "the hub), timm, open_clip, efficientnet:lite0, pixels or colour (baselines). A leading random: keeps only the "
    "shape, with random weights"
)


def add_encoder_flags(parser: argparse.ArgumentParser, default_size: str) -> None:
    """The flags of ``compared.open_compared``; ``default_size`` is that of ``--size``, for the help."""
    parser.add_argument("--encoder", required=True, nargs="+", metavar="[KIND:]WHERE", help=_HELP)
    text = f"side of the images in pixels: one for all encoders or one for each (default: {default_size})"
    parser.add_argument("--size", type=int, nargs="+", help=text)
    text = "compare encoders with different numbers of patches"
    parser.add_argument("--allow-unequal", action="store_true", help=text)
    text = f"{AFTER_NORM} (default), {LAST_BLOCK}, or -1, -2 ...: a block from the end, before the final norm"
    parser.add_argument("--layer", default=AFTER_NORM, help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, a GPU if there is one)")
    text = "dtype to compute in (default: fp32 on a CPU, bf16 on a GPU)"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)


def check_encoder_flags(options: argparse.Namespace) -> None:
    """Raise ValueError for two encoders of one name, or a wrong number of sizes."""
    check_names(options.encoder, "--encoder")
    if options.size and len(options.size) not in (1, len(options.encoder)):
        raise ValueError(
            f"--size: {len(options.size)} sizes for {len(options.encoder)} encoders. Give one, or one for each."
        )


def check_names(names: Sequence[str], flag: str) -> None:
    """Raise ValueError if the results of two of ``names`` would go to the same place."""
    if len({file_name(name) for name in names}) < len(names):
        noun = flag.removeprefix("--").replace("load", "model")
        raise ValueError(f"{flag} {' '.join(names)}: two of the same name. Name each {noun} once.")


def file_name(name: str) -> str:
    """Name of the file or folder of an encoder's results.

    >>> file_name("random:runs/so16"), file_name("hf:google/siglip2-so400m-patch16-384")
    ('random-runs-so16', 'hf-google-siglip2-so400m-patch16-384')
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "encoder"
