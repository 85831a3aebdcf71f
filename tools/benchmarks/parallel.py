#!/usr/bin/env python3
"""Cost of tensor, pipeline and context parallelism at fixed work, as ratios to data parallelism.

    torchrun --nproc-per-node 2 tools/benchmarks/parallel.py          (about six minutes on two CPU cores)
    torchrun --nproc-per-node 8 tools/benchmarks/parallel.py --size so16

Every layout trains the same model on the same global batch with the same number of processes, through the project's own
training step. So all do the same useful arithmetic. Data parallelism communicates gradients and weights once per step;
the extra time of another layout is its communication, its pipeline bubble and its smaller matrix products. Layouts take
turns; the figure is the median step. Each line ends in ``ratio N``: data parallelism's step time over the layout's; 1
means no extra cost.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import contextlib
import io
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.config.command_line import StrictParser

megatron_patches.install()

from common import SMALL, device_name, make_samples, take_turns  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from genlip_megatron.batch import PackedBatch, pack_samples  # noqa: E402
from genlip_megatron.config import DataConfig, ParallelConfig, RunConfig, TrainConfig, from_dict, load_yaml  # noqa: E402
from genlip_megatron.config.checks import check  # noqa: E402
from genlip_megatron.parallel import groups  # noqa: E402
from genlip_megatron.train.setup import build_run  # noqa: E402
from genlip_megatron.train.step import train_step  # noqa: E402

_MODEL = replace(SMALL, num_layers=8, num_attention_heads=8, rope_sections=(5, 5, 6))
SIDE, TEXT = 14, 74
TOKENS = SIDE * SIDE + TEXT  # of a sample


def layouts(processes: int) -> dict[str, ParallelConfig]:
    """Each kind of parallelism over all processes, and combinations if there are at least four."""
    n = processes
    found = {
        f"DP{n}": ParallelConfig(),
        f"DP{n} overlapped": ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        f"DP{n} FSDP": ParallelConfig(fsdp=True),
        f"TP{n}": ParallelConfig(tensor_model_parallel_size=n),
        f"TP{n}, whole sequence": ParallelConfig(tensor_model_parallel_size=n, sequence_parallel=False),
        f"PP{n}": ParallelConfig(pipeline_model_parallel_size=n),
        f"PP{n}xVPP2": ParallelConfig(pipeline_model_parallel_size=n, virtual_pipeline_model_parallel_size=2),
        f"CP{n} a2a": ParallelConfig(context_parallel_size=n),
        f"CP{n} all_gather": ParallelConfig(context_parallel_size=n, cp_comm_type="all_gather"),
    }
    if n % 4 == 0:
        half = n // 2
        found[f"TP2xPP{half}"] = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=half)
        found[f"TP2xCP{half}"] = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=half)
        found[f"PP2xCP{half}"] = ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=half)
    return found


def make_batches(packs: int, samples_per_pack: int) -> list[PackedBatch]:
    """Full packs of stage-1 samples with 196 patches and 74 text tokens each; the prompt carries no loss."""
    samples = make_samples([(SIDE, SIDE)] * packs * samples_per_pack, np.random.default_rng(0), (TEXT, TEXT))
    starts = range(0, len(samples), samples_per_pack)
    return [pack_samples([samples[i : i + samples_per_pack]], samples_per_pack * TOKENS) for i in starts]


def timed(config: RunConfig, batches: list[PackedBatch], steps: int) -> tuple[list[float], float]:
    """(seconds of each step but the first, loss of the first)."""
    groups.initialize(config)
    mine = batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    run = build_run(config)
    seconds, losses = [], []
    for _ in range(steps + 1):
        torch.distributed.barrier()
        begin = time.perf_counter()
        losses.append(train_step(run, iter(mine)).loss)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:], losses[0]


@command
def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = StrictParser(prog="parallel.py", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="", help="a recipe's model, as so16; default: a small one for CPUs")
    parser.add_argument("--packs", type=int, default=8, help="packs per global batch (default: 8)")
    parser.add_argument("--samples", type=int, default=4, help="samples per pack, 270 tokens each (default: 4)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a layout in each round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes < 2:
        parser.error("start it with torchrun on two processes or more: torchrun --nproc-per-node 2 ...")
    try:
        model = from_dict(load_yaml(f"{options.size}_stage1"), options.size).model if options.size else _MODEL
    except ValueError as error:
        parser.error(str(error))
    tokens = options.samples * TOKENS
    base = RunConfig(
        model=replace(model, drop_path_rate=0.0),
        data=DataConfig(seq_length=tokens),
        train=TrainConfig(global_batch_size=options.packs, lr_warmup_iters=0, train_iters=1000),
    )
    batches = make_batches(options.packs, options.samples)
    contestants, skipped = {}, {}
    for name, parallel in layouts(processes).items():
        config = replace(base, parallel=parallel)
        try:
            check(config, processes)
            contestants[name] = partial(timed, config, batches, options.steps)
        except ValueError as error:
            skipped[name] = str(error)
    with contextlib.redirect_stdout(io.StringIO()):  # the runs' own log lines
        turns = take_turns("layouts", contestants, options.rounds)
    report(turns, skipped, processes, options.packs * tokens)
    groups.finalize()
    return 0


def report(
    turns: dict[str, list[tuple[list[float], float]]], skipped: dict[str, str], processes: int, tokens: int
) -> None:
    """Print the table on rank 0. All layouts must have the same loss, or they did not do the same work."""
    losses = {name: mine[-1][1] for name, mine in turns.items()}
    baseline, *_ = losses
    for name, loss in losses.items():
        assert abs(loss / losses[baseline] - 1) < 1e-2, f"{name}: loss {loss} and not {losses[baseline]}"
    if torch.distributed.get_rank():
        return
    medians = {name: statistics.median(s for seconds, _ in mine for s in seconds) for name, mine in turns.items()}
    print(f"{processes} processes ({device_name()}), torch {torch.__version__}; {tokens} tokens a step")
    for name, median in medians.items():
        ratio = medians[baseline] / median
        print(f"{name:24} {1000 * median:8.0f} ms a step {tokens / median:9.0f} tokens/s   ratio {ratio:.2f}")
    for name, reason in skipped.items():
        print(f"{name:24} left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
