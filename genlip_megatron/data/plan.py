"""Plan: index + seed + cursor -> which samples form which pack of which step. Pure: it reads nothing.

The stream is split into a fixed number of lanes, independent of how many ranks run; lane i's packs are the same on
any number of ranks. In each epoch the data set's chunks (neighbouring samples) are permuted; the chunks of all epochs,
one after another, are dealt to the lanes in turn. A lane shuffles within a window of its samples and fills packs by
best fit over a look-ahead buffer. Lanes cross epoch ends on their own, and with fewer chunks than lanes an epoch passes
some lanes by; over an epoch of all lanes every good sample appears exactly once, whatever the sizes.
"""

from __future__ import annotations

import bisect
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

        The oldest sample goes in first, so that none waits for ever; then, again and again, the longest that fits.
        """
        self._refill(lane)
        buffer = self._lanes[lane].buffer
        if not buffer:
            return []
        lengths = self.lengths[buffer]
        pack = [0]
        room = self.seq_length - int(lengths[0])
        # Positions by (length, age): best fit is one bisection, and equal lengths leave in order of age.
        order = (np.lexsort((-np.arange(1, len(buffer)), lengths[1:])) + 1).tolist()
        sorted_lengths = lengths[order].tolist()
        while order:
            at = bisect.bisect_right(sorted_lengths, room) - 1
            if at < 0:
                break
            room -= sorted_lengths.pop(at)
            pack.append(order.pop(at))
        samples = [buffer[i] for i in pack]
        taken = set(pack)
        self._lanes[lane].buffer = [sample for i, sample in enumerate(buffer) if i not in taken]
        return samples

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
