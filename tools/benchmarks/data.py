#!/usr/bin/env python3
"""Benchmark the data engine: one line per figure, ending in ``ratio N`` or ``value N unit``.

    tools/benchmarks/data.py                                  (both sections, about three minutes on two CPU cores)
    tools/benchmarks/data.py pipeline --data shards/ --tokenizer tokenizer.json

* ``pipeline``: shards -> PackedBatch on one core, in samples and tokens per second, against the ``webdataset`` library
  with Pillow and the same tokenizer. The baseline decodes at full size, skips conversions without effect, caches the
  prompt's tokens, reads in order without a shuffle buffer and packs in order. Both sides use this project's functions
  to cut patches and lay out packs. (Pillow's ``draft`` would be faster, but gives other pixels.) Tokens and pixels are
  compared before timing. The decoder "pillow" is timed too; its gain does not come from the codec.
* ``scale``: a billion samples in 100,000 shards: seconds from the start of a process to its first step, peak memory.

Each contestant has its own process, pinned to one core with one thread, and they take turns. Figures are medians; a
ratio is the median of the rounds' ratios. Rates per CPU second exclude the time that other programs had the core.
Everything is read from the page cache. The data are generated, and without ``--tokenizer`` the tokenizer too.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from data_contestants import Apart, Baseline, Contents, Ours, Turn, run_config
from data_images import BenchData
from PIL import features
from tqdm import tqdm

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.dataset import Dataset, open_dataset
from genlip_megatron.data.loader import build_plan
from genlip_megatron.data.manifest import manifest_paths
from genlip_megatron.tokenizer import load_tokenizer

MODES = {"stage 1": "fixed", "stage 2": "native"}
_MOST_PACKS = 48


def show(line: str) -> None:
    """Print a figure at once."""
    print(line, flush=True)


def rates(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def median_ratio(ours: list[float], baseline: list[float]) -> float:
    """Median of the rounds' ratios: the two runs of a round see the same load of the machine."""
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=True))


def check_same(name: str, theirs: Contents, mine: Contents) -> None:
    """Exit unless samples have the same tokens, and pixels within one level, as far as exact resizers may differ."""
    if not mine:
        sys.exit(f"pipeline {name}: no sample of the baseline was found in the index")
    for key, (ids, patches) in mine.items():
        if not np.array_equal(ids, theirs[key][0]):
            sys.exit(f"pipeline {name}: ours and the baseline have other tokens for {key}")
        if (worst := int(np.abs(patches.astype(np.int16) - theirs[key][1]).max())) > 1:
            sys.exit(f"pipeline {name}: pixels of ours and the baseline differ by {worst} levels for {key}")


def compare(name: str, data: BenchData, shards: list[str], mode: str) -> None:
    """Time the loader and the baseline on indexed shards, and print the ratios."""
    seq_length = 2048 if data.quick else 16384
    config, plain = (run_config(shards, data.tokenizer, mode, seq_length, decoder=d) for d in ("cpu", "pillow"))
    contestants = {"ours": Apart(Ours, config), "plain": Apart(Ours, plain), "webdataset": Apart(Baseline, config)}
    theirs: Contents = contestants["webdataset"]("contents")
    for label in ("ours", "plain"):
        check_same(name, theirs, contestants[label]("contents", set(theirs)))
    # A turn takes each sample about once, so that every turn has the same images.
    dataset = open_dataset(shards, config.data, load_tokenizer(data.tokenizer).fingerprint, "shards")
    tokens = int(dataset.lengths(np.arange(len(dataset))).sum())
    packs = min(round(tokens / seq_length), _MOST_PACKS)
    turns: dict[str, list[Turn]] = {label: [] for label in contestants}
    for _ in tqdm(range(data.rounds), desc=name, unit="round", file=sys.stderr):
        for label, contestant in contestants.items():
            turns[label].append(contestant("turn", packs))
    for contestant in contestants.values():
        contestant.close()
    show(f"pipeline {name}, {len(theirs)} samples found the same, then {data.rounds} rounds of {packs} packs, "
         f"mean sample: value {tokens / len(dataset):.0f} tokens")  # fmt: skip
    for label, unit, clock in (
        ("ours", "samples", "seconds"),
        ("ours", "tokens", "seconds"),
        ("ours", "samples", "cpu_seconds"),
        ("plain", "samples", "cpu_seconds"),
    ):
        mine, base = ([getattr(t, unit) / getattr(t, clock) for t in turns[one]] for one in (label, "webdataset"))
        title = f"{unit}/s on one core" if clock == "seconds" else f"{unit} a CPU second"
        who = "ours" if label == "ours" else 'ours with decoder "pillow"'
        show(f"pipeline {name}, {title}: {who} {rates(mine)}, webdataset {rates(base)}, "
             f"ratio {median_ratio(mine, base):.2f}")  # fmt: skip


def pipeline(data: BenchData) -> None:
    """Both stages' rules on photos, and the user's shards."""
    for stage, mode in MODES.items():
        compare(stage, data, data.indexed[stage], mode)
    if data.users_shards:
        links = data.linked_shards()
        compare(f"stage 1 on {len(links)} shards of --data", data, links, "fixed")


def _memory(file: str, name: str) -> float:
    """GiB of a line of /proc/self/status or smaps_rollup."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def start_at_scale(pipe: Connection, manifest: str, begun: float, steps: int) -> None:
    """Run a rank's planning up to its first step and some more; sends (seconds, seconds of imports, GiB, GiB)."""
    imported = time.monotonic() - begun
    config = run_config([manifest], "", lanes=512)
    dataset: Dataset = open_dataset([manifest], config.data, "none", "manifest")
    lanes = build_plan(config, "train", [dataset])
    for lane in range(8):
        lanes.next_pack(lane)
    started = time.monotonic() - begun
    for _ in range(steps):
        for lane in range(8):
            lanes.next_pack(lane)
    # ru_maxrss of a child starts at its parent's size; VmHWM counts only this program.
    pipe.send((started, imported, _memory("status", "VmHWM"), _memory("smaps_rollup", "Anonymous")))


def scale(data: BenchData) -> None:
    """Start-up time and memory of one rank of 64 with a billion samples."""
    samples, shards = (10_000_000, 1_000) if data.quick else (1_000_000_000, 100_000)
    needed, free = samples * 8 * 1.1, os.statvfs(data.folder)
    if free.f_bavail * free.f_frsize < needed:
        sys.exit(f"scale: {data.folder} has no {needed / 1e9:.0f} GB for the planning file; set TMPDIR")
    manifest = data.table("scale", "stage 1", samples, shards)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=start_at_scale, args=(other, manifest, time.monotonic(), 200))
    process.start()
    other.close()
    started, imported, peak, anonymous = pipe.recv()
    process.join()
    os.unlink(manifest_paths(manifest)[0])
    name = f"scale, {samples:,} samples in {shards:,} shards"
    show(f"{name}, start of the process to the first step, {imported:.1f} s of it imports: value {started:.2f} s")
    show(f"{name}, peak resident memory after 200 steps: value {peak:.2f} GiB")
    show(f"{name}, anonymous memory after 200 steps: value {anonymous:.2f} GiB")


SECTIONS: dict[str, Callable[[BenchData], None]] = {"pipeline": pipeline, "scale": scale}


def machine() -> str:
    """CPU, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    packages = ["torch", "numpy", "pillow", "simplejpeg", "tokenizers", "webdataset"]
    installed = {name.lower() for one in importlib.metadata.packages_distributions().values() for name in one}
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages if name in installed]
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {', '.join(found)}, "
        f"Pillow's libjpeg-turbo {features.version('libjpeg_turbo')}"
    )


@command
def main() -> None:
    """Run the sections of the command line."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few seconds each, to see that everything works")
    parser.add_argument("--data", default="", help="also run the pipeline on the first shards of this folder")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or .model (default: a small one made here)")
    options = parser.parse_args()
    chosen = options.sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if "pipeline" in chosen and importlib.util.find_spec("webdataset") is None:
        parser.error("the section pipeline compares with webdataset, which is not installed: pip install webdataset")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(machine())
    with tempfile.TemporaryDirectory(prefix="genlip-benchmark-") as folder:
        data = BenchData(Path(folder), options.quick, options.data, options.tokenizer)
        for name in chosen:
            SECTIONS[name](data)


if __name__ == "__main__":
    sys.exit(main())
