#!/usr/bin/env python3
"""Index shards: read each once, decode every image, count tokens, and write SHARD.index.npz beside it.

    tools/prepare_data.py data/train-*.tar data/val-00000.tar --tokenizer tokenizer.json

Shards whose index still fits are skipped, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.index import ShardIndex, build_index, expand_shards, load_index
from genlip_megatron.data.text import load_tokenizer


def prepare(shard: str, tokenizer_path: str, prompt: str) -> tuple[ShardIndex, bool]:
    """(index, whether it was already there)."""
    tokenizer = load_tokenizer(tokenizer_path)
    try:
        return load_index(shard, tokenizer, prompt), True
    except ValueError:
        return build_index(shard, tokenizer, prompt), False


def main() -> None:
    """Index the shards of the command line and print a report."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help=".tar files, folders of them, or globs")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer.json or SentencePiece .model")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="prompt of samples with a caption only")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args()
    try:
        load_tokenizer(options.tokenizer)
        shards = expand_shards(options.shards, "SHARDS")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        jobs = [pool.submit(prepare, shard, options.tokenizer, options.prompt) for shard in shards]
        results = [job.result() for job in tqdm(jobs, desc="index", unit="shard", file=sys.stderr)]
    good = sum(len(index.rows) for index, _ in results)
    refused = collections.Counter(reason.split(":")[0] for index, _ in results for reason in index.refused.values())
    tokens = sum(int(index.rows["text_tokens"].sum()) for index, _ in results)
    print(f"{len(shards)} shards ({sum(old for _, old in results)} unchanged), {good} good samples, "
          f"{sum(refused.values())} refused, {tokens / max(good, 1):.1f} text tokens a sample")  # fmt: skip
    for reason, count in refused.most_common():
        print(f"  refused {count}: {reason}")
    for index, _ in results:
        for key, reason in index.refused.items():
            print(f"  {index.shard} {key}: {reason}")
    if good == 0:
        parser.exit(1, f"{parser.prog}: error: no good sample in {len(shards)} shards\n")


if __name__ == "__main__":
    main()
