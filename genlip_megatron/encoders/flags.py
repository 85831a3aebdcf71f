"""Flags that name encoders. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

import argparse

AFTER_NORM, LAST_BLOCK = "after_norm", "last_block"
_HELP = (
    "a run, a checkpoint iter_NNNNNNN, an exported folder, or a transformers folder; KIND: genlip, hf (also a name on "
    "the hub), timm, open_clip, efficientnet:lite0, pixels or colour (baselines). A leading random: keeps only the "
    "shape, with random weights"
)


def add_encoder_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """``--encoder``, ``--layer``, ``--device`` and ``--dtype``, for ``registry.open_encoder``."""
    parser.add_argument("--encoder", required=True, nargs="+" if several else None, metavar="[KIND:]WHERE", help=_HELP)
    text = f"{AFTER_NORM} (default), {LAST_BLOCK}, or -1, -2 ...: a block from the end, before the final norm"
    parser.add_argument("--layer", default=AFTER_NORM, help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda[:N] (default: auto, a GPU if there is one)")
    text = "dtype to compute in (default: fp32 on a CPU, bf16 on a GPU)"
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
