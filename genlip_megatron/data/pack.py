"""Packing: samples wait in a look-ahead buffer and fill packs, the oldest first, then those that fit best.

Plain lists and bisection: at a few hundred waiting samples a pack costs less so than by arrays.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

# Room for so many of the longest samples is filled by chosen ones instead of the oldest.
_CHOSEN_SAMPLES = 4
_PAIR_CANDIDATES = 8
_LENGTH_SHIFT = 40


class Buffer:
    """Samples that wait for a pack, by age and by length."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}  # key -> sample, oldest first; a key is (length, number of arrival)
        self.keys: list[int] = []  # ascending
        self.tokens = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, ids: Iterable[int], lengths: Iterable[int]) -> None:
        """Let samples wait, in order of arrival."""
        for sample, length in zip(ids, lengths, strict=True):
            key = length << _LENGTH_SHIFT | self._arrivals
            self._arrivals += 1
            self.ids[key] = sample
            self.keys.append(key)
            self.tokens += length
        self.keys.sort()

    def oldest(self) -> int:
        """Position of the sample that has waited longest."""
        return bisect.bisect_left(self.keys, next(iter(self.ids)))

    def longest_within(self, room: int) -> int:
        """Position of the longest, and among those the youngest, sample of at most ``room`` tokens; -1: none."""
        return bisect.bisect_left(self.keys, (room + 1) << _LENGTH_SHIFT) - 1

    def length(self, position: int) -> int:
        """Tokens of the sample at a position."""
        return self.keys[position] >> _LENGTH_SHIFT

    def take(self, position: int) -> tuple[int, int]:
        """(sample, its length), no longer waiting."""
        key = self.keys.pop(position)
        length = key >> _LENGTH_SHIFT
        self.tokens -= length
        return self.ids.pop(key), length


def fill_pack(buffer: Buffer, seq_length: int) -> list[int]:
    """Samples of the next pack of ``seq_length`` tokens, taken from the buffer; empty when none waits.

    The oldest samples go in first, so that none waits for ever and packs keep the stream's mix. What room they
    leave is shared out evenly over the samples it will hold, and its end filled by the two that leave least.

        >>> buffer = Buffer()
        >>> buffer.add([7, 8, 9], [5, 9, 3])
        >>> fill_pack(buffer, 8), fill_pack(buffer, 10), fill_pack(buffer, 10)
        ([7, 9], [8], [])
    """
    pack: list[int] = []
    room = seq_length
    if not buffer:
        return []
    reserve = _CHOSEN_SAMPLES * buffer.length(-1)
    mean = buffer.tokens / len(buffer)
    position = buffer.oldest()
    while True:
        sample, length = buffer.take(position)
        pack.append(sample)
        room -= length
        if not buffer:
            return pack
        position = buffer.oldest()
        if room - buffer.length(position) < reserve:
            break
    while buffer and (fitting := buffer.longest_within(room)) >= 0:
        count = round(room / mean)
        if count > 2:
            position = min(buffer.longest_within(round(room / count)) + 1, fitting)
        else:
            position = _best_of_pair(buffer, room, fitting)
        sample, length = buffer.take(position)
        pack.append(sample)
        room -= length
    return pack


def _best_of_pair(buffer: Buffer, room: int, fitting: int) -> int:
    """Position of the sample that, with the best partner, leaves least of ``room``; at most ``fitting``.

    The longest that fits alone, or one of those nearest to half the room.
    """
    best, left = fitting, room - buffer.length(fitting)
    middle = buffer.longest_within(room // 2)
    for i in range(max(0, middle - _PAIR_CANDIDATES), min(middle + _PAIR_CANDIDATES, fitting) + 1):
        rest = room - buffer.length(i)
        partner = buffer.longest_within(rest)
        if partner == i:
            partner -= 1
        if partner >= 0 and rest - buffer.length(partner) < left:
            best, left = i, rest - buffer.length(partner)
    return best
