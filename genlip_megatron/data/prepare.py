"""Index many shards in parallel; ``tools/prepare_data.py`` and the data benchmark use it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed

from tqdm import tqdm

from genlip_megatron.command import WorkerPool
from genlip_megatron.data.scan import UnreadableShard, refresh_index
from genlip_megatron.tokenizer import load_tokenizer

# Loaded once per process: loading a large vocabulary takes longer than indexing a small shard.
_tokenizer = functools.cache(load_tokenizer)


def index_shard(shard: str, tokenizer_path: str, prompt: str) -> tuple[int, bool, str]:
    """(good samples of a shard, whether its index was already up to date, why it could not be indexed or "")."""
    try:
        index, unchanged = refresh_index(shard, _tokenizer(tokenizer_path), prompt)
    except Exception as error:  # one bad shard must not stop the others
        named = isinstance(error, UnreadableShard)
        return 0, False, str(error) if named else f"{shard}: {type(error).__name__}: {error}"
    return len(index.rows), unchanged, ""


def index_shards(shards: Sequence[str], tokenizer: str, prompt: str, workers: int) -> tuple[int, dict[str, str]]:
    """Index shards in worker processes; (number of unchanged shards, {shard: why it could not be indexed})."""
    unchanged, samples, problems = 0, 0, {}
    # The worker processes are the parallelism; the tokenizer's own threads would only slow them down.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with WorkerPool(max(1, workers)) as pool:
        jobs = {pool.submit(index_shard, shard, tokenizer, prompt): shard for shard in shards}
        with tqdm(as_completed(jobs), total=len(jobs), desc="index", unit="shard", file=sys.stderr) as bar:
            for job in bar:
                count, old, problem = job.result()
                unchanged, samples = unchanged + old, samples + count
                if problem:
                    problems[jobs[job]] = problem
                bar.set_postfix(samples=samples, refresh=False)
    return unchanged, problems
