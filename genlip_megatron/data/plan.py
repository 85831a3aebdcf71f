"""Plan: index + seed + cursor -> which samples form which pack of which step. Pure: it reads nothing.

The stream is split into a fixed number of lanes, independent of how many ranks run; lane i's packs are the same on
any number of ranks. In each epoch the data set's chunks (neighbouring samples) are permuted; the chunks of all epochs,
one after another, are dealt to the lanes in turn. A lane shuffles within a window of its samples and fills packs by
best fit over a look-ahead buffer. Lanes cross epoch ends on their own, and with fewer chunks than lanes an epoch passes
some lanes by; over an epoch of all lanes every good sample appears exactly once, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class _Lane:
    epoch: int = 0
    position: int = 0  # samples of the epoch's order that have entered the buffer
    buffer: list[int] = field(default_factory=list)  # sample ids, oldest first
    order: np.ndarray | None = None  # of the current epoch, derived


class Plan:
    """Packs of sample ids, lane by lane.

    Args:
        lengths: int [samples], tokens of each sample, at most ``seq_length``.
        seq_length: tokens of a pack.
        lanes: packs of one step; lane i is row i of every step.
        seed: of every permutation.
        chunk_size, shuffle_window, pack_buffer: see ``DataConfig``.
        fingerprint: of the index; a cursor of another data set is refused.
        shuffle: False keeps the samples in order (validation).
        epochs: after so many epochs a lane gives empty packs; None goes on for ever.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_length: int,
        lanes: int,
        seed: int,
        chunk_size: int = 256,
        shuffle_window: int = 4096,
        pack_buffer: int = 512,
        fingerprint: str = "",
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("the data set has no good sample; see the report of tools/prepare_data.py")
        if int(lengths.max()) > seq_length:
            raise ValueError(f"a sample of {int(lengths.max())} tokens is longer than data.seq_length = {seq_length}")
        self.lengths = lengths
        self.seq_length = seq_length
        self.seed, self.fingerprint, self.shuffle = seed, fingerprint, shuffle
        self.epochs = epochs
        self.chunk_size, self.shuffle_window, self.pack_buffer = chunk_size, shuffle_window, pack_buffer
        self._lanes = [_Lane() for _ in range(lanes)]

    def _order(self, lane: int, epoch: int) -> np.ndarray:
        """Sample ids dealt to a lane in an epoch, in the order in which they enter its buffer."""
        chunks = -(-len(self.lengths) // self.chunk_size)
        lanes = len(self._lanes)
        first = (lane - epoch * chunks) % lanes
        if not self.shuffle:
            return self._samples(np.arange(chunks)[first::lanes])
        permuted = np.random.default_rng((self.seed, 0, epoch)).permutation(chunks)
        order = self._samples(permuted[first::lanes])
        random = np.random.default_rng((self.seed, 1, epoch, lane))
        for start in range(0, len(order), self.shuffle_window):
            random.shuffle(order[start : start + self.shuffle_window])
        return order

    def _samples(self, chunks: np.ndarray) -> np.ndarray:
        ids = (chunks[:, None] * self.chunk_size + np.arange(self.chunk_size)).ravel()
        return ids[ids < len(self.lengths)]

    def _refill(self, lane: int) -> None:
        state = self._lanes[lane]
        while len(state.buffer) < self.pack_buffer and state.epoch != self.epochs:
            if state.order is None:
                state.order = self._order(lane, state.epoch)
            if state.position >= len(state.order):
                state.epoch, state.position, state.order = state.epoch + 1, 0, None
                continue
            take = self.pack_buffer - len(state.buffer)
            fresh = state.order[state.position : state.position + take]
            state.buffer.extend(fresh.tolist())
            state.position += len(fresh)

    def next_pack(self, lane: int) -> list[int]:
        """Sample ids of the lane's next pack.

        The oldest samples go in first, so that none waits for ever and packs keep the stream's mix. What room they
        leave is shared out evenly over the samples it will hold, and its end filled by the two that leave least.
        """
        self._refill(lane)
        state = self._lanes[lane]
        if not state.buffer:
            return []
        buffer = np.array(state.buffer)
        lengths = self.lengths[buffer]
        # Room for four of any length can be met closely by a few that are chosen.
        total = np.cumsum(lengths)
        oldest = max(1, int(np.searchsorted(total, self.seq_length - 4 * int(lengths.max()), side="right")))
        room = self.seq_length - int(total[oldest - 1])
        chosen = list(range(oldest))
        by_length = oldest + np.argsort(lengths[oldest:], kind="stable")
        mean = float(lengths.mean())
        while len(best := _best_fit(lengths[by_length], room, mean)):
            chosen += by_length[best].tolist()
            room -= int(lengths[by_length[best]].sum())
            by_length = np.delete(by_length, best)
        state.buffer = np.delete(buffer, chosen).tolist()
        return buffer[chosen].tolist()

    def state_dict(self, lanes: Iterable[int]) -> dict[str, Any]:
        """The cursor of the given lanes: a few numbers each, and the ids that wait in its buffer."""
        states = {i: [self._lanes[i].epoch, self._lanes[i].position, list(self._lanes[i].buffer)] for i in lanes}
        return {"fingerprint": self.fingerprint, "seed": self.seed, "count": len(self._lanes), "lanes": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a cursor; it may hold more lanes than this rank works.

        Raises:
            ValueError: the cursor belongs to another data set, seed or number of lanes.
        """
        for name, mine in (("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint's data cursor has another {name} ({state[name]!r}, here {mine!r}): the data set "
                    "or its index changed since; restore it, or start anew with --finetune"
                )
        if state["count"] != len(self._lanes):
            raise ValueError(
                f"the checkpoint's data cursor has {state['count']} lanes, this run {len(self._lanes)} "
                "(train.global_batch_size): use the same, or start anew with --finetune"
            )
        for lane, (epoch, position, buffer) in state["lanes"].items():
            self._lanes[int(lane)] = _Lane(epoch, position, list(buffer))


def _best_fit(lengths: np.ndarray, room: int, mean: float) -> list[int]:
    """Positions of the next one or two of ``lengths`` (ascending) to fill ``room`` with; none when nothing fits.

    Room for more than two samples of ``mean`` length takes one of its even share, else the one or two that fill it
    best.

    >>> _best_fit(np.array([2, 3, 6, 9]), 10, 5), _best_fit(np.array([2, 9]), 10, 5), _best_fit(np.array([9]), 8, 9)
    ([1, 2], [1], [])
    """
    fitting = int(np.searchsorted(lengths, room, side="right"))
    if fitting == 0:
        return []
    count = round(room / mean)
    if count > 2:
        return [min(int(np.searchsorted(lengths, room / count)), fitting - 1)]
    # For each sample the longest partner after it, if one fits.
    partner = np.searchsorted(lengths[:fitting], room - lengths[:fitting], side="right") - 1
    paired = partner > np.arange(fitting)
    sums = lengths[:fitting] + np.where(paired, lengths[partner], 0)
    best = int(sums.argmax())
    return [best, int(partner[best])] if paired[best] else [best]
