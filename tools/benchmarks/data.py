#!/usr/bin/env python3
"""Benchmark the data engine: one line per figure, ending in ``ratio N`` or ``value N unit``.

    tools/benchmarks/data.py                                  (all sections, about five minutes on two CPU cores)
    tools/benchmarks/data.py pipeline --data shards/ --tokenizer tokenizer.json

* ``pipeline``: shards -> PackedBatch on one core, in samples and tokens per second, against the ``webdataset`` library
  with Pillow and the same tokenizer. The baseline decodes at full size, skips conversions without effect, caches the
  prompt's tokens, reads in order without a shuffle buffer and packs in order. Both sides use this project's functions
  to cut patches and lay out packs. (Pillow's ``draft`` would be faster, but gives other pixels.) Tokens and pixels are
  compared before timing. The decoder "pillow" is timed too; its gain does not come from the codec.
* ``plan``: samples planned per second on one core; fill of the packs; by how much the slowest of 64 data-parallel ranks
  exceeds their mean, in forward FLOPs of so16.
* ``index``: images indexed per second by ``prepare_data.py`` on all cores, against only decoding them.
* ``resume``: seconds from creating the loader to its first pack, after 0 to 100,000 steps; bytes of the cursor.
* ``scale``: a billion samples in 100,000 shards: seconds from the start of a process to its first step, peak memory.

Each contestant has its own process, pinned to one core with one thread, and they take turns. Figures are medians; a
ratio is the median of the rounds' ratios. Rates per CPU second exclude the time that other programs had the core.
Everything is read from the page cache. The data are generated, and without ``--tokenizer`` the tokenizer too.
"""

from __future__ import annotations

from genlip_megatron.command import WorkerPool, command

# isort: split
import argparse
import importlib.metadata
import importlib.util
import io
import json
import mmap
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from data_contestants import Apart, Baseline, Contents, Ours, Turn, run_config
from data_images import BenchData
from PIL import Image, features
from tqdm import tqdm

from genlip_megatron.batch import PATCH_SIZE
from genlip_megatron.config import DEFAULT_PROMPT, ModelConfig, RunConfig
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.dataset import Dataset, open_dataset
from genlip_megatron.data.image import check_image
from genlip_megatron.data.index import index_path, read_index
from genlip_megatron.data.loader import Loader, build_plan
from genlip_megatron.data.manifest import manifest_paths
from genlip_megatron.data.plan import Phase, Plan, Source
from genlip_megatron.data.prepare import index_shard
from genlip_megatron.data.text import load_tokenizer

MODES = {"stage 1": "fixed", "stage 2": "native"}
SO16 = ModelConfig()
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


def forward_flops(images: np.ndarray, texts: np.ndarray, losses: np.ndarray, head: bool) -> np.ndarray:
    """float64 [N] forward FLOPs of so16's layers, exact prefix-LM attention and head, from int64 [N] tokens."""
    tokens, layers, width = images + texts, SO16.num_layers, SO16.hidden_size
    blocks = 2.0 * tokens * layers * (5 * width**2 + 3 * width * SO16.ffn_hidden_size)
    pairs = images**2 + images * texts + texts * (texts + 1) / 2
    rows = 2.0 * SO16.text_hidden_size * SO16.vocab_size * losses
    return blocks + 4.0 * width * layers * pairs + (rows if head else 0)


class Planner:
    """Plans over simulated data sets."""

    def __init__(self, manifests: list[str], mode: str, lanes: int) -> None:
        self.config = run_config(manifests, "", mode, lanes=lanes)
        self.datasets = [open_dataset([m], self.config.data, "none", "manifests") for m in manifests]
        self.plan = self._plan()

    def _plan(self) -> Plan:
        sources = [Source(len(dataset), dataset.lengths) for dataset in self.datasets]
        weights = (7.0, 3.0)[: len(sources)]
        return Plan(sources, self.config.data.seq_length, self.config.train.global_batch_size, 0, [Phase(0, weights)])

    def turn(self, lanes: int, samples: int) -> float:
        """Samples planned per CPU second for one rank's lanes."""
        done, begin = 0, time.process_time()
        while done < samples:
            done += sum(len(self.plan.next_pack(lane)) for lane in range(lanes))
        return done / (time.process_time() - begin)

    def costs(self, steps: int) -> tuple[float, np.ndarray]:
        """(fill of all lanes' packs; float64 [steps, 2, lanes] forward FLOPs without and with the head)."""
        plan, flops, tokens = self._plan(), [], 0
        for _ in range(steps):
            packs = [plan.next_pack(lane) for lane in range(plan.lanes)]
            ids = np.array([sample for pack in packs for sample in pack])
            images, texts, losses = np.empty((3, len(ids)), np.int64)
            owner = np.searchsorted(plan.offsets, ids, side="right") - 1
            for i, dataset in enumerate(self.datasets):
                rows = dataset.plan_rows(ids[owner == i] - plan.offsets[i])
                heights, widths = dataset.image_sizes(rows)
                images[owner == i] = (heights // PATCH_SIZE) * (widths // PATCH_SIZE)
                texts[owner == i], losses[owner == i] = rows["text_tokens"], rows["loss_tokens"]
            tokens += int(images.sum() + texts.sum())
            starts = np.cumsum([0, *(len(pack) for pack in packs[:-1])])
            of_samples = [forward_flops(images, texts, losses, head) for head in (False, True)]
            flops.append(np.add.reduceat(of_samples, starts, axis=1))
        return tokens / (steps * plan.lanes * plan.seq_length), np.array(flops)


def plan(data: BenchData) -> None:
    """Rate, fill and imbalance of both stages' mixes, from one source and from two."""
    samples, ranks, steps = (200_000, 8, 4) if data.quick else (4_000_000, 64, 20)
    for stage, mode in MODES.items():
        manifests = [data.table(f"{stage} {i}", stage, samples, samples // 1000) for i in range(2)]
        for count, title in ((1, "one source"), (2, "two sources 7:3")):
            planner = Apart(Planner, manifests[:count], mode, ranks * 8)
            warmup, *speeds = [planner("turn", 8, 4_000 if data.quick else 40_000) for _ in range(data.rounds + 1)]
            fill, flops = planner("costs", steps)
            planner.close()
            name = f"plan {stage}, {title}"
            show(f"{name}, samples a CPU second, 8 lanes: {rates(speeds)}, at first {warmup:.0f}, "
                 f"value {statistics.median(speeds):.0f} samples/s")  # fmt: skip
            show(f"{name}, fill of {steps * ranks * 8} packs: value {100 * fill:.3f} %")
            of_ranks = flops.reshape(steps, 2, ranks, 8).sum(-1)
            over = 100 * (of_ranks.max(-1) / of_ranks.mean(-1) - 1)
            for head, values in zip(("without", "with"), over.T, strict=True):
                slowest = f"{name}, slowest of {ranks} ranks over their mean, {head} head"
                show(f"{slowest}, mean of {steps} steps: value {values.mean():.3f} %")
                show(f"{slowest}, worst step: value {values.max():.3f} %")


def index_one(shard: str, tokenizer: str) -> float:
    """CPU seconds to index a shard as ``prepare_data.py`` does."""
    begin = time.process_time()
    _, _, problem = index_shard(shard, tokenizer, DEFAULT_PROMPT)
    if problem:
        raise OSError(problem)
    return time.process_time() - begin


def decode_one(shard: str, places: list[tuple[int, int]], pillow: bool) -> float:
    """CPU seconds to only read and decode the images at the given (offset, size) in a shard."""
    begin = time.process_time()
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for offset, size in places:
            image = content[offset : offset + size]
            if pillow:
                Image.open(io.BytesIO(image)).load()
            else:
                check_image(image)
    return time.process_time() - begin


def index(data: BenchData) -> None:
    """Images per second that ``prepare_data.py``'s workers index on all cores, against only decoding them."""
    repeats, rounds = (2, 1) if data.quick else (8, 3)
    per_shard = len(data.photos) * repeats // (2 * data.workers)
    shards = data.shards("stage 1", repeats, per_shard)
    with WorkerPool(data.workers) as pool:

        def indexing() -> list[float]:
            for shard in shards:
                Path(index_path(shard)).unlink(missing_ok=True)
            return list(pool.map(index_one, shards, repeat(data.tokenizer)))

        indexing()  # starts the processes before timing
        tables = [read_index(shard).rows for shard in shards]
        places = [list(zip(t["image_offset"].tolist(), t["image_size"].tolist(), strict=True)) for t in tables]
        contestants: dict[str, Callable[[], list[float]]] = {
            "index": indexing,
            "check_image alone": lambda: list(pool.map(decode_one, shards, places, repeat(False))),
            "Pillow's load alone": lambda: list(pool.map(decode_one, shards, places, repeat(True))),
        }
        count = sum(map(len, places))
        speeds: dict[str, list[float]] = {label: [] for label in contestants}
        cpu_speeds: dict[str, list[float]] = {label: [] for label in contestants}
        for _ in tqdm(range(rounds), desc="index", unit="round", file=sys.stderr):
            for label, work in contestants.items():
                begin = time.perf_counter()
                cpu_speeds[label].append(count / sum(work()))
                speeds[label].append(count / (time.perf_counter() - begin))
    for label in list(contestants)[1:]:
        for title, values in ((f"images/s on {data.workers} cores", speeds), ("images a CPU second", cpu_speeds)):
            show(f"index, {title}, {len(shards)} shards of {per_shard}: {rates(values['index'])}, {label} "
                 f"{rates(values[label])}, ratio {median_ratio(values['index'], values[label]):.2f}")  # fmt: skip


class Resume:
    """Loaders that start from a cursor."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def cursor(self, steps: int) -> dict[str, Any]:
        """The cursor after ``steps`` steps."""
        loader = Loader(self.config, "train")
        loader.skip(steps)
        loader.close()
        return loader.state_dict()

    def seconds(self, cursor: dict[str, Any]) -> float:
        """Seconds from creating the loader to the first pack."""
        begin = time.perf_counter()
        loader = Loader(self.config, "train")
        loader.load_state_dict(cursor)
        next(iter(loader))
        taken = time.perf_counter() - begin
        loader.close()
        return taken


def resume(data: BenchData) -> None:
    """Time to the first pack from near and far cursors, and their size."""
    lanes = 8
    loaders = Apart(Resume, run_config(data.indexed["stage 1"], data.tokenizer, seq_length=2048, lanes=lanes))
    steps = (0, 10, 100) if data.quick else (0, 1_000, 100_000)
    cursors = {step: loaders("cursor", step) for step in tqdm(steps, desc="cursors", file=sys.stderr)}
    loaders("seconds", cursors[0])  # warms up
    seconds: dict[int, list[float]] = {step: [] for step in steps}
    for _ in range(data.rounds):
        for step, cursor in cursors.items():
            seconds[step].append(loaders("seconds", cursor))
    loaders.close()
    for step, taken in seconds.items():
        show(f"resume at step {step:,}, {lanes} lanes ({min(taken):.3f} to {max(taken):.3f}): "
             f"value {statistics.median(taken):.3f} s")  # fmt: skip
    show(f"resume at step {steps[-1]:,} over step 0: ratio {median_ratio(seconds[steps[-1]], seconds[0]):.2f}")
    show(f"resume, cursor of a lane as JSON at step {steps[-1]:,}: "
         f"value {len(json.dumps(cursors[steps[-1]])) / lanes:.0f} bytes")  # fmt: skip


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


SECTIONS: dict[str, Callable[[BenchData], None]] = {
    "pipeline": pipeline, "plan": plan, "index": index, "resume": resume, "scale": scale,
}  # fmt: skip


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
