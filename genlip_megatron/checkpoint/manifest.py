"""Manifest of a checkpoint: finds damage before the checkpoint is used.

``manifest.json`` in every checkpoint folder holds the size and SHA-256 of every other file, facts about the run, and a
SHA-256 of itself. Its form is exact, so any flipped bit in it is found.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from genlip_megatron.outputs import first_other

T = TypeVar("T")
MANIFEST, COMMON, CONFIG = "manifest.json", "common.pt", "config.yaml"
# Kinds of optimizer state.
DP_RESHARDABLE, FULLY_RESHARDABLE = "dp_reshardable", "fully_reshardable"
WEIGHTS_ONLY = "weights"  # converted from another format: no optimizer state
TENSORS = ".distcp"  # files of tensors; the others have kilobytes
_FORMAT = 1
_BLOCK = 8 * 2**20
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "nvidia-dali-cuda130", "numpy")


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Facts about a checkpoint.

    Attributes:
        iteration: the step after which it was saved.
        kind: of its optimizer state: ``dp_reshardable``, ``fully_reshardable`` or ``weights`` (none).
        layout: settings that decide which rank holds what, see ``parts.describe_layout``.
        validation_loss: of that step, if it was validated.
        tokenizer, data: fingerprints.
        random: name -> bytes of each random state of a rank.
        versions, revision: of the software that saved it.
        created: UTC, ISO 8601.
        files: relative path -> facts of every file except the manifest.
    """

    iteration: int
    kind: str
    layout: dict[str, Any]
    validation_loss: float | None = None
    tokenizer: str = ""
    data: str = ""
    random: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    created: str = ""
    files: dict[str, FileFacts] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(facts.size for facts in self.files.values())

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        tree = {"format": _FORMAT, **asdict(self)}
        return _exact({**tree, "sha256": hashlib.sha256(_exact(tree)).hexdigest()})


class Damaged(ValueError):
    """A damaged checkpoint; the message names the file and the damage."""


def _exact(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        Damaged: it is missing, or differs from what was written.
    """
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
        tree = json.loads(content)
        stated = tree.pop("sha256")
        whole = {**tree, "sha256": hashlib.sha256(_exact(tree)).hexdigest()}
        if whole["sha256"] != stated or content != _exact(whole):
            raise Damaged(f"{file}: damaged, its checksum does not match")
        if tree.pop("format") != _FORMAT:
            raise Damaged(f"{file}: its format is not {_FORMAT}. Load it with the version that wrote it")
        tree["files"] = {name: FileFacts(**facts) for name, facts in tree["files"].items()}
        return Manifest(**tree)
    except FileNotFoundError:
        raise Damaged(f"{file}: missing") from None
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{file}: damaged, not the JSON that was written") from None


# Files of a run's checkpoint, also without a readable manifest.
_OWN = re.compile(r"__\d+_\d+\.distcp|\.metadata|metadata\.json|common\.pt|config\.yaml|manifest\.json")


def foreign(folder: Path) -> str:
    """A file in a checkpoint's folder that does not belong to it; "" if the whole folder may be deleted."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is a link or a file"
    try:
        listed = set(read(folder).files)
    except Damaged:
        listed = set()
        if not any(path.suffix == TENSORS or path.name == MANIFEST for path in folder.iterdir()):
            return "no file of a checkpoint"
    return first_other(folder, lambda name: name in listed or bool(_OWN.fullmatch(name)))


def facts_of(path: Path) -> FileFacts:
    """Size and checksum of a file, read from disk."""
    digest, block, size = hashlib.sha256(), bytearray(_BLOCK), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return FileFacts(size, digest.hexdigest())


def _problem(folder: Path, name: str, facts: FileFacts, checksums: bool) -> str | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != facts.size:
            return f"{path}: {size} bytes, {facts.size} were written"
        if (checksums or path.suffix != TENSORS) and facts_of(path) != facts:
            return f"{path}: damaged, its SHA-256 does not match the manifest's"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def problems(
    folder: Path,
    manifest: Manifest,
    checksums: bool = True,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], Any] = lambda size: None,
) -> list[str]:
    """Damage of a checkpoint's files, one line each; empty for a good checkpoint.

    Args:
        checksums: read every file; otherwise only the sizes of tensor files are checked.
        part: (i, n) checks the i-th of n parts of about equal size, to divide the work over ranks.
        progress: called with the bytes of each checked file.
    """
    names = sorted(manifest.files)
    mine = balanced(names, [manifest.files[name].size + 1 for name in names], part[1])[part[0]]

    def look(name: str) -> str | None:
        found = _problem(folder, name, manifest.files[name], checksums)
        progress(manifest.files[name].size)
        return found

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return [found for found in threads.map(look, mine) if found]


def balanced(items: Sequence[T], sizes: Sequence[int], count: int) -> list[list[T]]:
    """``items`` in ``count`` parts of about equal size, each from large to small.

    >>> balanced(["a", "b", "c"], [1, 3, 1], 2)
    [['b'], ['a', 'c']]
    """
    parts: list[list[T]] = [[] for _ in range(count)]
    totals = [0] * count
    for item, size in sorted(zip(items, sizes, strict=True), key=lambda pair: -pair[1]):
        smallest = totals.index(min(totals))
        parts[smallest].append(item)
        totals[smallest] += size
    return parts


def versions() -> dict[str, str]:
    """Versions of Python, this package and its main dependencies."""
    found = {"python": platform.python_version()}
    for name in ("genlip-megatron", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """Git revision of this source tree, with "+changes" if files differ; empty outside of a checkout.

    A copy of the tree, such as a SLURM job's, has it in the file REVISION.
    """
    recorded = Path(__file__).parents[2] / "REVISION"
    if recorded.is_file():
        return recorded.read_text().strip()

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def now() -> str:
    """The current time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
