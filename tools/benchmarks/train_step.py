#!/usr/bin/env python3
"""Compare whole training steps, in tokens per second, with a plain padded implementation of the same model.

    tools/benchmarks/train_step.py                    (about five minutes on two CPU cores)

Forward, backward, gradient clipping and AdamW in float32, by this project (packed, exact per-sample attention, head
on answer rows, Megatron-Core's schedule, DistributedDataParallel and distributed optimizer) and by ``plain.py``
(padded, dense-mask SDPA), on the same samples from the same weights. Each runs in its own process, so that the settings
of one do not affect the other (this project's CPU layer and malloc policy in particular). Losses are compared before
timing. Contestants take turns; the figure is the median step. Padding does not count as tokens. Each comparison ends in
``ratio N``: our tokens/s over the baseline's.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.config.command_line import StrictParser

megatron_patches.install()

from common import SMALL, make_samples, native_grids, take_turns, tokens_of  # noqa: E402
from plain import IGNORE, PaddedBatch, collate  # noqa: E402

from genlip_megatron.batch import PATCH_SIZE, PackedBatch, Sample, pack_samples  # noqa: E402
from genlip_megatron.config import DataConfig, RunConfig, TrainConfig  # noqa: E402
from genlip_megatron.data.plan import Plan, Source  # noqa: E402
from genlip_megatron.model.state_dict import canonical_shapes  # noqa: E402
from genlip_megatron.model.weights import initial_tensor  # noqa: E402
from genlip_megatron.parallel import groups  # noqa: E402
from genlip_megatron.train.setup import build_run  # noqa: E402
from genlip_megatron.train.step import train_step  # noqa: E402

LR, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.01, (0.9, 0.95), 1.0


def pack(samples: list[Sample], seq_length: int) -> list[PackedBatch]:
    """Micro-batches of one pack each, filled by the project's own plan."""
    lengths = np.array([tokens_of(sample) for sample in samples])
    plan = Plan([Source(len(lengths), lambda ids: lengths[ids])], seq_length, lanes=1, seed=0, epochs=1)
    batches = []
    while ids := plan.next_pack(0):
        batches.append(pack_samples([[samples[i] for i in ids]], seq_length))
    return batches


def ours(samples: list[Sample], packs: int) -> tuple[Callable[[], float], float]:
    """(function that runs one training step and returns its loss; fraction of slots that hold tokens)."""
    total = sum(tokens_of(sample) for sample in samples)
    longest = max(tokens_of(sample) for sample in samples)
    # The shortest packs that hold the samples in ``packs`` micro-batches.
    seq_length = max(-(-total // packs), longest)
    while len(batches := pack(samples, seq_length)) > packs:
        seq_length += 1
    config = RunConfig(
        model=SMALL,
        data=DataConfig(seq_length=seq_length),
        train=TrainConfig(
            global_batch_size=len(batches), lr=LR, min_lr=LR, lr_warmup_iters=0, train_iters=1000,
            weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], clip_grad=CLIP, precision="fp32",
        ),
    )  # fmt: skip
    groups.initialize(config)
    run = build_run(config)

    def step() -> float:
        return train_step(run, iter(batches)).loss

    return step, total / (seq_length * len(batches))


def padded(samples: list[Sample]) -> PaddedBatch:
    """The samples as a padded batch for the baseline."""
    patches, labels = [], []
    for sample in samples:
        assert sample.patches is not None
        patches.append((sample.patches.float() / 127.5 - 1).unflatten(1, (3, PATCH_SIZE, PATCH_SIZE)))
        predicted = torch.tensor(sample.token_ids).where(torch.tensor(sample.loss_mask), torch.tensor(IGNORE))
        images = torch.full((sample.rows * sample.columns - 1,), IGNORE)
        labels.append(torch.cat((images, predicted, torch.tensor([IGNORE]))))
    texts, grids = [torch.tensor(s.token_ids) for s in samples], [(s.rows, s.columns) for s in samples]
    return collate(patches, texts, labels, grids)


class Baseline:
    """The padded implementation in its own process, one step per call."""

    def __init__(self, file: Path, head: str) -> None:
        script = str(Path(__file__).with_name("plain.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, str(file), "--head", head],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> tuple[float, float]:
        """(loss, seconds) of one training step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        loss, seconds = self._process.stdout.readline().split()
        return float(loss), float(seconds)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(name: str, samples: list[Sample], rounds: int, packs: int, threads: int) -> None:
    """Time the project and both baselines on ``samples`` and print the ratios."""
    tokens = sum(tokens_of(sample) for sample in samples)
    mine, fill = ours(samples, packs)

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = mine()
        return loss, time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batch.pt"
        weights = {name: initial_tensor(name, shape, SMALL, 1234) for name, shape in canonical_shapes(SMALL).items()}
        torch.save(
            {"model": asdict(SMALL), "weights": weights, "batch": asdict(padded(samples)), "threads": threads,
             "lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip": CLIP}, file,
        )  # fmt: skip
        baselines = {f"head-{head}": Baseline(file, head) for head in ("all", "answer")}
        contestants = {"ours": timed, **{label: baseline.step for label, baseline in baselines.items()}}
        # The first step of each warms up and shows that all three compute the same loss.
        losses = {label: step()[0] for label, step in contestants.items()}
        spread = max(losses.values()) - min(losses.values())
        if spread > 1e-4:
            sys.exit(f"the losses differ: {losses}")
        turns = take_turns(name, contestants, rounds)
        for baseline in baselines.values():
            baseline.close()
    seconds = {label: [turn[1] for turn in mine] for label, mine in turns.items()}
    rates = {label: tokens / statistics.median(times) for label, times in seconds.items()}
    print(f"{name}: {len(samples)} samples, {tokens} tokens, loss {losses['ours']:.6f} (spread {spread:.1e}); "
          f"ours {rates['ours']:.0f} tokens/s, {packs} packs {100 * fill:.1f}% full")  # fmt: skip
    for label in baselines:
        times = seconds[label]
        print(f"  {name} {label}: baseline {rates[label]:.0f} tokens/s, step {min(times):.2f} to {max(times):.2f} s, "
              f"ours {min(seconds['ours']):.2f} to {max(seconds['ours']):.2f} s, "
              f"ratio {rates['ours'] / rates[label]:.2f}")  # fmt: skip


@command
def main() -> None:
    """Run both mixes."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant (default: 7)")
    parser.add_argument("--samples", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--packs", type=int, default=2, help="our number of packs (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--only", choices=("fixed", "native"), default="", help="run one mix only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    print(f"torch {torch.__version__}, {options.threads} threads, float32 on CPU, "
          f"{sum(int(np.prod(s)) for s in canonical_shapes(SMALL).values()) / 1e6:.1f} M parameters")  # fmt: skip
    for mix in [options.only] if options.only else ["fixed", "native"]:
        grids = native_grids(options.samples, rng) if mix == "native" else [(14, 14)] * options.samples
        compare(mix, make_samples(grids, rng), options.rounds, options.packs, options.threads)
    groups.finalize()


if __name__ == "__main__":
    sys.exit(main())
