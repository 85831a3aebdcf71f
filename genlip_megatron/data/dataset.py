"""Data set: the shards of one source as one numbered table, of which only what is looked at is in memory.

A **manifest** (``NAME.dataset.json``) lists indexed shards with totals and versions; beside it stands the planning file
(``NAME.dataset.plan``), 8 bytes a sample, memory-mapped. Everything else of a sample is in its shard's index, opened
when it is needed. Shards may also be named directly; their indexes are then read at the start, which is good for
thousands of shards. Both ways number the samples alike and give the same stream.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genlip_megatron import __version__
from genlip_megatron.atomic_write import atomic_path
from genlip_megatron.config import PATCH_SIZE, DataConfig
from genlip_megatron.data import storage
from genlip_megatron.data.index import PLAN_ROW, ShardIndex, load_index, read_index
from genlip_megatron.data.resize import most_patches, native_sizes
from genlip_megatron.data.storage import NothingFound, expand_shards
from genlip_megatron.outputs import check_file, json_lines, json_object

MANIFEST_FORMAT = 1
_CLOSING_TOKENS = 2
_SCAN_ROWS = 1 << 20
_ASK_AGAIN_SECONDS = 30.0
_CHECKED_PLAN_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """A shard as a manifest lists it."""

    path: str
    samples: int
    digest: str  # of its index
    size: int | None = None  # in bytes when it was indexed; manifests of earlier versions lack it


@dataclass
class Totals:
    """What indexed shards hold, for the manifest and the report; adds up shard by shard."""

    samples: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    text_tokens: int = 0
    loss_tokens: int = 0
    # Counts by value, from 0 on.
    heights: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    widths: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << 16, np.int64))

    def add(self, index: ShardIndex) -> None:
        """Count one shard."""
        self.samples += len(index.rows)
        self.refused.update(reason.split(":")[0] for reason in index.refused.values())
        self.ignored.update(index.ignored)
        self.text_tokens += int(index.rows["text_tokens"].sum())
        self.loss_tokens += int(index.rows["loss_tokens"].sum())
        for counts, column in ((self.heights, "height"), (self.widths, "width"), (self.tokens, "text_tokens")):
            counts += np.bincount(index.rows[column], minlength=1 << 16)


def manifest_paths(manifest: str) -> tuple[str, str]:
    """(planning file, list of refused samples) beside a manifest.

    >>> manifest_paths("d/train.dataset.json"), manifest_paths("dataset.json")
    (('d/train.dataset.plan', 'd/train.quarantine.jsonl'), ('dataset.plan', 'quarantine.jsonl'))
    """
    folder, _, name = manifest.rpartition("/")
    stem = name.removesuffix(".json").removesuffix("dataset")
    before = f"{folder}/" if folder else ""
    return f"{before}{stem}dataset.plan", f"{before}{stem}quarantine.jsonl"


is_manifest = json_object("format", "tokenizer", "prompt", "plan_sha256", "shards")
is_quarantine = json_lines(lambda keys: keys == {"shard", "key", "reason"})


def check_files(manifest: str) -> None:
    """Raise ValueError where the manifest, its planning file or its list of refused samples would replace another file.

    A planning file has no marks of its own: it counts as ours beside its manifest.
    """
    plan, quarantine = manifest_paths(manifest)
    for file, recognise in ((manifest, is_manifest), (quarantine, is_quarantine)):
        check_file(file, recognise, "--manifest" if file == manifest else f"--manifest {manifest}, which comes with")
    if not storage.exists(manifest):
        check_file(plan, lambda content: False, f"--manifest {manifest}, which comes with")


def other_shards(manifest: str, shards: Sequence[str]) -> int:
    """How many shards an existing manifest lists that are there, but not among ``shards``."""
    if not storage.exists(manifest):
        return 0
    try:
        listed = json.loads(storage.read_bytes(manifest))["shards"]
        names = {storage.join(storage.parent(manifest), entry["path"]) for entry in listed}
    except (ValueError, KeyError, TypeError):
        return 0  # damaged: ``check_files`` decides
    others = {_name(path) for path in names} - {_name(shard) for shard in shards}
    return sum(storage.exists(path) for path in others)


def _name(path: str) -> str:
    return path if storage.is_remote(path) else os.path.realpath(path)


def write_manifest(manifest: str, shards: Sequence[str], on_shard: Callable[[ShardIndex], None]) -> Totals:
    """Merge the indexes beside ``shards`` into a manifest and its planning file; returns the totals.

    Args:
        manifest: path or URL to write.
        on_shard: called with each shard's index as it is read.

    Raises:
        ValueError: a shard without a good index, or indexes of different tokenizers or prompts.
    """
    plan, _ = manifest_paths(manifest)
    totals, entries, digest = Totals(), [], hashlib.sha256()
    origin: tuple[str, str] | None = None
    folder = storage.parent(manifest)
    with _new_plan(plan) as partial:
        with open(partial, "wb") as file:
            for shard in shards:
                index = read_index(shard)
                mine = index.header.tokenizer, index.header.prompt
                if origin is None:
                    origin = mine
                elif origin != mine:
                    raise ValueError(
                        f"{shard} was indexed with another tokenizer or prompt than {shards[0]}; index it anew"
                    )
                rows = index.plan_rows().tobytes()
                file.write(rows)
                digest.update(rows)
                name = shard.removeprefix(folder.rstrip("/") + "/") if folder else shard
                if not storage.is_remote(shard) and not storage.is_remote(manifest):
                    name = os.path.relpath(shard, folder or ".")
                entry = {"path": name, "samples": len(index.rows), "digest": index.header.digest}
                entries.append({**entry, "size": index.header.shard_size})
                totals.add(index)
                on_shard(index)
        assert origin is not None
        tree = {
            "format": MANIFEST_FORMAT,
            "version": __version__,
            "tokenizer": origin[0],
            "prompt": origin[1],
            "plan_sha256": digest.hexdigest(),
            "samples": totals.samples,
            "text_tokens": totals.text_tokens,
            "loss_tokens": totals.loss_tokens,
            "refused": dict(totals.refused.most_common()),
            "shards": entries,
        }
        # First the manifest, by which the next call knows the planning file as ours. Should this process be killed
        # between the two, readers see that they do not match.
        storage.write_bytes(manifest, json.dumps(tree, indent=1).encode())
    return totals


@contextlib.contextmanager
def _new_plan(plan: str) -> Iterator[Path]:
    """A local path to write the planning file to; it takes its place when the block ends without an error."""
    if not storage.is_remote(plan):
        with atomic_path(plan, str(os.getpid())) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory(prefix="genlip-") as folder:
        partial = Path(folder) / "plan"
        yield partial
        store = storage.filesystem(plan)
        storage.with_retries(lambda: store.put_file(str(partial), plan), url=plan)


@dataclass
class _Part:
    """Neighbouring shards whose planning rows lie in one array."""

    plan: np.ndarray  # PLAN_ROW [samples], memory-mapped or in memory
    shards: list[Shard]


def _read_manifest(path: str, fingerprint: str, prompt: str, setting: str, cache_dir: str) -> _Part:
    """The shards of a manifest. Raises ValueError for one that is missing, damaged or made for something else."""
    try:
        tree = json.loads(storage.read_bytes(path))
        found, samples = tree["format"], int(tree["samples"])
        folder = storage.parent(path)
        shards = [
            Shard(storage.join(folder, s["path"]), int(s["samples"]), s["digest"], s.get("size"))
            for s in tree["shards"]
        ]
        origin, plan_sha256 = (tree["tokenizer"], tree["prompt"]), str(tree["plan_sha256"])
        if any(shard.samples < 0 for shard in shards) or sum(shard.samples for shard in shards) != samples:
            raise ValueError("its shards' samples do not add up")
    except FileNotFoundError:
        raise NothingFound(f"{setting}: {path}: no such manifest; tools/prepare_data.py writes it") from None
    except OSError as error:
        raise ValueError(f"{setting}: {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{setting}: {path} is no manifest of tools/prepare_data.py ({error!r})") from error
    remedy = "run tools/prepare_data.py again"
    if found != MANIFEST_FORMAT:
        raise ValueError(f"{setting}: {path} has format {found}, this version reads {MANIFEST_FORMAT}; {remedy}")
    if origin[0] != fingerprint:
        raise ValueError(f"{setting}: {path} was made with another tokenizer; {remedy} with this one")
    if origin[1] != prompt:
        raise ValueError(f"{setting}: {path} was made with another prompt than data.prompt = {prompt!r}; {remedy}")
    plan, _ = manifest_paths(path)
    if storage.is_remote(plan):
        plan = _download_plan(plan, plan_sha256, cache_dir)
    if not os.path.isfile(plan) or os.path.getsize(plan) != samples * PLAN_ROW.itemsize:
        raise ValueError(f"{setting}: {plan} is missing or does not hold {samples} samples; {remedy}")
    rows = np.memmap(plan, PLAN_ROW, mode="r") if samples else np.empty(0, PLAN_ROW)
    # Of a larger one each shard's part is compared when the shard is opened; all of it would take minutes.
    if rows.nbytes <= _CHECKED_PLAN_BYTES and hashlib.sha256(rows.tobytes()).hexdigest() != plan_sha256:
        raise ValueError(f"{setting}: {plan} is damaged: its checksum is not the manifest's; {remedy}")
    return _Part(rows, shards)


def _download_plan(url: str, sha256: str, cache_dir: str) -> str:
    """A local copy of a remote planning file; kept for the next run."""
    target = Path(cache_dir).expanduser() / f"{sha256[:32]}.plan"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the ranks of a node downloads, the others find it here
        if target.is_file():
            return str(target)
        store = storage.filesystem(url)
        with atomic_path(target, sync=False) as partial:
            storage.with_retries(lambda: store.get_file(url, str(partial)), url=url)
            with open(partial, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 24):
                    digest.update(block)
            if digest.hexdigest() != sha256:
                raise ValueError(f"{url}: checksum differs from the manifest's. Run tools/prepare_data.py again.")
    return str(target)


class Dataset:
    """The good samples of one source, numbered 0 .. len - 1 through its shards in order.

    Args:
        parts: shards and their planning rows.
        data: how images are resized and where packs end.
        fingerprint: of the tokenizer.
        open_shards: how many shards' indexes are kept open.
    """

    def __init__(self, parts: Sequence[_Part], data: DataConfig, fingerprint: str, open_shards: int = 256) -> None:
        self.data, self._tokenizer = data, fingerprint
        self._plans = [part.plan for part in parts]
        self._plan_offsets = np.cumsum([0, *(len(plan) for plan in self._plans)])
        self.shards = [shard for part in parts for shard in part.shards]
        self._offsets = np.cumsum([0, *(shard.samples for shard in self.shards)])
        # An index that could not be read is asked for again at the given time: what fails may come back.
        self._open: collections.OrderedDict[int, tuple[ShardIndex | ValueError, float]] = collections.OrderedDict()
        self._open_shards, self._lock = open_shards, threading.Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def fingerprint(self) -> str:
        """Changes with the samples, their order and the resolution rule: with all that the stream depends on."""
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
        owner = np.searchsorted(self._plan_offsets, ids, side="right") - 1
        for i in np.unique(owner).tolist():
            rows[owner == i] = self._plans[i][ids[owner == i] - self._plan_offsets[i]]
        return rows

    def image_sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] heights and widths in pixels, as the model sees the images of PLAN_ROW [N]."""
        if self.data.image_mode == "native":
            return native_sizes(rows["height"], rows["width"], self.data.min_pixels, self.data.max_pixels)
        side = np.full(len(rows), self.data.image_size, np.int64)
        return side, side

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int64 [N] tokens of the samples in a pack, the text cut to what the image leaves."""
        rows = self.plan_rows(ids)
        heights, widths = self.image_sizes(rows)
        return np.minimum((heights // PATCH_SIZE) * (widths // PATCH_SIZE) + rows["text_tokens"], self.data.seq_length)

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the sample's shard, its row there)."""
        shard = int(np.searchsorted(self._offsets, sample, side="right")) - 1
        return shard, sample - int(self._offsets[shard])

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, by its number.

        Raises:
            ValueError: it cannot be read, or is another than the manifest's; every time it is asked for.
        """
        with self._lock:
            found, until = self._open.get(shard, (None, 0.0))
            if found is not None and time.monotonic() < until:
                self._open.move_to_end(shard)
            else:
                found = None
        if found is None:
            # Not under the lock: several may be read at a time.
            found = self._read_index(shard)
            with self._lock:
                while len(self._open) >= self._open_shards:
                    self._open.popitem(last=False)
                until = time.monotonic() + _ASK_AGAIN_SECONDS if isinstance(found, ValueError) else float("inf")
                self._open[shard] = found, until
        if isinstance(found, ValueError):
            raise found
        return found

    def preload(self, samples: np.ndarray, pool: Executor) -> None:
        """Open the indexes that samples need, those of remote shards at the same time."""
        shards = np.unique(np.searchsorted(self._offsets, samples, side="right") - 1).tolist()
        missing = [i for i in shards if i not in self._open and storage.is_remote(self.shards[i].path)]
        if len(missing) > 1:
            list(pool.map(self._read_quietly, missing))

    def _read_quietly(self, shard: int) -> None:
        with contextlib.suppress(ValueError):
            self.index(shard)

    def _read_index(self, shard: int) -> ShardIndex | ValueError:
        entry = self.shards[shard]
        try:
            index = load_index(entry.path, self._tokenizer, self.data.prompt)
        except (ValueError, OSError) as error:
            return ValueError(f"the index of its shard cannot be used: {error}")
        first = int(self._offsets[shard])
        rows = self.plan_rows(np.arange(first, first + entry.samples))
        if index.header.digest != entry.digest or rows.tobytes() != index.plan_rows().tobytes():
            return ValueError("the index of its shard is not the manifest's; run tools/prepare_data.py again")
        return index

    def key(self, sample: int) -> str:
        """The sample's name in its shard; its number where the index cannot be read."""
        shard, row = self.locate(sample)
        try:
            return self.index(shard).keys[row]
        except ValueError:
            return f"(sample {row})"


def open_dataset(
    patterns: Sequence[str], data: DataConfig, fingerprint: str, setting: str, open_shards: int = 256
) -> Dataset:
    """The samples of manifests (``*.json``) and of indexed shards (files, folders, globs, brace lists).

    Raises:
        ValueError: missing shards, manifests or indexes, no good sample, or images that do not fit a pack.
    """
    parts: list[_Part] = []
    for is_manifest, group in _grouped(patterns):
        if is_manifest:
            parts += [_read_manifest(path, fingerprint, data.prompt, setting, data.cache_dir) for path in group]
            continue
        rows, shards = [], []
        for shard in expand_shards(group, setting):
            index = load_index(shard, fingerprint, data.prompt)
            rows.append(index.plan_rows())
            shards.append(Shard(shard, len(index.rows), index.header.digest, index.header.shard_size))
        parts.append(_Part(np.concatenate(rows), shards))
    if not parts:
        expand_shards([], setting)
    dataset = Dataset(parts, data, fingerprint, open_shards)
    if not len(dataset):
        raise ValueError(
            f"{setting}: no good sample in {len(dataset.shards)} shards; tools/prepare_data.py reports the reasons"
        )
    _check_images_fit(dataset)
    return dataset


def _check_images_fit(dataset: Dataset) -> None:
    """Raise ValueError when an image leaves no room in a pack; looks at all of them only where the rule allows one."""
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
            f"data.seq_length = {data.seq_length}: an image of {most} patches does not fit beside its closing tokens; "
            f"raise it to at least {most + _CLOSING_TOKENS}, or lower the image size"
        )


def _grouped(patterns: Iterable[str]) -> list[tuple[bool, list[str]]]:
    """Runs of neighbouring (manifests or not) patterns; globs and brace lists of manifests as the files they name."""
    groups: list[tuple[bool, list[str]]] = []
    for pattern in patterns:
        is_manifest = pattern.endswith(".json")
        if not groups or groups[-1][0] != is_manifest:
            groups.append((is_manifest, []))
        if is_manifest and re.search(r"[*?\[{]", pattern):
            groups[-1][1].extend(path for part, found in storage.find(pattern).items() for path in found or [part])
        else:
            groups[-1][1].append(pattern)
    return groups
