#!/usr/bin/env python3
"""Cost of saving and loading a checkpoint, as ratios to torch.save and Megatron-Core's own functions.

    python tools/benchmarks/checkpoint.py --dir /local/disk           (1.2 GB; about three minutes on two CPU cores)
    torchrun --nproc-per-node 8 tools/benchmarks/checkpoint.py --dir /local/disk --config l16_stage1

It needs no data: weights are random, and so are the gradients of the step that fills the optimizer's state. The methods
take turns and write to the same disk until the data are synced. Figures are medians over rounds, with the lowest and
highest; with several ranks the slowest rank counts. ``ratio`` is the baseline's seconds over the method's: above 1 is
faster. The baselines are ``torch.save`` of the same tensors to one file per rank, synced, and ``torch.load``.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from genlip_megatron import megatron_patches
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.device import current_device

megatron_patches.install()

from common import SMALL, device_name  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from genlip_megatron.checkpoint import loading, manifest, parts, paths  # noqa: E402
from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE  # noqa: E402
from genlip_megatron.checkpoint.parts import State  # noqa: E402
from genlip_megatron.checkpoint.saving import Facts, Saver  # noqa: E402
from genlip_megatron.config import CheckpointConfig, RunConfig, from_dict, load_yaml, override  # noqa: E402
from genlip_megatron.config.checks import check  # noqa: E402
from genlip_megatron.parallel import groups  # noqa: E402
from genlip_megatron.train.setup import build_run  # noqa: E402
from genlip_megatron.train.state import Run  # noqa: E402

# l16's width, so that tensors have realistic sizes, with fewer layers and a smaller vocabulary.
MODEL = replace(
    SMALL, num_layers=4, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=2816, text_hidden_size=1024,
    rope_sections=(8, 12, 12),
)  # fmt: skip
# Seconds of work that stand for the forward and backward pass of a step; less than in a recipe.
_STEP = 0.3


class Times:
    """Seconds of each method by round; with several ranks those of the slowest."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, seconds: float) -> None:
        slowest = torch.tensor([seconds], dtype=torch.float64, device=current_device())
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        self.of[name].append(float(slowest.item()))

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block; all ranks start it together."""
        torch.distributed.barrier()
        begin = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - begin)

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    def spread(self, name: str, digits: int = 2) -> str:
        low, high = min(self.of[name]), max(self.of[name])
        return f"{self.median(name):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def step(run: Run) -> None:
    """Update with random gradients."""
    for chunk in run.model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                if hasattr(parameter, "main_grad"):
                    parameter.main_grad.normal_()
                else:
                    parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()


def sharded(run: Run, kind: str, loading_it: bool = False) -> dict[str, Any]:
    """The state in the form that Megatron-Core's functions need."""
    weights = parts.weights_of(run.model)
    facts = {"distrib_optim_sharding_type": kind}
    return {"model": weights, "optimizer": run.optimizer.sharded_state_dict(weights, loading_it, metadata=facts)}


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """The same tensors by plain names: this rank's weights and its part of the optimizer's state."""
    found = {f"{i}.{name}": p.detach() for i, chunk in enumerate(run.model) for name, p in chunk.named_parameters()}
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for i, (parameter, state) in enumerate(optimizer.optimizer.state.items()):
            found[f"{id(optimizer)}.{i}.param"] = parameter.detach().clone()
            found |= {f"{id(optimizer)}.{i}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    return {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in found.items()}


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Drop files from the page cache, so that they are read from the disk; returns whether the system supports it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def work(until: Callable[[], bool]) -> None:
    """Run matrix products until ``until()`` is true."""
    matrix = torch.randn(512, 512, device=current_device())
    while not until():
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()


class Benchmark:
    """One rank's part of the benchmark.

    Args:
        run: the run that is saved and loaded.
        root: an empty folder on the disk.
    """

    def __init__(self, run: Run, root: Path) -> None:
        self.run, self.root, self.times = run, root, Times()
        self.rank = torch.distributed.get_rank()
        self.file = root / f"plain-{self.rank}.pt"
        self.lines: list[str] = []
        self.iteration = 0
        self.bytes = self.ours_bytes = 0
        self.dropped = True
        config = override(run.config, {"checkpoint.save": str(root / "run")})
        self.state = State(run.model, run.optimizer, run.scheduler)
        self.saver = Saver(config, self.state, self.lines.append)
        self.kinds = [FULLY_RESHARDABLE] if run.config.parallel.fsdp else [DP_RESHARDABLE, FULLY_RESHARDABLE]

    def round(self) -> None:
        """Run every method of saving and loading once."""
        step(self.run)
        self._torch_save()
        for kind in self.kinds:
            self._megatron_save(kind)
        for kind in self.kinds:
            with self.times.timed(f"ours {kind}"):
                self._save(kind)
            self._settle()
        self._behind()
        self._load()

    def _save(self, kind: str, behind: bool = False) -> None:
        self.iteration += 1
        self.saver.save(self.iteration, {}, kind, Facts(), behind=behind)

    def _settle(self) -> None:
        """Wait until all reads and writes are done."""
        self.saver.settle()
        torch.distributed.barrier()

    def _torch_save(self) -> None:
        tensors = tensors_of(self.run)
        self.bytes = sum(tensor.nbytes for tensor in tensors.values())
        new = self.file.with_suffix(".new")  # like our saves, which keep the last one until the next is complete
        with self.times.timed("torch.save"), open(new, "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.file)

    def _megatron_save(self, kind: str) -> None:
        place, new = self.root / f"megatron-{kind}", self.root / f"megatron-{kind}.new"
        if self.rank == 0:
            new.mkdir()
        with self.times.timed(f"dist_checkpointing.save {kind}"):
            dist_checkpointing.save(sharded(self.run, kind), str(new))
        if self.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)

    def _behind(self) -> None:
        """Save in the background of work, twice: how long work stops, and how long the save takes.

        Only the second save counts: Megatron-Core's saves have forked, after which the first write to each page of this
        process, the host copies included, causes a page fault.
        """
        clock = time.perf_counter
        for _ in range(2):
            torch.distributed.barrier()
            begin = clock()
            self._save(self.kinds[0], behind=True)
            started = clock()
            work(lambda: clock() - started > _STEP)  # noqa: B023 - called at once
            update = clock()
            self.saver.wait_for_copy()
            stopped = started - begin + clock() - update
            work(lambda: self.saver.written)
            written = clock() - begin
            torch.distributed.barrier()
            completion = clock()
            self.saver.finish()
            finishing = clock() - completion
            self._settle()
        self.times.add("stopped", stopped)
        self.times.add("finish", finishing)
        self.times.add("behind, written", written)

    def _uncache(self, files: Iterable[Path]) -> None:
        torch.distributed.barrier()
        if self.rank == 0:
            self.dropped &= drop_page_cache(files)
        torch.distributed.barrier()

    def _load(self) -> None:
        """Run each method of loading, from the disk if the page cache can be dropped."""
        run, times, kind = self.run, self.times, self.kinds[0]
        ours = paths.step_folder(self.root / "run", self.iteration)
        plain = self.root / f"megatron-{kind}"
        tensors = tensors_of(run)
        self._uncache(self.root.glob("plain-*.pt"))
        with times.timed("torch.load"), torch.no_grad():
            loaded = torch.load(self.file, weights_only=True)
            for name, tensor in tensors.items():
                tensor.copy_(loaded[name])
        del loaded, tensors
        self._uncache(filter(Path.is_file, plain.rglob("*")))
        with times.timed("dist_checkpointing.load"), torch.no_grad():
            state = dist_checkpointing.load(sharded(run, kind, True), str(plain))
            parts.set_weights(run.model, state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
        del state
        for verify in ("full", "sizes"):
            self._uncache(filter(Path.is_file, ours.rglob("*")))
            with times.timed(f"ours, verify {verify}"):
                with times.timed(f"find, verify {verify}"):
                    found = loading.find(ours, verify == "full", self.lines.append)
                assert found is not None
                loading.load(*found, run.config, self.state, self.lines.append)
        self.ours_bytes = manifest.read(ours).size


def report(bench: Benchmark, rounds: int) -> None:
    """Print the tables, on rank 0."""
    whole = torch.tensor([float(bench.bytes)], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(whole)
    if bench.rank:
        return
    times, size, kinds = bench.times, bench.ours_bytes, bench.kinds
    print(f"{torch.distributed.get_world_size()} ranks ({device_name()} a rank), {os.cpu_count()} CPU cores")
    print(f"disk {bench.root}; checkpoint {size / 1e9:.3f} GB; torch {torch.__version__}; {rounds} rounds")

    def table(title: str, baseline: str, rows: list[tuple[str, str]]) -> None:
        print(f"\n| {title} | GB | seconds (lowest to highest) | GB/s | ratio |\n|---|---|---|---|---|")
        for label, name in rows:
            volume, seconds = (whole.item() if name == baseline else size) / 1e9, times.median(name)
            ratio = times.median(baseline) / seconds
            print(f"| {label} | {volume:.3f} | {times.spread(name)} | {volume / seconds:.2f} | {ratio:.2f} |")

    table("save", "torch.save", [
        ("torch.save, one file a rank, synced", "torch.save"),
        *((f"{way}, {kind}", f"{way} {kind}") for way in ("dist_checkpointing.save", "ours") for kind in kinds),
        (f"ours, {kinds[0]}, behind work", "behind, written"),
    ])  # fmt: skip
    synchronous = times.median(f"ours {kinds[0]}")
    print("\n| training stops for a save behind it | seconds | of the save that waits |\n|---|---|---|")
    for name, label in (("stopped", "to begin, and before the next update"), ("finish", "to complete it")):
        print(f"| {label} | {times.spread(name, 3)} | {times.median(name) / synchronous:.1%} |")
    print()
    for warning in sorted({line for line in bench.lines if "WARNING" in line}):
        print(warning)
    for kind in kinds:
        lines = [line for line in bench.lines if f" {kind};" in line]
        print(f"the last {kind}: {lines[-1].split(kind + '; ')[1]}")
    where = "read from the disk" if bench.dropped else "IN THE PAGE CACHE, which could not be dropped"
    table(f"load ({where})", "torch.load", [
        ("torch.load, copied into the state", "torch.load"),
        *((name, name) for name in ("dist_checkpointing.load", "ours, verify full", "ours, verify sizes")),
        ("of it the verification", "find, verify full"),
    ])  # fmt: skip
    start, load, verify = (times.median(name) for name in ("start", "ours, verify full", "find, verify full"))
    print(
        f"\nresume {start + load:.2f} s without data: {start:.2f} s from the start of the processes to a built model "
        f"and optimizer, {verify:.2f} s verification, {load - verify:.2f} s loading"
    )


@command
def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = StrictParser(prog="checkpoint.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dir", type=Path, required=True, help="folder on the disk to test; a subfolder is created and removed"
    )
    parser.add_argument("--config", default="", help="a recipe, as l16_stage1; default: l16's width, 4 layers, 1.2 GB")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as model.num_layers=2")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: must be at least 2, because the first save differs from the others")
    try:
        tree = load_yaml(options.config) if options.config else {}
        config = from_dict(tree, options.config) if tree else RunConfig(model=MODEL)
        settings = dict(word.split("=", 1) for word in options.set)
        config = override(config, {name: yaml.safe_load(value) for name, value in settings.items()})
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        parser.error(str(error))
    root = options.dir / "genlip-checkpoint-benchmark"
    if root.exists():
        parser.error(f"--dir {options.dir}: {root} exists, maybe left by a killed benchmark. Remove it.")
    groups.initialize(replace(config, checkpoint=CheckpointConfig()))
    torch.distributed.barrier()  # every rank has checked that the folder does not exist
    if torch.distributed.get_rank() == 0:
        root.mkdir(parents=True)
    torch.distributed.barrier()
    try:
        keep = replace(config, checkpoint=CheckpointConfig(keep_last=1, keep_best=0))
        bench = Benchmark(build_run(keep), root)
        bench.times.add("start", time.time() - psutil.Process().create_time())
        for _ in range(options.rounds):
            bench.round()
        report(bench, options.rounds)
        bench.saver.close()
        groups.finalize()
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
