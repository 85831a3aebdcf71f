"""Packing: samples wait in a look-ahead buffer; a pack takes the oldest first, then those that fit best.

It uses plain lists and bisection: with a few hundred waiting samples they are faster than arrays.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

# The last room of a pack, for up to this many of the longest samples, is filled with chosen samples, not the oldest.
_CHOSEN_SAMPLES = 4
_PAIR_CANDIDATES = 8
_LENGTH_SHIFT = 40


class Buffer:
    """Samples waiting for a pack, by age and by length."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}  # key -> sample, oldest first; a key is (length, number of arrival)
        self.keys: list[int] = []  # ascending
        self.tokens = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, ids: Iterable[int], lengths: Iterable[int]) -> None:
        """Add samples, in order of arrival."""
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
        """Position of the longest sample of at most ``room`` tokens, the youngest of equals; -1: none."""
        return bisect.bisect_left(self.keys, (room + 1) << _LENGTH_SHIFT) - 1

    def length(self, position: int) -> int:
        """Tokens of the sample at a position."""
        return self.keys[position] >> _LENGTH_SHIFT

    def take(self, position: int) -> tuple[int, int]:
        """Remove a sample; returns (sample, its length)."""
        key = self.keys.pop(position)
        length = key >> _LENGTH_SHIFT
        self.tokens -= length
        return self.ids.pop(key), length


def fill_pack(buffer: Buffer, seq_length: int) -> list[int]:
    """Take the samples of the next pack of ``seq_length`` tokens from the buffer; empty if none waits.

    The oldest samples go first, so that none waits forever and packs keep the stream's mix. The remaining room
    is divided evenly among the samples that it will hold, and its end filled with the pair that leaves least.

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
    """Position (at most ``fitting``) of the sample that leaves least of ``room`` together with its best partner.

    Candidates are the longest sample that fits and those nearest to half the room.
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
