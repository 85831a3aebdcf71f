"""The slots of a micro-batch that a rank holds.

Context-parallel ranks hold equal parts of the S slots, in order. With sequence parallelism the tensor-parallel ranks
divide each part again. So a sample may begin on one rank and end on another.
"""

from __future__ import annotations

from typing import Any


def slot_share(total: int, group: Any) -> slice:
    """This rank's slots of ``total``; the ranks of ``group`` hold equal parts (None: this rank holds all)."""
    if group is None:
        return slice(0, total)
    share = total // group.size()
    return slice(group.rank() * share, (group.rank() + 1) * share)


def local_slots(total: int, context: Any, tensor: Any) -> slice:
    """This rank's slots of ``total``: the context-parallel group divides them, then the tensor-parallel group.

    A group of None does not divide the sequence.
    """
    outer = slot_share(total, context)
    inner = slot_share(outer.stop - outer.start, tensor)
    return slice(outer.start + inner.start, outer.start + inner.stop)
