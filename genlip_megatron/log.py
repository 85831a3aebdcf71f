"""Messages of a run: progress on standard output, warnings on standard error.

Modules that also run in tools and workers (``genlip_megatron.data``) report through Python's ``logging`` instead.
"""

from __future__ import annotations

import sys


def log(text: str, every_rank: bool = False) -> None:
    """Print progress to standard output, on rank 0 only unless ``every_rank``."""
    if every_rank or _is_rank_0():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print ``genlip: TEXT`` to standard error, on rank 0 only."""
    if _is_rank_0():
        to_stderr(f"genlip: {text}")


def to_stderr(text: str) -> None:
    """Print a line to this process's standard error."""
    print(text, file=sys.stderr, flush=True)


def _is_rank_0() -> bool:
    import torch  # not at the top: settings are checked before torch is loaded

    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
