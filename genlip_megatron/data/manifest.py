"""Manifest: the shards of a data set with totals, and beside it the planning file, 8 bytes per sample."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genlip_megatron import __version__, storage
from genlip_megatron.atomic_write import atomic_path
from genlip_megatron.data.index import PLAN_ROW, ShardIndex, read_index
from genlip_megatron.data.patterns import NothingFound
from genlip_megatron.outputs import check_file, json_lines, json_object

MANIFEST_FORMAT = 1
_CHECKED_PLAN_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """A shard as a manifest lists it."""

    path: str
    samples: int
    digest: str  # of its index
    size: int | None = None  # bytes when it was indexed; None in manifests of earlier versions


@dataclass
class Totals:
    """Totals over indexed shards, for the manifest and the report."""

    samples: int = 0
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    text_tokens: int = 0
    loss_tokens: int = 0
    # Column -> histogram: element i counts the samples of value i.
    histograms: dict[str, np.ndarray] = dataclasses.field(
        default_factory=lambda: {name: np.zeros(1 << 16, np.int64) for name in ("height", "width", "text_tokens")}
    )

    def add(self, index: ShardIndex) -> None:
        """Add one shard."""
        self.samples += len(index.rows)
        self.refused.update(reason.split(":")[0] for reason in index.refused.values())
        self.ignored.update(index.ignored)
        self.text_tokens += int(index.rows["text_tokens"].sum())
        self.loss_tokens += int(index.rows["loss_tokens"].sum())
        for name, counts in self.histograms.items():
            counts += np.bincount(index.rows[name], minlength=1 << 16)


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
    """Raise ValueError if writing the manifest would replace a file that prepare_data.py did not write.

    This covers the planning file and the list of refused samples. A planning file has no marks of its own: it counts as
    ours if its manifest exists.
    """
    plan, quarantine = manifest_paths(manifest)
    for file, recognise in ((manifest, is_manifest), (quarantine, is_quarantine)):
        check_file(file, recognise, "--manifest" if file == manifest else f"--manifest {manifest}, which comes with")
    if not storage.exists(manifest):
        check_file(plan, lambda content: False, f"--manifest {manifest}, which comes with")


def other_shards(manifest: str, shards: Sequence[str]) -> int:
    """Number of existing shards that the manifest lists but ``shards`` lacks."""
    if not storage.exists(manifest):
        return 0
    try:
        listed = json.loads(storage.read_bytes(manifest))["shards"]
        names = {storage.join(storage.parent(manifest), entry["path"]) for entry in listed}
    except (ValueError, KeyError, TypeError):
        return 0  # damaged: ``check_files`` reports it
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
                        f"{shard}: indexed with another tokenizer or prompt than {shards[0]}. Index it again."
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
        # The manifest comes first: it marks the planning file as ours for the next call. If this process is killed
        # between the two, readers see that they do not match.
        storage.write_bytes(manifest, json.dumps(tree, indent=1).encode())
    return totals


@contextlib.contextmanager
def _new_plan(plan: str) -> Iterator[Path]:
    """A local path to write the planning file to; it is renamed or uploaded when the block ends without an error."""
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
class Part:
    """Consecutive shards whose planning rows lie in one array."""

    plan: np.ndarray  # PLAN_ROW [samples], memory-mapped or in memory
    shards: list[Shard]
    refused: int = 0  # samples that indexing refused


def read_manifest(path: str, fingerprint: str, prompt: str, setting: str, cache_dir: str) -> Part:
    """The shards of a manifest. Raises ValueError if it is missing, damaged, or of another tokenizer or prompt."""
    try:
        tree = json.loads(storage.read_bytes(path))
        found, samples = tree["format"], int(tree["samples"])
        folder = storage.parent(path)
        shards = [
            Shard(storage.join(folder, s["path"]), int(s["samples"]), s["digest"], s.get("size"))
            for s in tree["shards"]
        ]
        origin, plan_sha256 = (tree["tokenizer"], tree["prompt"]), str(tree["plan_sha256"])
        refused = sum(tree.get("refused", {}).values())
        if any(shard.samples < 0 for shard in shards) or sum(shard.samples for shard in shards) != samples:
            raise ValueError("its shards' samples do not add up")
    except FileNotFoundError:
        raise NothingFound(f"{setting}: {path}: no such manifest. tools/prepare_data.py writes it.") from None
    except OSError as error:
        raise ValueError(f"{setting}: {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{setting}: {path} is not a manifest of tools/prepare_data.py ({error!r})") from error
    remedy = "Run tools/prepare_data.py again"
    if found != MANIFEST_FORMAT:
        raise ValueError(f"{setting}: {path} has format {found}, this version reads {MANIFEST_FORMAT}. {remedy}.")
    if origin[0] != fingerprint:
        raise ValueError(f"{setting}: {path} was made with another tokenizer. {remedy} with this one.")
    if origin[1] != prompt:
        raise ValueError(f"{setting}: {path} was made with another prompt than data.prompt = {prompt!r}. {remedy}.")
    plan, _ = manifest_paths(path)
    if storage.is_remote(plan):
        plan = _download_plan(plan, plan_sha256, cache_dir)
    if not os.path.isfile(plan) or os.path.getsize(plan) != samples * PLAN_ROW.itemsize:
        raise ValueError(f"{setting}: {plan} is missing or does not hold {samples} samples. {remedy}.")
    rows = np.memmap(plan, PLAN_ROW, mode="r") if samples else np.empty(0, PLAN_ROW)
    # Checking a larger file takes minutes; instead each shard's part is compared when the shard is opened.
    if rows.nbytes <= _CHECKED_PLAN_BYTES and hashlib.sha256(rows.tobytes()).hexdigest() != plan_sha256:
        raise ValueError(f"{setting}: {plan}: checksum differs from the manifest's. {remedy}.")
    return Part(rows, shards, refused)


def _download_plan(url: str, sha256: str, cache_dir: str) -> str:
    """A local copy of a remote planning file, kept for the next run."""
    target = Path(cache_dir).expanduser() / f"{sha256[:32]}.plan"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one rank of the node downloads, the others find the file
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
