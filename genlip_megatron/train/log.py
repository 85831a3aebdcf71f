"""Lines that a run prints once: only rank 0 prints."""

from __future__ import annotations

import sys

import torch


def log(text: str) -> None:
    """Print to stdout on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Print to stderr on rank 0."""
    if torch.distributed.get_rank() == 0:
        print(f"genlip: {text}", file=sys.stderr, flush=True)
