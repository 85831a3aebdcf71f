"""Plan: index + seed + cursor -> the samples of each pack of each step. It reads only lengths.

The stream is split into a fixed number of **lanes**; lane i's packs are the same on any number of ranks. Each
**source** is cut into chunks of consecutive samples, permuted in every epoch; the chunks of all epochs, one epoch after
another, are dealt to the lanes in turn. A lane walks through its chunks in windows, shuffles the samples of a window,
draws from its sources by their weights, and fills packs from a look-ahead buffer: the oldest samples first, then those
that fit best.

Each lane crosses epoch ends at its own time, and an epoch with fewer chunks than lanes skips some lanes. Still, over an
epoch of all lanes every sample of a source appears exactly once. If a run resumes with another number of lanes, the new
lanes first use up what the old ones left of every epoch that had begun, then start the next: again exactly once.

Cost: per lane one window of ids and one buffer, and one permutation of the chunks; nothing grows with the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from genlip_megatron.data.pack import Buffer, fill_pack

# Chunks shrink until a lane gets at least this many of a source per epoch; else packs would repeat the same neighbours.
_MIN_CHUNKS_PER_LANE = 4


@dataclass(frozen=True)
class Source:
    """Samples with one weight.

    Attributes:
        size: number of samples; their local ids are 0 .. size - 1.
        lengths: function from int64 [N] local ids to int64 [N] tokens.
    """

    size: int
    lengths: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Phase:
    """From pack ``start`` of a lane (= step) on, sources are drawn in proportion to ``weights``."""

    start: int
    weights: tuple[float, ...]


def permutation(size: int, *key: int) -> np.ndarray:
    """uint32 [size], a permutation of 0 .. size - 1 keyed by up to five numbers, the same on every machine.

    It sorts draws of Philox: numpy guarantees its raw stream for all versions, but not ``Generator.permutation``.

    >>> permutation(5, 1, 2).tolist(), permutation(5, 1, 3).tolist()
    ([4, 2, 0, 1, 3], [3, 2, 4, 1, 0])
    """
    words = [*key, *[0] * (5 - len(key))]
    philox = np.random.Philox(key=np.array(words[:2], np.uint64), counter=np.array([0, *words[2:]], np.uint64))
    return np.argsort(philox.random_raw(size), kind="stable").astype(np.uint32)


def by_part(offsets: Sequence[int] | np.ndarray, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(part, which of ``ids`` lie in it, their numbers there) of each part that begins at one of ``offsets``.

    >>> {part: local.tolist() for part, _, local in by_part([0, 4, 9], np.array([5, 1, 8]))}
    {0: [1], 1: [1, 4]}
    """
    owner = np.searchsorted(offsets, ids, side="right") - 1
    for part in np.unique(owner).tolist():
        mine = owner == part
        yield part, mine, ids[mine] - offsets[part]


@dataclass
class _Walk:
    """A position in one lane's part of one source, dealt to ``lanes`` lanes; it ends after ``last_epoch``, if set."""

    lanes: int
    lane: int
    epoch: int = 0
    window: int = 0
    offset: int = 0  # samples of the window that have been drawn
    last_epoch: int | None = None


@dataclass
class _Stream:
    """What a lane draws from one source: first walks left by another number of lanes, then its own."""

    walks: list[_Walk]
    drawn: int = 0  # since the phase began
    ids: np.ndarray | None = None  # of the walk's window; computed, not part of the cursor
    lengths: np.ndarray | None = None


@dataclass
class _Lane:
    streams: list[_Stream]
    packs: int = 0
    phase: int = 0
    buffer: Buffer = field(default_factory=Buffer)


@dataclass
class Plan:
    """Packs of sample ids, lane by lane. A sample's id is its source's offset plus its local id."""

    sources: Sequence[Source]
    seq_length: int  # tokens of a pack; no sample may be longer
    lanes: int  # packs of one step; lane i is row i of every step
    seed: int  # of all permutations
    phases: Sequence[Phase] = ()  # weights by first step, starting with step 0; by default the sources' sizes
    chunk_size: int = 256  # this and the next two: see ``DataConfig``
    shuffle_window: int = 4096
    pack_buffer: int = 512
    fingerprint: str = ""  # of the data; a cursor of other data is refused
    shuffle: bool = True  # False keeps the samples in order and deals them one by one (validation)
    epochs: int | None = None  # after which a lane gives empty packs; None: endless

    def __post_init__(self) -> None:
        sizes = [source.size for source in self.sources]
        assert all(sizes), "a source without a good sample"
        self.offsets = np.cumsum([0, *sizes]).tolist()
        self.phases = self.phases or [Phase(0, tuple(map(float, sizes)))]
        self._lanes: dict[int, _Lane] = {}
        self._permutations: dict[tuple[int, int, int], np.ndarray] = {}

    # Dealing: which samples of a source a lane gets, and in which order.

    def chunk(self, source: int, lanes: int) -> int:
        """Number of consecutive samples of a source that are dealt together to one of ``lanes``."""
        if not self.shuffle:
            return 1
        return max(1, min(self.chunk_size, self.sources[source].size // (_MIN_CHUNKS_PER_LANE * lanes)))

    def _permuted(self, source: int, epoch: int, chunks: int) -> np.ndarray:
        """Order of a source's chunks in an epoch. A few are cached, since lanes cross epoch ends at different times."""
        key = (source, epoch, chunks)
        if key not in self._permutations:
            while len(self._permutations) >= 2 * len(self.sources) + 2:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[key] = permutation(chunks, self.seed, source, 0, epoch)
        return self._permutations[key]

    def _window(self, source: int, walk: _Walk) -> np.ndarray | None:
        """Local ids of the walk's window in drawing order; None after the end of the epoch."""
        size, chunk = self.sources[source].size, self.chunk(source, walk.lanes)
        chunks = -(-size // chunk)
        # Dealing continues where the previous epoch stopped, so the remainder does not always go to the same lanes.
        first = (walk.lane - walk.epoch * chunks) % walk.lanes
        per_window = max(1, self.shuffle_window // chunk)
        start = first + walk.window * per_window * walk.lanes
        if start >= chunks:
            return None
        mine = np.arange(start, min(chunks, start + per_window * walk.lanes), walk.lanes)
        if self.shuffle:
            mine = self._permuted(source, walk.epoch, chunks)[mine].astype(np.int64)
        ids = (mine[:, None] * chunk + np.arange(chunk)).ravel()
        ids = ids[ids < size]
        if self.shuffle:
            # The key omits the number of lanes, because the chunk order already depends on it.
            ids = ids[permutation(len(ids), self.seed, source, 1, walk.epoch, walk.lane << 32 | walk.window)]
        return ids

    def _take(self, number: int, stream: _Stream, count: int) -> tuple[list[int], list[int]]:
        """(ids, lengths) of a stream's next ``count`` samples; fewer only at the end of the last epoch."""
        ids: list[int] = []
        lengths: list[int] = []
        while len(ids) < count and stream.walks:
            walk = stream.walks[0]
            if stream.ids is None:
                window = self._window(number, walk)
                if window is None:
                    walk.epoch, walk.window, walk.offset = walk.epoch + 1, 0, 0
                    if walk.last_epoch is not None and walk.epoch > walk.last_epoch:
                        stream.walks.pop(0)
                    continue
                stream.ids, stream.lengths = window + self.offsets[number], self._lengths(number, window)
            assert stream.lengths is not None
            end = walk.offset + count - len(ids)
            ids += stream.ids[walk.offset : end].tolist()
            lengths += stream.lengths[walk.offset : end].tolist()
            walk.offset = min(end, len(stream.ids))
            if walk.offset == len(stream.ids):
                walk.window, walk.offset, stream.ids, stream.lengths = walk.window + 1, 0, None, None
        stream.drawn += len(ids)
        return ids, lengths

    def _lengths(self, number: int, window: np.ndarray) -> np.ndarray:
        lengths = self.sources[number].lengths(window)
        if len(lengths) and int(lengths.max()) > self.seq_length:
            raise ValueError(
                f"a sample of {int(lengths.max())} tokens is longer than data.seq_length = {self.seq_length}"
            )
        return lengths

    # Drawing from the sources by weight.

    def _lane(self, lane: int) -> _Lane:
        if lane not in self._lanes:
            last = None if self.epochs is None else self.epochs - 1
            self._lanes[lane] = _Lane([_Stream([_Walk(self.lanes, lane, last_epoch=last)]) for _ in self.sources])
        return self._lanes[lane]

    def _refill(self, lane: int) -> None:
        state = self._lane(lane)
        while state.phase + 1 < len(self.phases) and state.packs >= self.phases[state.phase + 1].start:
            state.phase += 1
            for stream in state.streams:
                stream.drawn = 0
        if len(state.buffer) > self.pack_buffer - self.pack_buffer // 8:
            return  # few large draws are cheaper than many small ones
        while (missing := self.pack_buffer - len(state.buffer)) > 0:
            weights = self.phases[state.phase].weights
            open_ = [i for i, stream in enumerate(state.streams) if stream.walks and weights[i] > 0]
            if not open_:
                return
            if len(open_) == 1:
                state.buffer.add(*self._take(open_[0], state.streams[open_[0]], missing))
                continue
            order = self._due(lane, state, open_, missing)
            drawn = {}
            for i in open_:
                ids, lengths = self._take(i, state.streams[i], order.count(i))
                drawn[i] = iter(zip(ids, lengths, strict=True))
            # A source that ends here skips its turns; the next round draws from the others.
            mixed = [pair for i in order if (pair := next(drawn[i], None)) is not None]
            state.buffer.add([pair[0] for pair in mixed], [pair[1] for pair in mixed])

    def _due(self, lane: int, state: _Lane, sources: list[int], count: int) -> list[int]:
        """The next ``count`` sources to draw from, each at even distances given by its weight."""
        weights = self.phases[state.phase].weights
        due = []
        for i in sources:
            due.append((state.streams[i].drawn + np.arange(1, count + 1) - self._start(i, lane)) / weights[i])
        owners = np.repeat(sources, count)
        return owners[np.argsort(np.concatenate(due), kind="stable")[:count]].tolist()

    def _start(self, source: int, lane: int) -> float:
        """Phase in [0, 1) of a lane in a source's interval; without it all lanes would draw a rare source at once."""
        philox = np.random.Philox(
            key=np.array([self.seed, source], np.uint64), counter=np.array([0, 2, lane, 0], np.uint64)
        )
        return int(philox.random_raw()) / 2**64

    # Packing.

    def next_pack(self, lane: int) -> list[int]:
        """Sample ids of the lane's next pack; empty after the end of a finite plan."""
        self._refill(lane)
        state = self._lane(lane)
        state.packs += 1
        return fill_pack(state.buffer, self.seq_length)

    # The cursor.

    def state_dict(self, lanes: Iterable[int]) -> dict[str, Any]:
        """The cursor of the given lanes: per lane a few numbers and the ids in its buffer."""
        states: dict[int, dict[str, Any]] = {}
        for i in lanes:
            lane = self._lane(i)
            states[i] = {
                "packs": lane.packs,
                "phase": lane.phase,
                "drawn": [stream.drawn for stream in lane.streams],
                "walks": [[list(astuple(walk)) for walk in stream.walks] for stream in lane.streams],
                "buffer": list(lane.buffer.ids.values()),
            }
        phases = [[phase.start, list(phase.weights)] for phase in self.phases]
        return {**self._identity(), "phases": phases, "count": self.lanes, "lanes": states}

    def _identity(self) -> dict[str, Any]:
        """The settings for which a cursor is valid."""
        names = ("fingerprint", "seed", "chunk_size", "shuffle_window", "pack_buffer", "seq_length")
        return {name: getattr(self, name) for name in names} | {"sources": [source.size for source in self.sources]}

    def differences(self, state: dict[str, Any]) -> list[str]:
        """The settings that differ between a cursor and this plan, one line each."""
        return [
            f"data {name}: {state.get(name)!r} in the checkpoint, {mine!r} here"
            for name, mine in self._identity().items()
            if state.get(name) != mine
        ]

    def load_state_dict(self, state: dict[str, Any], change_lanes: bool = False) -> None:
        """Continue from a cursor, which may hold more lanes than this rank works.

        Args:
            state: from ``state_dict``; with all lanes if their number changes.
            change_lanes: accept another number of lanes; the new lanes use up what the old ones left.

        Raises:
            ValueError: the cursor belongs to another data set, seed, setting or number of lanes.
        """
        if differing := self.differences(state):
            raise ValueError(
                f"the checkpoint's data cursor is of other data or another order: {'; '.join(differing)}. Restore "
                "these settings, start the data from the beginning (--change-data), or start a new run with --finetune."
            )
        old = {int(lane): cursor for lane, cursor in state["lanes"].items()}
        taken = max(cursor["packs"] for cursor in old.values())
        theirs = [(start, tuple(weights)) for start, weights in state["phases"] if start < max(taken, 1)]
        ours = [(phase.start, phase.weights) for phase in self.phases if phase.start < max(taken, 1)]
        if taken and theirs != ours:
            raise ValueError(
                f"the weights of the {taken} steps already taken were {theirs}, and are {ours} here "
                "(data.train_weights or data.train_epochs). Keep them for those steps, and change them from a later "
                "step, as in 7:3,5:5@20000."
            )
        if state["count"] == self.lanes:
            self._lanes = {i: self._restored(cursor) for i, cursor in old.items()}
        elif change_lanes:
            self._lanes = self._drained(old, state["count"])
        else:
            raise ValueError(
                f"the checkpoint's data cursor has {state['count']} lanes, this run {self.lanes} "
                "(train.global_batch_size). Use the same, or --change-lanes to deal the rest of the epoch to the new "
                "lanes, or start a new run with --finetune."
            )

    def _restored(self, cursor: dict[str, Any]) -> _Lane:
        drawn = zip(cursor["walks"], cursor["drawn"], strict=True)
        streams = [_Stream([_Walk(*walk) for walk in walks], count) for walks, count in drawn]
        lane = _Lane(streams, cursor["packs"], cursor["phase"])
        self._wait(lane, cursor["buffer"])
        return lane

    def _wait(self, lane: _Lane, ids: list[int]) -> None:
        """Append samples to a lane's buffer."""
        lengths = np.empty(len(ids), np.int64)
        for i, mine, local in by_part(self.offsets, np.array(ids)):
            lengths[mine] = self._lengths(i, local)
        lane.buffer.add(ids, lengths.tolist())

    def _drained(self, old: dict[int, dict[str, Any]], count: int) -> dict[int, _Lane]:
        """New lanes that use up what ``count`` old ones left of every epoch that had begun, then start the next."""
        if missing := set(range(count)) - old.keys():
            raise ValueError(f"the cursor lacks lanes {sorted(missing)}: it does not fit another number of lanes")
        packs, phase = max(cursor["packs"] for cursor in old.values()), max(cursor["phase"] for cursor in old.values())
        begun = [
            max(walk[2] for cursor in old.values() for walk in cursor["walks"][i]) for i in range(len(self.sources))
        ]
        lanes = {
            i: _Lane([_Stream([_Walk(self.lanes, i, last + 1)]) for last in begun], packs, phase)
            for i in range(self.lanes)
        }
        for number, cursor in sorted(old.items()):
            lane = lanes[number % self.lanes]
            for stream, walks, last in zip(lane.streams, cursor["walks"], begun, strict=True):
                left = [_Walk(*walk) for walk in walks]
                for walk in left:
                    walk.last_epoch = last if walk.last_epoch is None else walk.last_epoch
                stream.walks[-1:-1] = left
            self._wait(lane, cursor["buffer"])
        return lanes
