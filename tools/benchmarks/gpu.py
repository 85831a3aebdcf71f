#!/usr/bin/env python3
"""Benchmark training on one Hopper GPU: the parts, whole steps against a baseline, and the loader.

    tools/benchmarks/gpu.py                                all sections; writes gpu_benchmark.json and .svg
    tools/benchmarks/gpu.py --sections step,data           some of them
    tools/benchmarks/gpu.py --write docs/performance.md    also rewrites the table of that page
    tools/benchmarks/gpu.py --rehearse                     everything in tiny sizes on the CPU: tests this script

Sections. matmul: the matrix rate at the widths of the models. attention: every backend, forward and backward with
rotary positions, on a pack of both stages. head: loss and gradients at the widths of the models, against
Megatron-Core's unfused cross entropy. step: whole training steps of the paper's models in BF16, with selective
recomputation, with Transformer Engine's layers, in FP8, with CUDA graphs, and of a baseline like the released code
(``gpu_baseline.py``). data: the rate of the loader by itself. Rates count only useful arithmetic
(docs/performance.md).

Every job runs in its own process and every section has a time limit (nine minutes in total), so one failure hides no
other figure. Figures that were not measured are listed with the reason.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from gpu_report import (
    Figure,
    chart,
    derived,
    heading,
    is_chart,
    is_figures,
    split_page,
    table,
    write_json,
    write_page,
)
from gpu_sections import Bench, Job, all_jobs

from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.outputs import check_file, write

# Time limit of each section in seconds; nine minutes in total.
LIMITS = {"matmul": 25, "attention": 105, "head": 35, "step": 315, "data": 60}
_LEAST = 8  # a job with fewer seconds left is not started


def machine() -> dict[str, str]:
    """Device, date and versions."""
    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"}
    found |= {"date": date.today().isoformat(), "Python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if cudnn := torch.backends.cudnn.version():
        found["cuDNN"] = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    for name in ("megatron-core", "transformer_engine", "nvidia-dali-cuda130"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_job(job: Job, seconds: float, rehearse: bool) -> list[Figure]:
    """The figures of a job, measured in its own process with a limit of ``seconds``."""
    if seconds < _LEAST:
        return [Figure(job.section, name, missing="the section's time was over") for name in job.figures]
    with tempfile.TemporaryDirectory(prefix="genlip-benchmark-") as folder:
        output = Path(folder) / "figures.jsonl"
        output.touch()
        environment = dict(os.environ)
        if rehearse:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        words = [sys.executable, __file__, "--job", f"{job.section}:{job.name}", "--output", str(output)]
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(
                words + ["--rehearse"] * rehearse, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = process.wait(seconds)
                reason = f"its process ended with status {status}"
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status, reason = 0, f"not done within the section's time ({seconds:.0f} s left)"
            log.seek(0)
            lines = log.read().strip().splitlines()
        if status:
            reason += f": {lines[-1][:150]}" if lines else ""
            print("\n".join(lines[-30:]), file=sys.stderr)
        told = {figure["name"]: Figure(**figure) for figure in map(json.loads, output.read_text().splitlines())}
    return [told.get(name) or Figure(job.section, name, missing=reason) for name in job.figures]


def serve(name: str, output: Path, tiny: bool) -> None:
    """Run one job in this process and append one line per figure to ``output``."""
    (job,) = (job for job in all_jobs() if f"{job.section}:{job.name}" == name)
    with output.open("a") as file:

        def tell(figure: Figure) -> None:
            print(json.dumps(asdict(figure)), file=file, flush=True)

        Bench(job, tell, tiny, output.parent).run()


def measure(sections: list[str], rehearse: bool) -> list[Figure]:
    """All figures of the sections."""
    jobs = [job for job in all_jobs() if job.section in sections]
    if not torch.cuda.is_available() and not rehearse:
        return [Figure(job.section, name, missing="no CUDA device") for job in jobs for name in job.figures]
    figures: list[Figure] = []
    ends: dict[str, float] = {}
    for job in jobs:
        # A rehearsal measures nothing and may run on a busy machine.
        end = ends.setdefault(job.section, time.monotonic() + LIMITS[job.section] * (10 if rehearse else 1))
        begin = time.monotonic()
        figures += run_job(job, end - begin, rehearse)
        print(f"{job.section} {job.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return figures


@command
def main() -> int:
    """Measure, print, write."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("gpu_benchmark.json"), help="JSON file; .svg beside it")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page whose table between markers is rewritten")
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes on the CPU, to test this script")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        serve(options.job, options.output, options.rehearse)
        return 0
    sections = options.sections.split(",")
    if unknown := set(sections) - set(LIMITS):
        parser.error(f"--sections: unknown {', '.join(sorted(unknown))}. Allowed are {', '.join(LIMITS)}.")
    if options.write and options.rehearse:
        parser.error("--write: figures of a rehearsal mean nothing. Drop --rehearse or --write.")
    if options.write and set(sections) != set(LIMITS):
        parser.error("--write: the page holds all sections. Drop --sections.")
    drawing = options.output.with_suffix(".svg")
    check_file(options.output, is_figures)
    check_file(drawing, is_chart)
    if options.write:
        split_page(options.write)
        check_file(options.write.with_suffix(".svg"), is_chart, "--write")
    begin, here = time.monotonic(), machine()
    figures = derived(measure(sections, options.rehearse))
    print(heading(figures, here) if not options.rehearse else "A rehearsal: these figures mean nothing.")
    print(table(figures))
    write_json(options.output, figures, here, options.rehearse)
    write(drawing, chart(figures), is_chart)
    if options.write:
        write_page(options.write, figures, here)
    print(f"{options.output} written, {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
