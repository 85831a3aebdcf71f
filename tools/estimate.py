#!/usr/bin/env python3
"""Memory, traffic and time of a run before it starts: for a layout, or for the best that fit.

    tools/estimate.py --config so16_stage1 --gpus 64 --gpu h100               the fastest layouts that fit
    tools/estimate.py --config g16_stage1 --gpus 8 --gpu h200 --tp 2 --mbs 1  one layout in detail
    tools/estimate.py --measure                                               estimated against measured peaks

Takes every flag of ``pretrain_genlip.py``. Step time is an estimate at the given MFU, not a measurement. The exit
status is 1 if no layout fits, or the given one does not.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import ctypes
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from genlip_megatron import estimate as es
from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import LINEAR_INPUTS, PATCH_SIZE, PATCH_VALUES, RunConfig, from_dict
from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import RunParser, build_parser, read_settings

# fmt: off
SMALL = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 352,
         "text_hidden_size": 128, "vocab_size": 512, "rope_sections": [5, 5, 6], "drop_path_rate": 0.1}
WIDE = {"num_layers": 3, "hidden_size": 384, "num_attention_heads": 6, "ffn_hidden_size": 1056,
        "text_hidden_size": 384, "vocab_size": 1024, "rope_sections": [10, 11, 11]}
VOCABULARY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128,
              "text_hidden_size": 256, "vocab_size": 8000, "rope_sections": [2, 3, 3]}
# fmt: on
# Name of what takes most of the memory -> (model, tokens of a pack, parallel settings).
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "activations": (SMALL, 1080, {}),
    "weights": (WIDE, 270, {}),
    "head": (VOCABULARY, 4320, {}),
    "recompute full": (SMALL, 1080, {"recompute": "full"}),
    "recompute mlp": (SMALL, 1080, {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "recompute inputs": (SMALL, 1080, {"recompute": "selective", "recompute_modules": list(LINEAR_INPUTS)}),
}


def small_run(name: str, precision: str, parallel: dict[str, Any] | None = None, packs: int = 1) -> RunConfig:
    """The configuration of one of CASES, with more ``parallel`` settings and ``packs`` packs in a step."""
    model, tokens, settings = CASES[name]
    train = {"precision": precision, "global_batch_size": packs, "lr_warmup_iters": 0, "train_iters": 100}
    tree = {"model": model, "data": {"seq_length": tokens}, "parallel": settings | (parallel or {}), "train": train}
    return from_dict(tree, name)


def synthetic_batch(config: RunConfig, with_patches: bool) -> PackedBatch:
    """A micro-batch of random samples of the default mix, with DropPath factors."""
    mix, model = es.default_mix(config), config.model
    side = config.data.image_size // PATCH_SIZE
    generator = torch.Generator().manual_seed(0)

    def sample() -> Sample:
        pixels = torch.randint(0, 256, (side**2, PATCH_VALUES), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(0, model.vocab_size, (mix.text_tokens,), generator=generator).tolist()
        loss = [i >= mix.text_tokens - mix.answer_tokens for i in range(mix.text_tokens)]
        return Sample(pixels if with_patches else None, side, side, tokens, loss)

    packs = config.train.micro_batch_size
    count = config.data.seq_length // mix.tokens
    batch = pack_samples([[sample() for _ in range(count)] for _ in range(packs)], config.data.seq_length)
    draws = torch.ones(model.num_layers, 2, len(batch.sample_starts))
    return replace(batch, drop_path=draws) if model.drop_path_rate else batch


def _count_every_thread() -> None:
    """Make torch's CPU allocator count in every thread: gloo frees tensors in its own threads."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def measured_peak(config: RunConfig, steps: int = 2) -> int:
    """Peak bytes of torch's allocator in ``steps`` training steps, the model included.

    On a CPU from the profiler's record of every allocation, on a GPU from the caching allocator.
    """
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from megatron.core import parallel_state

    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import build_run
    from genlip_megatron.train.step import train_step

    def train() -> None:
        run = build_run(config)
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)

        def batches() -> Iterator[PackedBatch]:
            while True:
                yield synthetic_batch(config, first)

        for _ in range(steps):
            train_step(run, batches())

    gc.collect()  # an earlier model freed later would be subtracted from this one's peak
    groups.initialize(config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        return torch.cuda.max_memory_allocated() - before
    _count_every_thread()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    events: list[Any] = list(cast(Any, profiler.profiler).kineto_results.experimental_event_tree())
    allocations = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            allocations.append((event.start_time_ns, event.extra_fields))
    fields = [allocation for _, allocation in sorted(allocations, key=lambda pair: pair[0])]
    return max(field.total_allocated for field in fields) - (fields[0].total_allocated - fields[0].alloc_size)


def measure() -> int:
    """Print estimated and measured peaks of every case in both precisions; returns 1 if one is off by more than 10%."""
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, worst = [["case", "precision", "measured MB", "estimated MB", "error"]], 0.0
    for name in CASES:
        for precision in ("fp32", "bf16"):
            config = small_run(name, precision)
            found, expected = measured_peak(config), es.memory(config, 1, device)
            total = expected.total - expected.overhead
            error = total / found - 1
            worst = max(worst, abs(error))
            rows.append([name, precision, f"{found / 1e6:.1f}", f"{total / 1e6:.1f}", f"{100 * error:+.1f}%"])
    print(f"peak of torch's {device} allocator over 2 training steps, one process, torch {torch.__version__}")
    print(aligned(rows, left=2))
    return int(worst > 0.1)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """``rows`` as aligned columns; the first ``left`` columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    lines = ["  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def describe_run(
    config: RunConfig, name: str, count: int, machine: es.Machine, mix: es.SampleMix, e: es.Estimate
) -> str:
    """The part that does not depend on the layout."""
    samples = e.samples_per_step * config.train.train_iters
    rows = [
        ["run", f"{name or 'defaults'} on {count} x {machine.name}, {machine.memory / es.GIB:.1f} GiB each"],
        ["parameters", f"{e.parameters / 1e6:.1f} M"],
        [
            "sample",
            f"{mix.image_tokens} image + {mix.text_tokens} text tokens, {mix.answer_tokens} with loss: "
            f"{e.flops_per_sample / 1e12:.3g} TFLOP",
        ],
        [
            "step",
            f"{config.train.global_batch_size} packs of {config.data.seq_length} tokens, {e.samples_per_step:.0f} "
            f"samples: {e.flops_per_step / 1e15:.3g} PFLOP",
        ],
        ["training", f"{config.train.train_iters} steps, {samples / 1e6:.4g} M samples"],
    ]
    return aligned(rows, left=2)


def describe_layout(e: es.Estimate, machine: es.Machine, timed: bool, mfu: float) -> str:
    """One layout in detail."""
    parts = [[f"  {part}", f"{size / es.GIB:.2f} GiB"] for part, size in e.memory.parts().items()]
    moved = [[f"  {kind.replace('_', ' ')}", f"{size / 1e9:.2f} GB"] for kind, size in asdict(e.traffic).items()]
    counts = [
        ["parameters", f"{e.rank_parameters / 1e6:.1f} M"],
        ["micro-batches", str(e.micro_batches)],
        ["pipeline bubble", f"{100 * e.bubble:.1f}%"],
        ["slowest stage", f"{100 * e.imbalance:.1f}% above the mean"],
        ["recomputed", f"{100 * e.recomputed:.1f}% of the arithmetic, {e.recompute_seconds:.3f} s of memory traffic"],
    ]
    total = [["  peak", f"{e.memory.total / es.GIB:.2f} GiB of {machine.memory / es.GIB:.1f}"]]
    rows = [*counts, ["memory of the fullest rank", f"(stage {e.memory.stage})"], *parts, *total]
    rows += [["sent by a rank in a step", ""], *moved]
    if timed:
        rows += [
            ["step", f"{e.step_seconds:.3f} s, of which {e.communication_seconds:.3f} s communication"],
            ["throughput", f"{e.samples_per_step / e.step_seconds:.0f} samples/s, MFU {100 * e.mfu:.1f}%"],
            ["run", f"{e.days:.2f} days"],
        ]
    note = "No step time: give --peak-tflops, the rate that MFU refers to."
    if timed:
        note = (
            f"Step time is an estimate, not a measurement: {100 * mfu:.0f}% MFU while a GPU computes, transfers at "
            "data-sheet rates."
        )
    return f"layout {es.layout_flags(e.config)}\n{aligned(rows, left=2)}\n{note}"


def table(found: Sequence[es.Estimate], timed: bool) -> str:
    """One line for each layout."""
    rows = [["layout", "GiB per rank", "bubble", "sent GB", "step s", "samples/s", "MFU", "days"]]
    for e in found:
        speed = f"{e.samples_per_step / e.step_seconds:.0f}"
        times = [f"{e.step_seconds:.3f}", speed, f"{100 * e.mfu:.1f}%", f"{e.days:.2f}"] if timed else ["-"] * 4
        sent = f"{sum(asdict(e.traffic).values()) / 1e9:.1f}"
        memory = f"{e.memory.total / es.GIB:.1f}"
        rows.append([es.layout_flags(e.config), memory, f"{100 * e.bubble:.1f}%", sent, *times])
    return aligned(rows, left=1)


def as_json(e: es.Estimate, timed: bool, fits: bool) -> dict[str, Any]:
    """An estimate as plain values; times are null without a peak rate."""
    plain = {**asdict(e), "layout": es.layout_flags(e.config), "fits": fits}
    plain["memory"]["total"] = e.memory.total
    del plain["config"]
    if not timed:
        plain |= dict.fromkeys(("step_seconds", "communication_seconds", "days", "mfu"))
    return plain


def build() -> RunParser:
    """The parser: the flags of training and those of the estimate."""
    parser = build_parser()
    parser.prog = "estimate.py"
    parser.usage = "%(prog)s --config NAME|FILE --gpus N --gpu KIND [--FLAG VALUE ...]"
    parser.description = (__doc__ or "").partition("\n")[0]
    group = parser.add_argument_group("estimate")
    group.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the run (default: 1)")
    group.add_argument("--gpu", choices=(*es.MACHINES, "cpu"), default="h100", help="kind of rank (default: h100)")
    group.add_argument(
        "--gpu-memory-gb", type=float, metavar="GIB", help="memory of a rank (default: that of the kind)"
    )
    group.add_argument(
        "--peak-tflops", type=float, metavar="RATE", help="dense peak rate of a rank (default: that of the kind)"
    )
    group.add_argument(
        "--mfu", type=float, default=0.45, help="fraction of the peak rate while a GPU computes (default: 0.45)"
    )
    group.add_argument("--top", type=int, default=5, metavar="K", help="number of layouts to list (default: 5)")
    for name, what in (("image", "patches"), ("text", "text tokens"), ("answer", "text tokens with loss")):
        group.add_argument(f"--{name}-tokens", type=int, metavar="N", help=f"mean {what} per sample")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--measure", action="store_true", help="measure small runs on this machine, compare, and exit")
    return parser


def sample_mix(config: RunConfig, options: dict[str, Any]) -> es.SampleMix:
    """The average sample, from the recipe and flags."""
    default = es.default_mix(config)
    text = default.text_tokens if options["text_tokens"] is None else options["text_tokens"]
    image = default.image_tokens if options["image_tokens"] is None else options["image_tokens"]
    answer = options["answer_tokens"]
    answer = min(default.answer_tokens, text) if answer is None else answer
    for flag, value, low, high in (
        ("--image-tokens", image, 0, config.data.seq_length - 1),
        ("--text-tokens", text, 1, config.data.seq_length - image),
        ("--answer-tokens", answer, 1, text),
    ):
        if not low <= value <= high:
            raise ValueError(f"{flag} = {value}: must be from {low} to {high}")
    return es.SampleMix(image, text, answer)


def chosen_machine(options: dict[str, Any]) -> tuple[es.Machine, bool]:
    """(the machine, whether its peak rate is known)."""
    for name in ("gpus", "top"):
        if options[name] < 1:
            raise ValueError(f"--{name} = {options[name]}: must be at least 1")
    if not 0 < options["mfu"] <= 1:
        raise ValueError(f"--mfu = {options['mfu']}: must be above 0 and at most 1")
    for name in ("gpu_memory_gb", "peak_tflops"):
        if options[name] is not None and not 0 < options[name] < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} = {options[name]}: must be above 0")
    if options["gpu"] == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / options["gpus"]
        machine = es.Machine("cpu", memory, 1.0, 10.0, 10.0, 10.0)
    else:
        machine = es.MACHINES[options["gpu"]]
    if options["gpu_memory_gb"] is not None:
        machine = replace(machine, memory=options["gpu_memory_gb"] * es.GIB)
    if options["peak_tflops"] is not None:
        machine = replace(machine, peak_tflops=options["peak_tflops"])
    return machine, options["gpu"] != "cpu" or options["peak_tflops"] is not None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Estimate and print; returns the exit status."""
    parser = build()
    options = vars(parser.parse_args(argv))
    if options["measure"]:
        return measure()
    settings = {name: value for name, value in options.items() if "." in name}
    name, count, mfu = options["config"], options["gpus"], options["mfu"]
    device = "cpu" if options["gpu"] == "cpu" else "cuda"
    given = bool(es.LAYOUT_FLAGS.keys() & settings)
    try:
        config = read_settings(name, settings)
        machine, timed = chosen_machine(options)
        mix = sample_mix(config, options)
        # A recipe's own layout may not suit this number of ranks; the search then finds others.
        check(config, count if given else None)
        if options["print_config"]:
            print(config.to_yaml(), end="")
            return 0
        own = es.estimate(config, count, machine, mfu, mix, device) if given else None
    except ValueError as error:
        parser.error(str(error))
    fits = own is not None and own.memory.total <= machine.memory
    if own is None:
        found = es.best_layouts(config, count, machine, mfu, mix, device)[: options["top"]]
    elif fits:
        found = [own]
    else:
        nearest = es.nearest_fit(config, count, machine.memory, device, mix)[: options["top"]]
        found = [es.estimate(layout, count, machine, mfu, mix, device) for layout in nearest]
    shown = own or (found[0] if found else None)
    if options["json"]:
        listed = [as_json(e, timed, True) for e in found]
        layout = as_json(own, timed, fits) if own is not None else None
        print(json.dumps({"layout": layout, "fitting": listed, "sample": asdict(mix)}, indent=2))
    elif shown is None:
        print(f"no layout on {count} x {machine.name} fits {machine.memory / es.GIB:.1f} GiB per rank")
    else:
        print(describe_run(config, name, count, machine, mix, shown), end="\n\n")
        if own is None:
            print(f"the fastest layouts that fit\n{table(found, timed)}", end="\n\n")
        print(describe_layout(shown, machine, timed, mfu))
        if own is not None and not fits:
            nearest_fits = f"The nearest that fit:\n{table(found, timed)}" if found else "No other layout fits either."
            print(f"\nThis layout does not fit. {nearest_fits}")
    return int(not (fits or (own is None and found)))


if __name__ == "__main__":
    sys.exit(main())
