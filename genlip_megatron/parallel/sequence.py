"""Which slots of a micro-batch a rank holds.

Context-parallel ranks hold equal shares of the S slots, in order; with sequence parallelism the tensor-parallel ranks
share out each of these in turn. So a sample may begin on one rank and end on another.
"""

from __future__ import annotations

from typing import Any


def slot_share(total: int, group: Any) -> slice:
    """This rank's slots of ``total``, of which the ranks of ``group`` (None: this rank alone) hold equal shares."""
    if group is None:
        return slice(0, total)
    share = total // group.size()
    return slice(group.rank() * share, (group.rank() + 1) * share)


def local_slots(total: int, context: Any, tensor: Any) -> slice:
    """This rank's slots of ``total``, of which a context-parallel rank holds a share and a tensor-parallel rank a
    share of that. A group of None does not share the sequence."""
    outer = slot_share(total, context)
    inner = slot_share(outer.stop - outer.start, tensor)
    return slice(outer.start + inner.start, outer.start + inner.stop)
