#!/usr/bin/env python3
"""Check what needs a CUDA machine; prints a table and writes a JSON file. Meant for less than eight minutes.

    tools/gpu_check.py                          writes gpu_check.json; exits 1 if a check fails
    tools/gpu_check.py --fp8-loss               only this: 500 steps of so16 in BF16 and in FP8
    tools/gpu_check.py --rehearse               the same parts on the CPU with a small model: tests this script

Checks: golden parity in float32 and bfloat16; training on rendered scenes, in float32 within 1e-3 of the CPU at every
step and in bfloat16 within 2% at the end, also with selective recomputation, CUDA graphs, Transformer Engine's layers
and each kind of its FP8; throughput, MFU and peak memory of so16 stage 1; DALI's decode rate. --fp8-loss: so16 stage 1
on rendered scenes, the mean loss of the last 50 steps in FP8 (hybrid, delayed scaling) within 1% of BF16.

Each part runs in its own process, so that one failure does not hide the others. Without CUDA the script says so and
exits 0; a part that this machine cannot run is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from genlip_megatron.command import command

ROOT = Path(__file__).resolve().parent.parent

DEMO_STEPS = 24
# Largest allowed differences; kinds as in genlip_megatron/testing/golden.py. bfloat16 keeps 8 bits, 0.4% per rounding,
# and errors add up over layers: on a CPU 8e-2 (values up to 4) and 8e-2 of a gradient's norm were measured.
GOLDEN_LIMITS = {
    "fp32": {"hidden": 1e-4, "logits": 1e-4, "loss": 1e-5, "gradient": 1e-4, "features": 1e-4},
    "bf16": {"hidden": 2e-1, "logits": 2e-1, "loss": 1e-2, "gradient": 2e-1, "features": 1e-1},
}
DEMO_FP32_LIMIT, DEMO_BF16_LIMIT = 1e-3, 2e-2
# Settings of the parts that train the demo in bfloat16.
_TE = {"train__precision": "bf16", "train__transformer_impl": "transformer_engine"}
_FP8 = {**_TE, "train__fp8": "hybrid"}
VARIANTS: dict[str, dict[str, Any]] = {
    "demo-bf16": {"train__precision": "bf16"},
    "demo-selective": {
        "train__precision": "bf16",
        "parallel__recompute": "selective",
        "parallel__recompute_modules": ["core_attn", "layernorm", "mlp_act", "output_gate"],
    },
    "demo-graph": {"train__precision": "bf16", "train__cuda_graph": True},
    "demo-te": _TE,
    "demo-fp8": _FP8,
    "demo-fp8-current": {**_FP8, "train__fp8_recipe": "current"},
    "demo-fp8-weights": {**_FP8, "train__fp8_primary_weights": True},
}
# FP8 attention needs images of one size, which give another loss curve.
FIXED_IMAGES: dict[str, dict[str, Any]] = {
    "demo-fixed": {"train__precision": "bf16", "data__image_mode": "fixed"},
    "demo-fp8-attention": {**_FP8, "train__fp8_attention": True, "data__image_mode": "fixed"},
}
# --fp8-loss: steps, last steps that are averaged, and largest relative difference of their means.
LOSS_STEPS, LOSS_LAST, LOSS_LIMIT = 500, 50, 1e-2
LOSS_PARTS: dict[str, dict[str, Any]] = {"loss-bf16": {"train__precision": "bf16"}, "loss-fp8": _FP8}


def golden(precision: str) -> dict[str, Any]:
    """Worst differences from the authors' model class, over all golden files."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.parallel import groups
    from genlip_megatron.testing.golden import GOLDEN_DIR, compare

    worst: dict[str, float] = {}
    for file in sorted(GOLDEN_DIR.glob("*.safetensors")):
        for kind, error in compare(str(file), {"train__precision": precision}).items():
            worst[kind] = max(worst.get(kind, 0.0), error)
    groups.finalize()
    return worst


def render(folder: Path, samples: int) -> None:
    """Rendered scenes with tokenizer and index."""
    python = sys.executable
    tokenizer = str(folder / "tokenizer.model")
    for words in (
        ["tools/render_demo_data.py", "--output", str(folder), "--train-samples", str(samples), "--val-samples", "32"],
        ["tools/train_tokenizer.py", str(folder / "train-*.tar"), "--output", tokenizer],
        ["tools/prepare_data.py", str(folder), "--tokenizer", tokenizer],
    ):
        subprocess.run([python, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def configuration(recipe: str, data: Path, settings: dict[str, Any]) -> Any:
    """The RunConfig of ``recipe`` on the rendered data; ``settings`` are {section__name: value}."""
    from genlip_megatron.config import from_dict, load_yaml, override

    flags = {
        "data.train_data": [f"{data}/train-*.tar"],
        "data.valid_data": [],
        "data.tokenizer": f"{data}/tokenizer.model",
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return override(from_dict(load_yaml(recipe), recipe), flags)


def train(config: Any, steps: int) -> dict[str, Any]:
    """Losses of ``steps`` steps and rates of the second half, or {"skipped": why this machine cannot run them}."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    import torch

    from genlip_megatron.model.flops import COUNTS, HOPPER_TFLOPS, training_flops
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import set_up
    from genlip_megatron.train.step import train_step

    if reason := why_skipped(config):
        return {"skipped": reason}
    run = set_up(config)
    assert run.train_loader is not None
    batches = iter(run.train_loader)
    cuda = torch.cuda.is_available()
    losses = []
    begin = time.perf_counter()
    for step in range(steps):
        if step == steps // 2:
            run.counts.zero_()
            torch.cuda.synchronize()
            begin = time.perf_counter()
        losses.append(train_step(run, batches).loss)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    counts = dict(zip(COUNTS, run.counts.tolist(), strict=True))
    tflops = training_flops(run.counts, config.model) / seconds / 1e12
    run.train_loader.close()
    groups.finalize()
    return {
        "losses": losses,
        "step_ms": 1000 * seconds / (steps - steps // 2),
        "samples_per_second": counts["samples"] / seconds,
        "tokens_per_second": counts["tokens"] / seconds,
        "pack_fill": counts["tokens"] / counts["slots"],
        "tflops": tflops,
        "mfu": tflops / HOPPER_TFLOPS,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def decode_rates(images: int) -> dict[str, float]:
    """Images per second of 500x375 JPEGs to 224x224 patches, with DALI and with Pillow."""
    import numpy as np
    import torch
    from PIL import Image

    from genlip_megatron.data.decode import ImageTask, make_decoder

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    tasks = [ImageTask(out.getvalue(), 224, 224, plain_jpeg=True)] * 256
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rates = {}
    for name in ("dali", "pillow"):
        decoder = make_decoder(name, os.cpu_count() or 1, device)
        decoder(tasks)
        begin = time.perf_counter()
        for _ in range(max(1, images // len(tasks))):
            decoder(tasks)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates[name] = max(1, images // len(tasks)) * len(tasks) / (time.perf_counter() - begin)
        decoder.close()
    return rates


def so16_settings(rehearse: bool) -> dict[str, Any]:
    """Overrides of so16_stage1 for one device; few packs per step to save time."""
    if not rehearse:
        return {"train__global_batch_size": 4}
    return {
        "train__global_batch_size": 1, "train__micro_batch_size": 1, "data__seq_length": 1024,
        "model__num_layers": 2, "model__hidden_size": 128, "model__ffn_hidden_size": 352,
        "model__num_attention_heads": 4, "model__text_hidden_size": 128, "model__vocab_size": 1024,
        "model__rope_sections": [6, 5, 5],
    }  # fmt: skip


def why_skipped(config: Any) -> str:
    """Why this machine cannot run ``config``; "" if it can."""
    import torch

    from genlip_megatron.model.te_support import choose_fp8, why_no_engine

    if config.train.transformer_impl == "transformer_engine" and (reason := why_no_engine()):
        return reason
    try:
        choose_fp8(config)
    except ValueError as error:
        return str(error)
    return "no CUDA device" if config.train.cuda_graph and not torch.cuda.is_available() else ""


def run_part(name: str, data: Path, rehearse: bool) -> dict[str, Any]:
    """Run one part in this process."""
    if name.startswith("golden-"):
        return golden(name.removeprefix("golden-"))
    if name.startswith("demo-"):
        settings = {**VARIANTS, **FIXED_IMAGES}.get(name, {"train__precision": "fp32"})
        # The same decoder everywhere, so that only devices and precisions differ.
        config = configuration("demo", data, {"data__decoder": "pillow", **settings})
        return train(config, 4 if rehearse else DEMO_STEPS)
    if name in LOSS_PARTS:
        steps = 4 if rehearse else LOSS_STEPS
        # One micro-batch per step, so that the scenes do not repeat often; the recipe's warmup is longer than this run.
        schedule = {"train__train_iters": steps, "train__lr_warmup_iters": steps // 10}
        batch = {} if rehearse else {"train__global_batch_size": 2}
        settings = {**so16_settings(rehearse), **schedule, **batch, **LOSS_PARTS[name]}
        return train(configuration("so16_stage1", data, settings), steps)
    if name == "so16":
        return train(configuration("so16_stage1", data, so16_settings(rehearse)), 4 if rehearse else 24)
    return decode_rates(256 if rehearse else 8192)


PARTS = ("golden-fp32", "golden-bf16", "demo-cpu", "demo-fp32", *VARIANTS, *FIXED_IMAGES, "so16", "decode")


def judge(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """(name, measured value, whether it passes) of every check."""
    rows: list[tuple[str, str, bool]] = []
    for name, result in results.items():
        if "error" in result:
            rows.append((name, result["error"], False))
        if "skipped" in result:
            rows.append((name, f"skipped: {result['skipped']}", True))
    for precision, limits in GOLDEN_LIMITS.items():
        result = results.get(f"golden-{precision}", {})
        for kind, limit in limits.items():
            if kind in result:
                rows.append(
                    (f"golden {precision} {kind}", f"{result[kind]:.1e}, allowed {limit:.0e}", result[kind] <= limit)
                )
    at_end = [(name, "demo-cpu", "the CPU", DEMO_BF16_LIMIT, 1) for name in VARIANTS]
    for name, other, against, limit, last in (
        ("demo-fp32", "demo-cpu", "the CPU", DEMO_FP32_LIMIT, 0),
        *at_end,
        ("demo-fp8-attention", "demo-fixed", "BF16", DEMO_BF16_LIMIT, 1),
        ("loss-fp8", "loss-bf16", "BF16", LOSS_LIMIT, LOSS_LAST),
    ):
        losses, expected = (results.get(part, {}).get("losses", []) for part in (name, other))
        if not (losses and expected):
            continue
        if last:
            worst = abs(sum(losses[-last:]) / sum(expected[-last:]) - 1)
            where = "at the end" if last == 1 else f"in the mean of the last {last} steps"
        else:
            worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            where = "at the worst step"
        rows.append((f"{name} loss against {against}", f"{worst:.1e} {where}, allowed {limit:.0e}", worst <= limit))
    so16 = results.get("so16", {})
    if "mfu" in so16:
        text = (f"{so16['samples_per_second']:.0f} samples/s, {so16['tokens_per_second']:.0f} tokens/s, "
                f"{so16['tflops']:.1f} TFLOP/s, MFU {100 * so16['mfu']:.1f}%, {so16['peak_memory_gib']:.1f} GiB, "
                f"fill {100 * so16['pack_fill']:.1f}%")  # fmt: skip
        rows.append(("so16 stage 1", text, True))
    rates = results.get("decode", {})
    if "dali" in rates:
        rows.append(("decode", f"DALI {rates['dali']:.0f} images/s, Pillow {rates['pillow']:.0f}", True))
    return rows


@command
def main() -> int:
    """Run every part in its own process, print the table, write the JSON; returns 1 if a check fails."""
    from genlip_megatron.config.command_line import StrictParser

    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_check.json", help="JSON file to write (default: gpu_check.json)")
    parser.add_argument("--rehearse", action="store_true", help="run small parts on the CPU, to test this script")
    parser.add_argument("--fp8-loss", action="store_true", help="only compare 500 steps of so16 in FP8 with BF16")
    parser.add_argument("--part", choices=(*PARTS, *LOSS_PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        result = run_part(options.part, options.data, options.rehearse)
        Path(options.output).write_text(json.dumps(result))
        return 0
    import torch

    from genlip_megatron.outputs import check_file, json_object, write

    is_own = json_object("passed", "results")
    check_file(options.output, is_own)
    if not torch.cuda.is_available() and not options.rehearse:
        print("gpu_check: no CUDA device here, nothing to check (--rehearse runs the parts on the CPU)")
        return 0
    begin = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        render(data, 400 if options.rehearse else 16000 if options.fp8_loss else 2000)
        for part in LOSS_PARTS if options.fp8_loss else PARTS:
            started = time.monotonic()
            file = Path(folder) / f"{part}.json"
            words = [sys.executable, __file__, "--part", part, "--data", str(data), "--output", str(file)]
            environment = dict(os.environ)
            if part == "demo-cpu" or options.rehearse:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            done = subprocess.run(
                words + ["--rehearse"] * options.rehearse, cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines = done.stdout.strip().splitlines() or ["no output"]
            results[part] = json.loads(file.read_text()) if done.returncode == 0 else {"error": lines[-1]}
            if done.returncode:
                print(done.stdout, file=sys.stderr)
            results[part]["seconds"] = time.monotonic() - started
            print(f"{part}: {results[part]['seconds']:.0f} s", file=sys.stderr, flush=True)
    rows = judge(results)
    width = max(len(row[0]) for row in rows)
    for what, measured, holds in rows:
        print(f"{'ok  ' if holds else 'FAIL'} {what:<{width}}  {measured}")
    good = all(holds for *_, holds in rows)
    write(options.output, json.dumps({"passed": good, "results": results}, indent=1) + "\n", is_own)
    print(f"{options.output} written, {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
