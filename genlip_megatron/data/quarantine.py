"""Quarantine: samples that turn out bad in training are counted and written down; too many of them stop the run."""

from __future__ import annotations

import collections
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

# The first 20 bad samples are logged one by one, then every 20th; the file has them all.
_LOGGED = 20
# The fraction of bad samples is taken over at least _FEWEST samples, and over about the last _WINDOW at most.
_FEWEST, _WINDOW = 1000, 200_000

logger = logging.getLogger(__name__)


class DataFailure(RuntimeError):
    """Too many samples were bad: the fault lies with storage, mount or index."""


@dataclass(frozen=True)
class BadSample:
    """A sample that carries no loss, and why."""

    shard: str
    key: str
    reason: str
    step: int


class Quarantine:
    """Bad samples of one data-parallel rank.

    Args:
        path: JSON Lines file to append to, one line a sample; empty for none. Ranks share it: a line is one write.
        max_consecutive: stop after this many bad samples in a row; 0: never.
    """

    def __init__(self, path: str = "", max_consecutive: int = 0) -> None:
        self._path = Path(path) if path else None
        self._max_consecutive = max_consecutive
        self._in_a_row = 0
        self._found = 0
        self.total = 0
        self.records: collections.deque[BadSample] = collections.deque(maxlen=1000)

    def record(self, bad: BadSample) -> None:
        """Write down a bad sample, on the rank that found it."""
        self.records.append(bad)
        self._found += 1
        if self._found <= _LOGGED or self._found % _LOGGED == 0:
            logger.warning("sample %s of %s carries no loss: %s", bad.key, bad.shard, bad.reason)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                file.write(json.dumps(asdict(bad)).encode() + b"\n")
        except OSError as error:  # a full disk must not stop the training that survives a bad image
            logger.warning("%s cannot be written: %s", self._path, error)

    def count(self, verdicts: list[bool]) -> None:
        """Count samples in order, True for good ones, on every rank that knows of them.

        Raises:
            DataFailure: ``max_consecutive`` bad ones in a row.
        """
        for good in verdicts:
            self._in_a_row = 0 if good else self._in_a_row + 1
            self.total += not good
            if self._max_consecutive and self._in_a_row >= self._max_consecutive:
                last = f"; the last one: {self.records[-1]}" if self.records else ""
                raise DataFailure(
                    f"{self._in_a_row} samples in a row could not be used{last}. Check the storage and the index, or "
                    "raise data.max_consecutive_failures (0: never stop)"
                )


class BadShare:
    """Stops a run if the fraction of bad samples is too large, on all data-parallel ranks together.

    The fraction counts the samples since the process started, but at least 1,000: with the default of 0.01 the eleventh
    bad sample among the first 1,000 stops the run, and a single one does not stop a small run. In a long run it counts
    the last 100,000 to 200,000 samples, so it shows a fault that begins late. A restarted run counts from its start, so
    it continues after the storage was repaired.

    Args:
        most: largest fraction, from 0 (stop at the first bad sample) to 1 (never stop).
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._samples = self._bad = 0.0

    def add(self, samples: int, bad: int) -> None:
        """Count the samples of some steps, and how many of them were bad.

        Raises:
            DataFailure: they were too many; on every rank, since all count the same.
        """
        self._samples, self._bad = self._samples + samples, self._bad + max(bad, 0)
        if self._most < 1 and self._bad > self._most * max(self._samples, _FEWEST):
            raise DataFailure(
                f"{self._bad:,.0f} of the last {self._samples:,.0f} samples could not be used, more than "
                f"data.max_bad_share = {self._most:g} allows (fewer than {_FEWEST:,} samples count as {_FEWEST:,}); "
                "quarantine.jsonl in the save folder names them. Check the storage and the index, or raise "
                "data.max_bad_share (1: never stop)"
            )
        if self._samples >= _WINDOW:
            self._samples, self._bad = self._samples / 2, self._bad / 2
