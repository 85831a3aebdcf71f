#!/usr/bin/env python3
"""Benchmark the data pipeline: one line per figure, ending in ``ratio N`` or ``value N unit``.

    tools/benchmarks/data.py                                  (about three minutes on two CPU cores)
    tools/benchmarks/data.py --data shards/ --tokenizer tokenizer.json

Shards -> PackedBatch on one core, in samples and tokens per second, against the ``webdataset`` library with Pillow and
the same tokenizer. The baseline decodes at full size, skips conversions without effect, caches the prompt's tokens,
reads in order without a shuffle buffer and packs in order. Both sides use this project's functions to cut patches and
lay out packs. (Pillow's ``draft`` would be faster, but gives other pixels.) Tokens and pixels are compared before
timing. The decoder "pillow" is timed too; its gain does not come from the codec.

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
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from common import take_turns
from data_contestants import Baseline, Contents, Ours, apart, call, run_config
from data_images import BenchData
from PIL import features

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.dataset import open_dataset
from genlip_megatron.tokenizer import load_tokenizer

_MOST_PACKS = 48


def rates(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


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
    config, plain = (run_config(shards, data.tokenizer, mode, seq_length, decoder) for decoder in ("cpu", "pillow"))
    pools = {"ours": apart(Ours, config), "plain": apart(Ours, plain), "webdataset": apart(Baseline, config)}
    theirs: Contents = call(pools["webdataset"], "contents")
    for label in ("ours", "plain"):
        check_same(name, theirs, call(pools[label], "contents", set(theirs)))
    # A turn takes each sample about once, so that every turn has the same images.
    dataset = open_dataset(shards, config.data, load_tokenizer(data.tokenizer).fingerprint, "shards")
    tokens = int(dataset.lengths(np.arange(len(dataset))).sum())
    packs = min(round(tokens / seq_length), _MOST_PACKS)
    turns = take_turns(name, {label: partial(call, pool, "turn", packs) for label, pool in pools.items()}, data.rounds)
    for pool in pools.values():
        pool.shutdown()
    print(f"pipeline {name}, {len(theirs)} samples found the same, then {data.rounds} rounds of {packs} packs, "
          f"mean sample: value {tokens / len(dataset):.0f} tokens", flush=True)  # fmt: skip
    for label, unit, clock in (
        ("ours", "samples", "seconds"),
        ("ours", "tokens", "seconds"),
        ("ours", "samples", "cpu_seconds"),
        ("plain", "samples", "cpu_seconds"),
    ):
        mine, base = ([getattr(t, unit) / getattr(t, clock) for t in turns[one]] for one in (label, "webdataset"))
        title = f"{unit}/s on one core" if clock == "seconds" else f"{unit} a CPU second"
        shown = "ours" if label == "ours" else 'ours with decoder "pillow"'
        ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        print(f"pipeline {name}, {title}: {shown} {rates(mine)}, webdataset {rates(base)}, ratio {ratio:.2f}",
              flush=True)  # fmt: skip


@command
def main() -> None:
    """Run both stages' rules on photos, and the user's shards."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that everything works")
    parser.add_argument("--data", default="", help="also run the pipeline on the first shards of this folder")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or .model (default: a small one made here)")
    options = parser.parse_args()
    if importlib.util.find_spec("webdataset") is None:
        parser.error("this compares with webdataset, which is not installed: pip install webdataset")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    packages = ("torch", "numpy", "pillow", "simplejpeg", "tokenizers", "webdataset")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{len(os.sched_getaffinity(0))} cores, {versions}, libjpeg-turbo {features.version('libjpeg_turbo')}")
    with tempfile.TemporaryDirectory(prefix="genlip-benchmark-") as folder:
        data = BenchData(Path(folder), options.quick, options.tokenizer)
        for stage, mode in (("stage 1", "fixed"), ("stage 2", "native")):
            compare(stage, data, data.indexed[stage], mode)
        if options.data:
            links = data.linked_shards(options.data)
            compare(f"stage 1 on {len(links)} shards of --data", data, links, "fixed")


if __name__ == "__main__":
    sys.exit(main())
