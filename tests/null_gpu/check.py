#!/usr/bin/env python3
"""Train the demo's model for a few steps on the null GPU, in every mode that needs CUDA.

    python -m tests.null_gpu.check              prints a table; exits 1 if a part fails

With the CPU computing the kernels: float32, bfloat16, Transformer Engine and each kind of its FP8; also recomputation,
offloading, FSDP and every kind of parallelism on two or four ranks. Each step's loss is compared with the same run on
the CPU. Also FP8 runs that are saved and resumed, inference, and the golden files with the head's Triton kernels. With
kernels that do nothing: CUDA graphs and compiled branches, which must run to the end. Each part runs in its own
processes. ``make null-gpu`` creates the environment and runs this script.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.null_gpu import engine_kernels, run
from tools import gpu_check

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

STEPS = 8
# Small steps of one pack. DALI is off, because it needs the real driver.
SMALL: dict[str, Any] = {
    "data__decoder": "pillow", "data__pack_buffer": 32,
    "train__global_batch_size": 2, "train__micro_batch_size": 1, "train__lr_warmup_iters": 2,
}  # fmt: skip
# Measured against the CPU: float32 4e-7, all others at most 6.3e-3; FP8 attention 9.3e-3 against itself in BF16.
FLOAT32_LIMIT, LIMIT, FP8_ATTENTION_LIMIT = 1e-4, 1e-2, 2e-2
INFERENCE_LIMITS = {"features": 1e-4, "caption": 0.0}


@dataclass(frozen=True)
class Part:
    """A run: its ``settings`` as section__name, flags of run.py, and its expected losses, calls, output, compiles.

    ``says`` is a regular expression. ``crowded``: some micro-batches run without a CUDA graph and do not fit beside the
    existing graphs. ``ranks`` processes communicate through nccl.c. ``moves``: offloading moves small tensors too.
    ``resumes``: the run is saved half-way and resumed.
    """

    settings: dict[str, Any]
    flags: tuple[str, ...] = ("--compute",)
    against: str = "cpu"
    limit: float = LIMIT
    calls: frozenset[str] = frozenset()
    says: str = ""
    compiles: bool = False
    crowded: bool = False
    ranks: int = 1
    moves: bool = False
    resumes: bool = False


_FP32, _BF16 = {"train__precision": "fp32"}, {"train__precision": "bf16"}
_TE = {**_BF16, "train__transformer_impl": "transformer_engine"}
_FP8 = {**_TE, "train__fp8": "hybrid"}
_CURRENT = {**_FP8, "train__fp8_recipe": "current"}
_WEIGHTS = {"train__fp8_primary_weights": True}
_FIXED = {"data__image_mode": "fixed"}
_FSDP = {**_BF16, "parallel__fsdp": True}
_GRAPH = {**_BF16, "train__cuda_graph": True}
_OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
_TP2 = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
_CP2, _PP2 = {"parallel__context_parallel_size": 2}, {"parallel__pipeline_model_parallel_size": 2}
_SELECTIVE = {
    "parallel__recompute": "selective",
    "parallel__recompute_modules": ["core_attn", "layernorm", "mlp_act", "output_gate"],
}
_ALL_MODULES = ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"]
# Functions of Transformer Engine that a part must call.
_FUSED_ATTENTION = frozenset({"fused_attn_fwd", "fused_attn_bwd"})
_UNFUSED_NORMS = _FUSED_ATTENTION | {"generic_gemm"}
_ENGINE = _UNFUSED_NORMS | {"layernorm_fwd", "layernorm_bwd"}
_DELAYED = _ENGINE | {"quantize", "fused_amax_and_scale_update_after_reduction"}
_NOW = _ENGINE | {"quantize"}
_NOW_WEIGHTS = _NOW | {"multi_tensor_compute_scale_and_scale_inv"}
_RECOMPUTED_NOW = _FUSED_ATTENTION | {"quantize"}

_exact = functools.partial(Part, limit=0.0)
_float32 = functools.partial(Part, limit=FLOAT32_LIMIT)
_golden = functools.partial(Part, {}, flags=("--compute", "--interpret"), against="")
_without_numbers = functools.partial(Part, flags=(), against="")
PARTS: dict[str, Part] = {
    "fp32": _float32(_FP32),
    "bf16": Part(_BF16),
    "te": Part(_TE, calls=_ENGINE),
    "fp8-delayed": Part(_FP8, calls=_DELAYED),
    "fp8-current": Part(_CURRENT, calls=_NOW),
    "fp8-delayed-weights": Part({**_FP8, **_WEIGHTS}, calls=_DELAYED),
    "fp8-current-weights": Part({**_CURRENT, **_WEIGHTS}, calls=_NOW_WEIGHTS),
    "fp8-current-ends-bf16": Part({**_CURRENT, "train__first_last_layers_bf16": True}, calls=_NOW),
    "bf16-fixed": Part({**_BF16, **_FIXED}, against="cpu-fixed"),
    "fp8-attention": Part(
        {**_FP8, **_FIXED, "train__fp8_attention": True},
        against="bf16-fixed",
        limit=FP8_ATTENTION_LIMIT,
        calls=_DELAYED,
    ),
    "fp8-resume": _exact({**_FP8, **_WEIGHTS}, against="fp8-delayed-weights", calls=_DELAYED, resumes=True),
    "recompute-full": Part({**_BF16, "parallel__recompute": "full"}),
    "recompute": _exact({**_BF16, **_SELECTIVE}, against="bf16"),
    "recompute-te": Part({**_TE, **_SELECTIVE}, calls=_UNFUSED_NORMS),
    "recompute-fp8-current": Part({**_CURRENT, **_SELECTIVE}, calls=_RECOMPUTED_NOW),
    "offload": Part({**_BF16, "parallel__offload_modules": ["core_attn"]}, against="bf16", limit=1e-6, moves=True),
    "offload-te": Part({**_TE, "parallel__offload_modules": _ALL_MODULES}, calls=_UNFUSED_NORMS, moves=True),
    "fsdp": Part(_FSDP),
    "dp2-fp32": _float32({**_FP32, **_OVERLAP}, ranks=2),
    "tp2-fp32": _float32({**_FP32, **_TP2}, ranks=2),
    "cp2-fp32": _float32({**_FP32, **_CP2}, ranks=2),
    "pp2-fp32": _float32({**_FP32, **_PP2}, ranks=2),
    "fsdp2": Part(_FSDP, ranks=2),
    "tp2-te": Part({**_TE, **_TP2}, calls=_ENGINE, ranks=2),
    "tp2-recompute-te": Part({**_TE, **_TP2, **_SELECTIVE}, calls=_UNFUSED_NORMS, ranks=2),
    "tp2-recompute-fp8-current": Part({**_CURRENT, **_TP2, **_SELECTIVE}, calls=_RECOMPUTED_NOW, ranks=2),
    "cp2-te": Part({**_TE, **_CP2}, calls=_ENGINE, ranks=2),
    "tp2-fp8-delayed": Part({**_FP8, **_TP2}, calls=_DELAYED, ranks=2),
    "tp2-fp8-resume": _exact({**_FP8, **_TP2}, against="tp2-fp8-delayed", calls=_DELAYED, ranks=2, resumes=True),
    "pp2-fp8-current": Part({**_CURRENT, **_PP2}, calls=_NOW, ranks=2),
    "dp2-fp8-weights": Part({**_FP8, **_OVERLAP, **_WEIGHTS}, calls=_DELAYED, ranks=2),
    "dp2-fp8-resume": _exact(
        {**_FP8, **_OVERLAP, **_WEIGHTS}, against="dp2-fp8-weights", calls=_DELAYED, ranks=2, resumes=True
    ),
    "tp2-pp2-fp8-weights": Part({**_CURRENT, **_TP2, **_PP2, **_WEIGHTS}, calls=_NOW_WEIGHTS, ranks=4),
    "golden-fp32": _golden(),
    "golden-bf16": _golden(),
    "infer": Part({}, against=""),
    "graph": _without_numbers(_GRAPH, says="CUDA graph 1"),
    "graph-again": _without_numbers(_GRAPH, says="CUDA graphs released .*CUDA graph 1", crowded=True),
    "dp2-graph": _without_numbers(_GRAPH, says="CUDA graph 1", ranks=2),
    "te-graph": _without_numbers({**_TE, **_GRAPH}, says="CUDA graph 1"),
    "fusion-none": _without_numbers({**_BF16, "train__fusion": "none"}),
    "fusion-compile": _without_numbers({**_BF16, "train__fusion": "compile"}, against="fusion-none", compiles=True),
    "fusion-norms": _without_numbers({**_BF16, "train__fusion": "norms"}, against="fusion-none", compiles=True),
}
# On the CPU, without Transformer Engine.
REFERENCES: dict[str, dict[str, Any]] = {
    "cpu": _FP32,
    "cpu-fixed": {**_FP32, **_FIXED},
}


def run_part(name: str, data: Path, steps: int) -> dict[str, Any]:
    """Run one part in this process."""
    if name.startswith("golden-"):
        return {"differences": gpu_check.golden(name.removeprefix("golden-"))}
    if name == "infer":
        return {"differences": infer()}
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    part = PARTS[name] if name in PARTS else Part(REFERENCES[name])
    if part.crowded:
        crowd()
    if part.moves:
        move_small_tensors()
    if part.resumes:
        saved = {"checkpoint__save": str(data.parent / name)}
        losses = half(gpu_check.configuration("demo", data, {**SMALL, **part.settings, **saved}), steps)
        return {"losses": losses, "calls": dict(engine_kernels.CALLS)}
    result = gpu_check.train(gpu_check.configuration("demo", data, {**SMALL, **part.settings}), steps)
    if name in REFERENCES:
        return result
    import torch._dynamo.utils

    compiled = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return {**result, "calls": dict(engine_kernels.CALLS), "compiled": compiled}


def infer() -> dict[str, float]:
    """Largest difference of image features from the CPU's, and the fraction of greedy caption tokens that differ."""
    import torch

    from tests.hf.models import hf_model, random_weights, tiny

    model, grid = tiny(), torch.tensor([[3, 4], [2, 6]])
    weights, patches = random_weights(model), torch.randn(24, 768, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    encoder, captioner = (hf_model(kind, model, weights) for kind in ("GenLIPVisionModel", "GenLIPForCausalLM"))
    results = []
    for device in ("cpu", "cuda"):
        with torch.inference_mode():
            found = encoder.to(device)(patches.to(device), grid.to(device)).last_hidden_state
            ids = torch.tensor([[5, 6]], device=device)
            caption = captioner.to(device).generate(
                ids, pixel_values=image.to(device), max_new_tokens=12, do_sample=False
            )
        results.append((found.cpu(), caption.cpu()))
    (found, caption), (expected, expected_caption) = results
    if caption.shape != expected_caption.shape:
        return {"features": math.inf, "caption": 1.0}
    return {
        "features": (found - expected).abs().max().item(),
        "caption": (caption != expected_caption).float().mean().item(),
    }


def half(config: Any, steps: int) -> list[float]:
    """Train the first half of ``steps`` and save, or the second half if a save exists; returns the losses."""
    from genlip_megatron.parallel import groups
    from genlip_megatron.train import resume, setup
    from genlip_megatron.train.step import train_step

    run = setup.set_up(config)
    assert run.train_loader is not None and run.saver is not None
    batches, first = iter(run.train_loader), run.iteration == 0
    losses: list[float] = [train_step(run, batches).loss for _ in range(steps // 2 if first else steps - steps // 2)]
    if first:
        assert resume.save(run) and resume.finish_saves(run)
    run.train_loader.close()
    run.saver.close()
    groups.finalize()
    return losses


def crowd() -> None:
    """Let every fifth micro-batch run without a CUDA graph, in memory without room beside a graph."""
    from genlip_megatron.train import graphs

    graph_of, turns = graphs.GraphedStage._graph, itertools.cycle((True, True, True, True, False))
    replaced: Any = graphs
    replaced.memory_beside = lambda taken: 0
    replaced.GraphedStage._graph = lambda *args: graph_of(*args) if next(turns) else None


def move_small_tensors() -> None:
    """Let offloading move all tensors; by default it keeps those with less than a million elements."""
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading

    handler: Any = offloading.ChunkOffloadHandler
    make = handler.__init__
    handler.__init__ = lambda self, least, pool: make(self, 0, pool)


def judge(name: str, results: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    """(whether a part passes, the measured values)."""
    part, result = PARTS[name], results[name]
    for problem in ("error", "skipped"):
        if problem in result:
            return False, f"{problem}: {result[problem]}"
    if "differences" in result:
        limits = INFERENCE_LIMITS if name == "infer" else gpu_check.GOLDEN_LIMITS[name.removeprefix("golden-")]
        good = all(result["differences"].get(kind, math.inf) <= limit for kind, limit in limits.items())
        return good, ", ".join(f"{kind} {result['differences'].get(kind, math.inf):.1e}" for kind in limits)
    calls = result["calls"]
    if missing := sorted(part.calls - set(calls)):
        return False, f"Transformer Engine's {', '.join(missing)} was not called"
    called = ", ".join(f"{function} {count}" for function, count in sorted(calls.items())) or "none"
    if not part.flags:
        if not re.search(part.says, result["output"], re.DOTALL):
            return False, f"the output lacks {part.says!r}"
        compiled, without = result["compiled"], results.get(part.against, {}).get("compiled", 0)
        good = compiled > without or not part.compiles
        return good, f"{len(result['losses'])} steps, {compiled} compiled graphs"
    expected = results[part.against].get("losses", [])
    if len(expected) != len(result["losses"]):
        return False, f"nothing to compare with: {part.against} failed"
    worst = max(abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(result["losses"], expected, strict=True))
    return worst <= part.limit, f"loss within {worst:.1e} of {part.against}, allowed {part.limit:.0e}; called: {called}"


def start(name: str, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The result of a part; a part that resumes takes two runs."""
    result = launch(name, data, folder, steps)
    if name in PARTS and PARTS[name].resumes and "losses" in result:
        second = launch(name, data, folder, steps)
        return {**second, "losses": result["losses"] + second.get("losses", [])}
    return result


def launch(name: str, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The result of a part's processes, with their text as ``output``."""
    file = folder / f"{name}.json"
    arguments = [str(HERE / "check.py"), "--part", name, "--data", str(data), "--output", str(file)]
    arguments += ["--steps", str(steps)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    if name in REFERENCES:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        part = PARTS[name]
        arguments = ["-m", "tests.null_gpu.run", f"--devices={part.ranks}", *part.flags, *arguments]
        if part.ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={part.ranks}"]
            arguments = [*torchrun, *arguments]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = done.stdout.strip().splitlines() or ["no output"]
        # torchrun's own error comes last and does not help.
        own = [line for line in lines if "null GPU: " in line or ("Error: " in line and "ChildFailed" not in line)]
        return {"error": (own or lines)[-1]}
    return {**json.loads(file.read_text()), "output": done.stdout}


def main() -> int:
    """Run the parts one by one and print the table; returns 1 if one fails."""
    assert __doc__ is not None
    from genlip_megatron.config.command_line import StrictParser

    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(PARTS),
        metavar="PART",
        help="run these and the parts they are compared with: %(choices)s",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training run (default: {STEPS})")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        result = run_part(options.part, options.data, options.steps)
        if os.environ.get("RANK", "0") == "0":
            options.output.write_text(json.dumps(result))
        return 0
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: must be above 1")
    if reason := run.why_not():
        raise SystemExit(f"null_gpu: {reason}")
    run.build()
    results: dict[str, dict[str, Any]] = {}
    rows: list[tuple[bool, str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary), Path(temporary) / "data"
        gpu_check.render(data, 400)

        def measure(name: str) -> None:
            if name in PARTS and PARTS[name].against:
                measure(PARTS[name].against)
            if name not in results:
                begin = time.monotonic()
                results[name] = start(name, data, folder, options.steps)
                print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)

        for part in options.only or PARTS:
            measure(part)
            good, measured = judge(part, results)
            rows.append((good, part, measured))
    width = max(len(part) for _, part, _ in rows)
    for good, part, measured in rows:
        print(f"{'ok  ' if good else 'FAIL'} {part:<{width}}  {measured}")
    return 0 if all(good for good, *_ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
