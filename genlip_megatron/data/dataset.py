"""Data set: the shards of one source as one numbered table of samples, loaded on demand.

A **manifest** (``NAME.dataset.json``) lists indexed shards with totals and versions. Beside it is the planning file
(``NAME.dataset.plan``), 8 bytes per sample, memory-mapped. Everything else about a sample is in its shard's index,
which is opened when needed. Shards may also be named directly: then all indexes are read at the start, which works for
thousands of shards. Both ways number the samples the same and give the same stream.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from genlip_megatron import storage
from genlip_megatron.config import PATCH_SIZE, DataConfig
from genlip_megatron.data.index import PLAN_ROW, ShardIndex, load_index
from genlip_megatron.data.manifest import Part, Shard, read_manifest
from genlip_megatron.data.patterns import expand_shards, find
from genlip_megatron.data.plan import by_part
from genlip_megatron.data.resize import most_patches, native_sizes

_CLOSING_TOKENS = 2
_SCAN_ROWS = 1 << 20
_ASK_AGAIN_SECONDS = 30.0


class Dataset:
    """The good samples of one source, numbered 0 .. len - 1 through its shards in order.

    Args:
        parts: shards and their planning rows.
        data: the image resolution rule and the pack length.
        fingerprint: of the tokenizer.
        open_shards: number of shard indexes to keep open.
    """

    def __init__(self, parts: Sequence[Part], data: DataConfig, fingerprint: str, open_shards: int = 256) -> None:
        self.data, self._tokenizer = data, fingerprint
        self._plans = [part.plan for part in parts]
        self._plan_offsets = np.cumsum([0, *(len(plan) for plan in self._plans)])
        self.shards = [shard for part in parts for shard in part.shards]
        self.refused = sum(part.refused for part in parts)  # samples that indexing refused
        self._offsets = np.cumsum([0, *(shard.samples for shard in self.shards)])
        # {shard: (index or error, when to try again)}: an index that could not be read may come back.
        self._open: collections.OrderedDict[int, tuple[ShardIndex | ValueError, float]] = collections.OrderedDict()
        self._open_shards, self._lock = open_shards, threading.Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def fingerprint(self) -> str:
        """Hash of all that the stream depends on: the samples, their order and the resolution rule."""
        data = self.data
        digest = hashlib.sha256(repr((data.image_mode, data.image_size, data.min_pixels, data.max_pixels)).encode())
        for shard in self.shards:
            digest.update(shard.digest.encode())
        return digest.hexdigest()[:16]

    def plan_rows(self, ids: np.ndarray) -> np.ndarray:
        """PLAN_ROW [N] of the samples with the given int64 [N] ids."""
        if len(self._plans) == 1:
            return np.asarray(self._plans[0][ids])
        rows = np.empty(len(ids), PLAN_ROW)
        for i, mine, local in by_part(self._plan_offsets, ids):
            rows[mine] = self._plans[i][local]
        return rows

    def image_sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] heights and widths in pixels after resizing, from PLAN_ROW [N]."""
        if self.data.image_mode == "native":
            return native_sizes(rows["height"], rows["width"], self.data.min_pixels, self.data.max_pixels)
        side = np.full(len(rows), self.data.image_size, np.int64)
        return side, side

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64 [N] tokens of the samples in a pack; text that does not fit beside its image is cut."""
        rows = self.plan_rows(ids)
        heights, widths = self.image_sizes(rows)
        return np.minimum((heights // PATCH_SIZE) * (widths // PATCH_SIZE) + rows["text_tokens"], self.data.seq_length)

    def tokens(self) -> int:
        """Tokens of all samples; estimated from 64 evenly spaced blocks if there are more than a million."""
        blocks, size = (1, len(self)) if len(self) <= _SCAN_ROWS else (64, _SCAN_ROWS // 64)
        # Single rows instead of blocks would read most pages of the planning file.
        starts = np.linspace(0, len(self) - size, blocks, dtype=np.int64)
        ids = (starts[:, None] + np.arange(size)).ravel()
        return round(float(self.lengths(ids).mean()) * len(self))

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the sample's shard, its row there)."""
        shard = int(np.searchsorted(self._offsets, sample, side="right")) - 1
        return shard, sample - int(self._offsets[shard])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, by its number.

        Raises:
            ValueError: it cannot be read or is not the one of the manifest. Raised again on every call.
        """
        found = self._index_or_error(shard)
        if isinstance(found, ValueError):
            raise found
        return found

    def _index_or_error(self, shard: int) -> ShardIndex | ValueError:
        with self._lock:
            found, until = self._open.get(shard, (None, 0.0))
            if found is not None and time.monotonic() < until:
                self._open.move_to_end(shard)
                return found
        # Outside the lock, so that several indexes can be read at the same time.
        found = self._read_index(shard)
        with self._lock:
            while len(self._open) >= self._open_shards:
                self._open.popitem(last=False)
            until = time.monotonic() + _ASK_AGAIN_SECONDS if isinstance(found, ValueError) else float("inf")
            self._open[shard] = found, until
        return found

    def preload(self, samples: np.ndarray, pool: Executor) -> None:
        """Open the indexes of remote shards that the samples need, all at the same time."""
        shards = np.unique(np.searchsorted(self._offsets, samples, side="right") - 1).tolist()
        missing = [i for i in shards if i not in self._open and storage.is_remote(self.shards[i].path)]
        if len(missing) > 1:
            list(pool.map(self._index_or_error, missing))

    def _read_index(self, shard: int) -> ShardIndex | ValueError:
        entry = self.shards[shard]
        try:
            index = load_index(entry.path, self._tokenizer, self.data.prompt)
        except (ValueError, OSError) as error:
            return ValueError(f"the index of its shard cannot be used: {error}")
        first = int(self._offsets[shard])
        rows = self.plan_rows(np.arange(first, first + entry.samples))
        if index.header.digest != entry.digest or rows.tobytes() != index.plan_rows().tobytes():
            return ValueError(
                "the index of its shard changed since the manifest was written. Run tools/prepare_data.py again."
            )
        return index

    def key(self, sample: int) -> str:
        """The sample's key in its shard, or its number if the index cannot be read."""
        shard, row = self.locate(sample)
        index = self._index_or_error(shard)
        return f"(sample {row})" if isinstance(index, ValueError) else index.keys[row]


def open_dataset(
    patterns: Sequence[str], data: DataConfig, fingerprint: str, setting: str, open_shards: int = 256
) -> Dataset:
    """The samples of manifests (``*.json``) and of indexed shards (files, folders, globs, brace lists).

    Raises:
        ValueError: missing shards, manifests or indexes, no good sample, or images that do not fit a pack.
    """
    parts: list[Part] = []
    for is_manifest, group in itertools.groupby(patterns, lambda pattern: pattern.endswith(".json")):
        if is_manifest:
            for pattern in group:
                found = find(pattern) if re.search(r"[*?\[{]", pattern) else {pattern: [pattern]}
                paths = [path for part, matches in found.items() for path in matches or [part]]
                parts += [read_manifest(path, fingerprint, data.prompt, setting, data.cache_dir) for path in paths]
            continue
        rows, shards, refused = [], [], 0
        for shard in expand_shards(list(group), setting):
            index = load_index(shard, fingerprint, data.prompt)
            rows.append(index.plan_rows())
            refused += len(index.refused)
            shards.append(Shard(shard, len(index.rows), index.header.digest, index.header.shard_size))
        parts.append(Part(np.concatenate(rows), shards, refused))
    if not parts:
        expand_shards([], setting)
    dataset = Dataset(parts, data, fingerprint, open_shards)
    if not len(dataset):
        raise ValueError(
            f"{setting}: no good sample in {len(dataset.shards)} shards. tools/prepare_data.py lists the reasons."
        )
    _check_images_fit(dataset)
    return dataset


def _check_images_fit(dataset: Dataset) -> None:
    """Raise ValueError if an image leaves no room in a pack. Scans all images only if the rule allows such an image."""
    data = dataset.data
    most = (data.image_size // PATCH_SIZE) ** 2
    if data.image_mode == "native":
        most = most_patches(data.min_pixels, data.max_pixels)
        if most + _CLOSING_TOKENS > data.seq_length:
            most = 0
            for start in range(0, len(dataset), _SCAN_ROWS):
                ids = np.arange(start, min(start + _SCAN_ROWS, len(dataset)))
                heights, widths = dataset.image_sizes(dataset.plan_rows(ids))
                most = max(most, int((heights * widths).max()) // PATCH_SIZE**2)
    if most + _CLOSING_TOKENS > data.seq_length:
        raise ValueError(
            f"data.seq_length = {data.seq_length}: an image of {most} patches and its closing tokens do not fit a "
            f"pack. Raise it to at least {most + _CLOSING_TOKENS}, or lower the image size."
        )
