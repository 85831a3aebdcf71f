#!/usr/bin/env python3
"""Time and memory of attention mass by blocks of queries, as ratios to eager maps.

    python tools/benchmarks/attention_mass.py
    python tools/benchmarks/attention_mass.py --tokens 1280 4352 --heads 16 --channels 72 --device cuda

Eager keeps one layer's probabilities [H, S, S] and sums over groups of keys, as models of transformers do with
output_attentions. Each runs in its own process; the first, short sequence is not counted. Memory is the growth of the
peak: resident memory on a CPU, allocated memory on a GPU. Ratios are eager over blocks: above 1, blocks are better.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch
from torch import Tensor

from genlip_megatron.command import command
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.evaluate.attention_capture import Tokens
from genlip_megatron.evaluate.attention_mass import BLOCK, group_mass, visible_keys

TEXT = 256


def eager_mass(query: Tensor, key: Tensor, visible: Tensor, scale: float, queries: Tensor, keys: Tensor) -> Tensor:
    """As ``group_mass``, from all probabilities at once."""
    scores = query.float() @ key.float().transpose(1, 2) * scale
    seen = torch.arange(len(visible), device=query.device) < visible.to(query.device)[:, None]
    sums = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=0) @ keys.to(query.device)  # [S, G]
    return queries.double().T @ sums.double().cpu() / queries.double().sum(dim=0)[:, None]


def _measure(way: str, tokens: int, options: argparse.Namespace) -> tuple[float, float, Tensor]:
    """(seconds, bytes, masses) of one layer."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    torch.set_num_threads(options.threads)

    def layer(length: int) -> tuple[float, Tensor]:
        query, key = (torch.randn(options.heads, length, options.channels, device=device) for _ in range(2))
        groups = Tokens(0, length - TEXT, 6, TEXT - 6)
        visible = visible_keys(length - TEXT, length)
        arguments = (query, key, visible, options.channels**-0.5, groups.queries(), groups.keys())
        start = time.perf_counter()
        mass = eager_mass(*arguments) if way == "eager" else group_mass(*arguments, block=options.block_size)
        return time.perf_counter() - start, mass  # the result is on the CPU, so a GPU has finished

    def peak() -> float:
        if cuda:
            return float(torch.cuda.max_memory_allocated(device))
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    layer(TEXT + 16)
    before = peak()
    seconds, mass = layer(tokens)
    return seconds, peak() - before, mass


@command
def main() -> int:
    """Run."""
    parser = StrictParser(
        prog="attention_mass.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1280, 4352], help=f"image and {TEXT} of text")
    parser.add_argument("--heads", type=int, default=16, help="default: 16, of So/16")
    parser.add_argument("--channels", type=int, default=72, help="of a head (default: 72)")
    parser.add_argument("--block-size", type=int, default=BLOCK, help=f"default: {BLOCK}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    options = parser.parse_args()
    for tokens in options.tokens:
        if tokens <= TEXT:
            raise ValueError(f"--tokens {tokens}: must be above {TEXT}, the text")
        found = []
        for way in ("blocks", "eager"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(_measure, (way, tokens, options)))
        (seconds, size, mass), (eager_seconds, eager_size, eager) = found
        print(
            f"tokens {tokens} | blocks {seconds:.3f} s {size / 2**20:.0f} MiB | eager {eager_seconds:.3f} s "
            f"{eager_size / 2**20:.0f} MiB | difference {float((mass - eager).nan_to_num().abs().max()):.1e} | "
            f"time ratio {eager_seconds / seconds:.2f} | memory ratio {eager_size / max(size, 1):.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
