#!/usr/bin/env python
"""Run the same few training steps on every parallel layout and report how much they differ from one process.

    python tools/parity_matrix.py                                  # all layouts, into docs/parity.md
    python tools/parity_matrix.py --layouts TP2xPP2 CP4 --output table.md

Every row is a run of real processes (gloo, float32 by default) through the whole training path: data, model, pipeline
schedule, optimizer. Layouts are written like TP2xPP2xVPP2xCP2xDP2. Exit status: 1 if a run differs too much, 2 for
wrong arguments.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from genlip_megatron import megatron_patches
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.outputs import begins_with, check_file, write

megatron_patches.install()

from genlip_megatron.testing.distributed import run_distributed  # noqa: E402
from genlip_megatron.testing.parity import (  # noqa: E402
    BFLOAT16,
    DATA,
    FLOAT32,
    STEPS,
    parity_config,
    parity_run,
    problems,
    worst_errors,
)
from genlip_megatron.testing.runs import layout, make_data  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

LAYOUTS = (
    *("DP2", "TP2", "PP2", "PP2xVPP2", "CP2"),
    *("DP4", "TP4", "PP4", "CP4", "TP2xPP2", "TP2xCP2", "PP2xCP2", "CP2xDP2", "PP2xVPP2xCP2"),
    *("TP2xPP2xCP2", "TP2xPP2xDP2", "TP2xPP2xVPP2xCP2"),
)
_OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
_SELECTIVE = {"parallel__recompute": "selective", "parallel__recompute_modules": "core_attn,mlp"}
_ALL_BUT_MLP = {
    "parallel__recompute": "selective",
    "parallel__recompute_modules": "core_attn,layernorm,mlp_act,output_gate",
}
_ALL_GATHER = {"parallel__cp_comm_type": "all_gather"}
# (description, layout, settings) of the options that are combined with a layout.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("no sequence parallelism", "TP2", {"parallel__sequence_parallel": False}),
    ("full recomputation", "TP2", {"parallel__recompute": "full"}),
    ("all but the MLP recomputed", "TP2", _ALL_BUT_MLP),
    ("attention and MLP recomputed", "PP2xVPP2", _SELECTIVE),
    ("keys and values gathered", "CP2", _ALL_GATHER),
    ("keys and values gathered", "CP4", _ALL_GATHER),
    ("overlapped reduction and gather", "TP2xDP2", _OVERLAP),
    ("overlapped reduction and gather", "PP2xVPP2xDP2", _OVERLAP),
    ("fully sharded (FSDP)", "DP2", {"parallel__fsdp": True}),
    ("fully sharded (FSDP)", "TP2xDP2", {"parallel__fsdp": True}),
    ("fully sharded (FSDP)", "CP2xDP2", {"parallel__fsdp": True}),
    ("no sequence parallelism", "TP2xCP2", {"parallel__sequence_parallel": False}),
    ("3 layers on the first stage", "PP2xDP2", {"parallel__num_layers_in_first_pipeline_stage": 3}),
    ("more ranks than heads, gathered", "TP4xCP2", _ALL_GATHER),
)
# (description, settings) of other models.
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("headwise gate", {"model__attention_output_gate": "headwise"}),
    ("no gate", {"model__attention_output_gate": "none"}),
    ("1d positions", {"model__positions": "1d"}),
    ("chunked positions", {"model__positions": "chunked"}),
)
BFLOAT16_LAYOUTS = ("DP2", "TP2", "PP2", "CP2", "PP2xVPP2", "TP2xCP2", "TP2xPP2xCP2")


_INTRODUCTION = """# Parity of the parallel layouts

Written by `python tools/parity_matrix.py` (`make parity`). A small model (4 layers, 4 heads, text width unlike hidden
width, vocabulary 511) trains {steps} steps of 4 packs on rendered scenes, through the whole training path with real
processes on gloo. Each layout is compared with one process. Worst of all its cases:

* loss: relative difference of any step's loss;
* gradient: of any parameter tensor at step 1, norm of the difference relative to the tensor's norm;
* weights: of any tensor after {steps} steps, norm of the difference relative to how far it moved.

Also checked: initial weights equal bit for bit after gathering; the same samples in the same order; the validation
loss after step 2, within the loss's tolerance; after the last step every parameter replicated over tensor, context or
data parallel ranks bit-equal among its replicas.

Allowed in float32: {float32}. In bfloat16: {bfloat16}; the weights themselves are rounded there. {versions}.
"""


class Matrix:
    """Runs cases and collects the rows of the report."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.failures: list[str] = []
        self._references: dict[tuple, dict[str, Any]] = {}

    def reference(self, case: dict[str, Any]) -> dict[str, Any]:
        """The result of a case on one process."""
        key = tuple(sorted(case.items()))
        if key not in self._references:
            self._references[key] = run_distributed(1, parity_run, parity_config(self.data, **case))[0]
        return self._references[key]

    def compare(self, name: str, case: dict[str, Any], flags: dict[str, Any]) -> dict[str, tuple[float, str]]:
        """The ``worst_errors`` of one layout in one case; errors above the limits go to ``failures``."""
        world_size, sizes = layout(name)
        begin = time.monotonic()
        results = run_distributed(world_size, parity_run, parity_config(self.data, **case, **sizes, **flags))
        tolerance = BFLOAT16 if case.get("train__precision") == "bf16" else FLOAT32
        found = problems(results, self.reference(case), tolerance)
        self.failures += [f"{name} {case} {flags}: {problem}" for problem in found]
        errors = worst_errors(results, self.reference(case))
        print(f"{name} {case} {flags}: {errors} {found or 'same'} ({time.monotonic() - begin:.1f} s)", file=sys.stderr)
        return errors

    def relay(self, names: list[str], folder: Path) -> tuple[list[str], float]:
        """(legs, worst relative error of the loss) of a run that changes its layout after every step, through a
        checkpoint."""
        legs = [*sorted(names, key=lambda name: layout(name)[0]), "1"]
        length: dict[str, Any] = {"train__train_iters": len(legs)}
        losses: list[float] = []
        for step, name in enumerate(legs, start=1):
            world_size, sizes = layout(name)
            places: dict[str, Any] = {"checkpoint__save": str(folder), "checkpoint__load": str(folder)}
            config = parity_config(self.data, **length, **sizes, **places)
            losses += run_distributed(world_size, parity_run, config, step)[0]["losses"]
        expected = run_distributed(1, parity_run, parity_config(self.data, **length), len(legs))[0]["losses"]
        error = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
        if not error <= 1e-6:
            self.failures.append(f"relay over {legs}: loss differs by {error:.1e}")
        return legs, error


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def worst(errors: list[dict[str, tuple[float, str]]]) -> list[str]:
    """The largest error of each kind, as table cells."""
    return [f"{max(error[kind][0] for error in errors):.1e}" for kind in ("loss", "gradient", "weight")]


def report(matrix: Matrix, layouts: list[str], full: bool, folder: Path) -> str:
    """Run everything and return the document."""
    cases = [{"stage": stage, "drop_path": drop_path} for stage in DATA for drop_path in (0.0, 0.2)]
    kinds = ["loss", "gradient", "weights"]
    jobs: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [("", name, cases, {}) for name in layouts]
    if full:
        jobs += [(words, name, [{}], flags) for words, name, flags in VARIANTS]
        jobs += [(words, "TP2xPP2xCP2", [model], {}) for words, model in MODELS]
        jobs += [("bf16", name, [{"train__precision": "bf16"}], {}) for name in BFLOAT16_LAYOUTS]
    rows: dict[str, list[list[str]]] = {"": [], "variant": [], "bf16": []}
    # Sorted by number of processes: one pool of processes serves all layouts of its size.
    for words, name, mine, flags in sorted(jobs, key=lambda job: layout(job[1])[0]):
        cells = worst([matrix.compare(name, case, flags) for case in mine])
        processes = str(layout(name)[0])
        if words in ("", "bf16"):
            rows[words].append([name, processes, *cells])
        else:
            rows["variant"].append([name, words, processes, *cells])
    lines = [
        _INTRODUCTION.format(
            steps=STEPS,
            float32=f"loss {FLOAT32.loss:.0e}, gradient {FLOAT32.gradient:.0e}, weights {FLOAT32.weight:.0e}",
            bfloat16=f"{BFLOAT16.loss:.0e}, {BFLOAT16.gradient:.0e}, {BFLOAT16.weight}",
            versions=f"torch {torch.__version__}, {platform.machine()} CPU",
        ),
        "## Layouts: stage 1 and stage 2 data, with and without DropPath",
        "",
        table(["layout", "processes", *kinds], rows[""]),
    ]
    if full:
        lines += ["", "## Settings", "", table(["layout", "with", "processes", *kinds], rows["variant"])]
        lines += ["", "## bfloat16", "", table(["layout", "processes", *kinds], rows["bf16"])]
        legs, error = matrix.relay(layouts, folder)
        lines += [
            "",
            "## Checkpoints between layouts",
            "",
            "One run in which every step is another layout's, continued from the checkpoint of the one before:",
            f"{', '.join(legs)}. Worst relative difference of a step's loss from one process: {error:.1e}.",
        ]
    return "\n".join(lines) + "\n"


@command
def main() -> int:
    """Run the tool; returns the exit status."""
    parser = StrictParser(
        prog="parity_matrix.py", description="Compare training on every parallel layout with training on one process."
    )
    parser.add_argument(
        "--layouts", nargs="+", default=None, help=f"only these layouts (default: {' '.join(LAYOUTS)} and more)"
    )
    parser.add_argument("--output", default=str(ROOT / "docs" / "parity.md"), help="Markdown file to write")
    options = parser.parse_args()
    is_own = begins_with(_INTRODUCTION.partition("{")[0].encode())

    for name in options.layouts or ():
        layout(name)  # raises for a wrong name
    check_file(options.output, is_own)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data)
        matrix = Matrix(data)
        text = report(matrix, list(options.layouts or LAYOUTS), options.layouts is None, Path(folder) / "relay")
    write(options.output, text, is_own)
    print(text)
    for failure in matrix.failures:
        print(f"DIFFERS: {failure}", file=sys.stderr)
    return 1 if matrix.failures else 0


if __name__ == "__main__":
    sys.exit(main())
