#!/usr/bin/env python3
"""Peak memory of training steps on a GPU, counted by torch's allocator, beside the estimate of tools/estimate.py.

    python -m tests.null_gpu.run tests/null_gpu/memory.py --config so16_stage1 --micro-batch-size 2 [more flags]
    torchrun --nproc-per-node 2 -m tests.null_gpu.run --devices 2 tests/null_gpu/memory.py --config g16_stage1 --tp 2

Packs hold rendered scenes, unless --train-data and --tokenizer name others. Steps have two micro-batches per pipeline
stage. With several ranks the fullest is reported. On the null GPU kernels do nothing, so losses mean nothing; the same
command also runs on a real GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from genlip_megatron import megatron_patches

megatron_patches.install()

import torch  # noqa: E402

from genlip_megatron.config import RunConfig, override  # noqa: E402
from genlip_megatron.config.command_line import parse_args  # noqa: E402
from genlip_megatron.estimate import GIB, memory  # noqa: E402
from genlip_megatron.estimate.sample import data_parallel_size  # noqa: E402
from genlip_megatron.parallel import groups  # noqa: E402
from genlip_megatron.train.setup import set_up  # noqa: E402
from genlip_megatron.train.step import train_step  # noqa: E402
from tools import gpu_check  # noqa: E402

STEPS = 2  # the optimizer's state exists only after the first step


def measured(config: RunConfig) -> tuple[float, float]:
    """(peak allocated bytes of a step, reserved bytes) of the fullest rank."""
    run = set_up(config)
    assert run.train_loader is not None
    batches = iter(run.train_loader)
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        train_step(run, batches)
    run.train_loader.close()
    peaks = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], dtype=torch.float64)
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    groups.finalize()
    allocated, reserved = peaks.tolist()
    return allocated, reserved


def main() -> int:
    """Measure and print; returns 1 if memory runs out."""
    assert __doc__ is not None
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("memory.py: torch sees no GPU: start it by python -m tests.null_gpu.run")
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1:]
        if "--train-data" not in given:
            gpu_check.render(Path(folder), 400)
            given = [*given, "--train-data", f"{folder}/train-*.tar", "--tokenizer", f"{folder}/tokenizer.model"]
        config, _ = parse_args(given)
        # No DALI, because it needs the real driver.
        ranks, micro_batches = int(os.environ.get("WORLD_SIZE", "1")), 2 * config.parallel.pipeline_model_parallel_size
        lanes = data_parallel_size(config, ranks)
        config = override(
            config,
            {
                "train.global_batch_size": lanes * micro_batches * config.train.micro_batch_size,
                "train.check_memory": False,
                "data.decoder": "pillow",
                "data.valid_data": [],
            },
        )
        found = memory(config, ranks)
        expected = found.total - found.overhead
        try:
            allocated, reserved = measured(config)
        except torch.OutOfMemoryError as error:
            print(f"does not fit: estimated {expected / GIB:.2f} GiB; {str(error).split('. GPU')[0]}")
            return 1
        if os.environ.get("RANK", "0") != "0":
            return 0
        print(
            f"peak {allocated / GIB:.2f} GiB, reserved {reserved / GIB:.2f} GiB, "
            f"estimated {expected / GIB:.2f} GiB ({expected / allocated - 1:+.1%})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
