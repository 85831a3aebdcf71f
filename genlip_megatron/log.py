"""Messages of a run: progress on standard output, warnings on standard error.

Modules that also run in tools and workers (``genlip_megatron.data``) report through Python's ``logging`` instead.
"""

from __future__ import annotations

import shutil
import sys

_CLEAR = "\r\x1b[K"
_live = False  # whether the terminal's last line is one of ``live``


def log(text: str, every_rank: bool = False) -> None:
    """Print progress to standard output, on rank 0 only unless ``every_rank``."""
    if every_rank or _is_rank_0():
        print(f"{_cleared()}{text}", flush=True)


def live(text: str) -> None:
    """Show ``text`` in the last line of rank 0's terminal, until more is printed; nothing in a file or a pipe."""
    global _live
    if sys.stdout.isatty() and _is_rank_0():
        columns = shutil.get_terminal_size().columns
        print(f"{_CLEAR}{text[: columns - 1]}", end="", flush=True)
        _live = True


def _cleared() -> str:
    """What removes the live line."""
    global _live
    clear, _live = _CLEAR if _live else "", False
    return clear


def warn(text: str) -> None:
    """Print ``genlip: TEXT`` to standard error, on rank 0 only."""
    if _is_rank_0():
        to_stderr(f"genlip: {text}")


def to_stderr(text: str) -> None:
    """Print a line to this process's standard error."""
    print(f"{_cleared() if sys.stderr.isatty() else ''}{text}", file=sys.stderr, flush=True)


def _is_rank_0() -> bool:
    import torch  # not at the top: settings are checked before torch is loaded

    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
