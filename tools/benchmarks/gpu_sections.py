"""The jobs of ``gpu.py``: each runs in its own process and reports its figures one by one."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.device import current_device

megatron_patches.install()

import gpu_baseline  # noqa: E402
from common import make_samples, native_grids, tokens_of  # noqa: E402
from data_images import BenchData  # noqa: E402
from gpu_report import Details, Figure  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402

from genlip_megatron.batch import PackedBatch, Sample, pack_samples  # noqa: E402
from genlip_megatron.config import LINEAR_INPUTS, ONE_RANK, ModelConfig, RunConfig, from_dict, load_yaml, override  # noqa: E402  # noqa: E402
from genlip_megatron.data.loader import Loader, drop_path_factors  # noqa: E402
from genlip_megatron.data.plan import Plan, Source  # noqa: E402
from genlip_megatron.model import genlip  # noqa: E402
from genlip_megatron.model.attention import BACKENDS, prepare_attention  # noqa: E402
from genlip_megatron.model.attention.backend import Place  # noqa: E402
from genlip_megatron.model.flops import COUNTS, HOPPER_TFLOPS, count_batch, training_flops  # noqa: E402
from genlip_megatron.model.fusion import compiled  # noqa: E402
from genlip_megatron.model.head import Head  # noqa: E402
from genlip_megatron.model.rope import apply_rotary, rotary_cos_sin  # noqa: E402
from genlip_megatron.model.specs import check_machine, compute_dtype, transformer_config  # noqa: E402
from genlip_megatron.parallel import groups  # noqa: E402
from genlip_megatron.train.breakdown import PARTS, Breakdown  # noqa: E402
from genlip_megatron.train.setup import build_run  # noqa: E402
from genlip_megatron.train.step import train_step  # noqa: E402

MODELS, STAGES, HEAD_DIMS = ("l16", "so16", "g16"), (1, 2), (64, 72, 96)
MATRIX_SIZES, HEAD_ROWS = (1024, 1152, 1536), (4100, 16500)
HEAD_WIDTHS = {"so16": 1152, "l16": 1024, "g16": 1536}  # model.text_hidden_size
_PADDED = "flex padded to 128"
# Packs per step, all in one micro-batch if they fit.
_PACKS = 4
_TINY: dict[str, Any] = {
    "model.num_layers": 2, "model.hidden_size": 64, "model.ffn_hidden_size": 96, "model.num_attention_heads": 4,
    "model.text_hidden_size": 64, "model.vocab_size": 8192, "model.rope_sections": [3, 2, 2], "data.seq_length": 1200,
    "train.lr_warmup_iters": 0,
}  # fmt: skip

_ENGINE = {"train.transformer_impl": "transformer_engine"}
# Settings of each kind of step; the baseline has none.
STEP_KINDS: dict[str, dict[str, Any]] = {
    "BF16": {},
    "baseline": {},
    "selective": {"parallel.recompute": "selective", "parallel.recompute_modules": ["core_attn", *LINEAR_INPUTS]},
    "TE": _ENGINE,
    "FP8": {**_ENGINE, "train.fp8": "hybrid", "train.fp8_recipe": "delayed"},
    "FP8 current": {**_ENGINE, "train.fp8": "hybrid", "train.fp8_recipe": "current"},
    "graph": {
        "train.cuda_graph": True, "parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The figures that one process measures."""

    section: str
    name: str
    figures: tuple[str, ...]


def all_jobs() -> list[Job]:
    """Every job of every section, the most important of a section first."""
    lengths = [f"stage {stage} head dim {head_dim}" for head_dim in HEAD_DIMS for stage in STAGES]
    first = ("varlen", "te", "grouped")
    others = [name for name in BACKENDS if name not in (*first, "flex")]
    # Kernels that compile for every length come last: the section may run out of time.
    kernels = (*first, *others, _PADDED, "flex")
    steps = [f"{model} stage {stage}" for stage in STAGES for model in ("so16", "l16", "g16")]
    head = tuple(
        f"{who} {rows} rows, E = {width}"
        for width in HEAD_WIDTHS.values()
        for rows in HEAD_ROWS
        for who in ("ours", "unfused")
    )
    return [
        Job("matmul", "matmul", (*(f"K = {size}" for size in MATRIX_SIZES), "a cut of the step breakdown")),
        *(Job("attention", kernel, tuple(f"{kernel}, {length}" for length in lengths)) for kernel in kernels),
        Job("head", "head", head),
        *(Job("step", step, tuple(f"{step} {kind}" for kind in STEP_KINDS)) for step in steps),
        Job("data", "data", ("loader, dali", "loader, cpu")),
    ]


class Bench:
    """Measures one job.

    Args:
        job: the job.
        tell: called with each figure as soon as it is measured.
        tiny: small sizes and single rounds, to test the script.
        folder: folder for files.
    """

    def __init__(self, job: Job, tell: Callable[[Figure], None], tiny: bool, folder: Path) -> None:
        self.job, self._tell, self.tiny, self.folder = job, tell, tiny, folder
        self.device = current_device()

    def run(self) -> None:
        getattr(self, f"_{self.job.section}")()

    def _try(self, name: str, measure: Callable[[], tuple[float, str, Details]]) -> None:
        """Report the result of ``measure`` (value, unit, details), or why there is none."""
        try:
            value, unit, details = measure()
            figure = Figure(self.job.section, name, value, unit, details=details)
        except torch.OutOfMemoryError:
            figure = Figure(self.job.section, name, missing="out of memory")
        except Exception as error:
            reason = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
            figure = Figure(self.job.section, name, missing=reason + " ".join(str(error).split())[:200])
        self._tell(figure)
        gc.collect()
        torch.cuda.empty_cache()

    def _seconds(self, function: Callable[[], object], least: float = 0.4) -> float:
        """Mean seconds of a call, after three warm-up calls, over rounds of five for at least ``least`` seconds."""
        for _ in range(1 if self.tiny else 3):
            function()
        torch.cuda.synchronize()
        calls, begin = 0, time.perf_counter()
        while not calls or (not self.tiny and time.perf_counter() - begin < least):
            for _ in range(1 if self.tiny else 5):
                function()
                calls += 1
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    def _matmul(self) -> None:
        rows, dtype = (64, torch.float32) if self.tiny else (65536, torch.bfloat16)

        def multiply(size: int) -> tuple[float, str, Details]:
            a = torch.randn(rows, size, device=self.device, dtype=dtype)
            b = torch.randn(3 * size, size, device=self.device, dtype=dtype)
            seconds = self._seconds(lambda: a @ b.T)
            rate = 2 * rows * size * 3 * size / seconds / 1e12
            return rate, "TFLOP/s", {"% of peak": 100 * rate / HOPPER_TFLOPS, "rows": rows}

        for size in MATRIX_SIZES:
            self._try(f"K = {size}", partial(multiply, size))

        def cut() -> tuple[float, str, Details]:
            breakdown, parts = Breakdown(self.device), 100
            begin = time.perf_counter()
            with breakdown.step():
                for _ in range(parts):
                    with breakdown.part("forward"):
                        pass
            return 1e6 * (time.perf_counter() - begin) / (2 * parts + 2), "us", {}

        cut()
        self._try("a cut of the step breakdown", cut)

    def _packs(self, stage: int, packs: int, seq_length: int) -> list[list[Sample]]:
        """Packs of samples, filled by the project's own plan; the same every time."""
        rng, count = np.random.default_rng(0), max(packs * seq_length // 150, 8)
        grids = [(14, 14)] * count if stage == 1 else native_grids(count, rng)
        samples = [sample for sample in make_samples(grids, rng) if tokens_of(sample) <= seq_length]
        lengths = np.array([tokens_of(sample) for sample in samples])
        plan = Plan([Source(len(lengths), lambda ids: lengths[ids])], seq_length, lanes=1, seed=0)
        return [[samples[i] for i in plan.next_pack(0)] for _ in range(packs)]

    def _batches(self, config: RunConfig, stage: int, micro_batch: int) -> list[PackedBatch]:
        """``_PACKS`` packs as the loader gives them on a GPU: patches on the GPU, the rest in pinned host memory."""
        packs = self._packs(stage, _PACKS, config.data.seq_length)
        model, batches = config.model, []
        for first in range(0, len(packs), micro_batch):
            mine = packs[first : first + micro_batch]
            batch = pack_samples(mine, config.data.seq_length)
            count = sum(map(len, mine))
            factors = torch.ones(model.num_layers, 2, len(batch.sample_starts))
            factors[:, :, :count] = drop_path_factors(0, 1, list(range(count)), model.num_layers, model.drop_path_rate)
            assert batch.patches is not None
            batch = replace(batch, patches=batch.patches.to(self.device), drop_path=factors)
            batches.append(batch.pin_memory() if self.device.type == "cuda" else batch)
        return batches

    def _attention(self) -> None:
        kernel, dtype = self.job.name, torch.bfloat16 if self.device.type == "cuda" else torch.float32
        for head_dim in HEAD_DIMS:
            for stage in STAGES:
                self._try(
                    f"{kernel}, stage {stage} head dim {head_dim}",
                    partial(self._attend, kernel, head_dim, stage, dtype),
                )

    def _attend(self, kernel: str, head_dim: int, stage: int, dtype: torch.dtype) -> tuple[float, str, Details]:
        heads, slots = (2, 600) if self.tiny else (16, 16384)
        sixth = head_dim // 6
        model = ModelConfig(
            hidden_size=heads * head_dim,
            num_attention_heads=heads,
            rope_sections=(head_dim // 2 - 2 * sixth, sixth, sixth),
        )
        batch = pack_samples(self._packs(stage, 1, slots), slots)
        shape = (slots, heads, head_dim)
        q, k, v, grad = (torch.randn(shape, device=self.device, dtype=dtype) for _ in range(4))
        inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        if kernel == _PADDED:
            if self.device.type != "cuda":
                raise ValueError("FlexAttention needs a CUDA device for its backward pass")
            mask = gpu_baseline.pack_mask(batch.sample_ids.to(self.device), batch.is_image.to(self.device), True)
            positions = batch.position_ids.to(self.device)
            angles = rotary_cos_sin(positions, head_dim, model.rope_sections, model.rope_theta, dtype)
            rotate = compiled(apply_rotary)

            def forward() -> torch.Tensor:
                turned = rotate(q, *angles), rotate(k, *angles), v
                query, key, value = (x.transpose(0, 1)[None] for x in turned)
                return gpu_baseline.flex_padded(query, key, value, mask)[0].transpose(0, 1)

        else:
            if reason := BACKENDS[kernel].why_not(Place(self.device, dtype, head_dim)):
                raise ValueError(reason)
            packed = prepare_attention(batch, model, dtype, kernel, self.device, fusion=self.device.type == "cuda")

            def forward() -> torch.Tensor:
                return packed.backend(q, k, v, head_dim**-0.5)

        seconds = self._seconds(lambda: torch.autograd.grad(forward(), inputs, grad))
        counts = dict(zip(COUNTS, count_batch(batch).tolist(), strict=True))
        flops = 3 * 4 * model.hidden_size * (counts["image_pairs"] + counts["text_pairs"])
        return flops / seconds / 1e12, "TFLOP/s", {"ms": 1000 * seconds}

    def _head(self) -> None:
        for recipe_name, width in HEAD_WIDTHS.items():
            config = recipe(recipe_name, 1, self.tiny, micro_batch_size=1, global_batch_size=1)
            groups.initialize(config)
            group = groups.parallel_state.get_tensor_model_parallel_group()
            head = Head(config.model, transformer_config(config), group)
            head.to(self.device)
            quick_weights(head, config)
            weight: Any = head.weight
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # DDP's, in training
            for rows in HEAD_ROWS:
                count = rows // 20 if self.tiny else rows
                shape, dtype = (count, 1, config.model.hidden_size), compute_dtype(config)
                hidden = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
                labels = torch.randint(0, config.model.vocab_size, (count,), device=self.device)
                for who, forward in head_losses(head, hidden, labels).items():
                    name = f"{who} {rows} rows, E = {width}"
                    self._try(name, partial(self._head_rate, forward, hidden, weight, config))
        groups.finalize()

    def _head_rate(
        self, forward: Callable[[], torch.Tensor], hidden: torch.Tensor, weight: Any, config: RunConfig
    ) -> tuple[float, str, Details]:
        before = torch.cuda.memory_allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = self._seconds(lambda: add_head_gradients(forward(), hidden, weight))
        flops = 3 * 2 * config.model.text_hidden_size * config.model.vocab_size * len(hidden)
        above = (torch.cuda.max_memory_allocated() - before) / 2**30
        return flops / seconds / 1e12, "TFLOP/s", {"ms": 1000 * seconds, "GiB above weights and inputs": above}

    def _step(self) -> None:
        model, _, stage = self.job.name.split()
        for kind in STEP_KINDS:
            self._try(f"{self.job.name} {kind}", partial(self._largest, kind, model, int(stage)))
        if torch.distributed.is_initialized():
            groups.finalize()

    def _largest(self, kind: str, model: str, stage: int) -> tuple[float, str, Details]:
        """The step with the largest micro-batch that fits. The baseline's logits leave room for one pack."""
        if kind == "baseline":
            return self._baseline_step(model, stage)
        for micro_batch in (4, 2):
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._our_step(kind, model, stage, micro_batch)
            gc.collect()
            torch.cuda.empty_cache()
        return self._our_step(kind, model, stage, 1)

    def _our_step(self, kind: str, model: str, stage: int, micro_batch: int) -> tuple[float, str, Details]:
        config = recipe(model, stage, self.tiny, micro_batch_size=micro_batch, global_batch_size=_PACKS)
        config = override(config, STEP_KINDS[kind])
        check_machine(config)
        groups.initialize(config)
        # The usual initial weights are drawn on the CPU, which would take longer than all steps here.
        genlip.fill_initial_weights = quick_weights
        run = build_run(config)
        batches = self._batches(config, stage, micro_batch)
        if kind == "graph":  # a shape is captured at its third use
            for _ in range(3):
                train_step(run, iter(batches))
        attention = genlip.unwrap(run.model[0]).attention_backend
        return self._timed_steps(
            lambda: train_step(run, iter(batches)).loss, batches, config, micro_batch, attention, run.breakdown
        )

    def _baseline_step(self, model: str, stage: int) -> tuple[float, str, Details]:
        config = recipe(model, stage, self.tiny, micro_batch_size=1, global_batch_size=_PACKS)
        batches = self._batches(config, stage, 1)
        step = gpu_baseline.trainer(config.model, batches, self.device, compute_dtype(config))
        return self._timed_steps(step, batches, config, 1, _PADDED if self.device.type == "cuda" else "SDPA")

    def _timed_steps(
        self,
        step: Callable[[], float],
        batches: list[PackedBatch],
        config: RunConfig,
        micro_batch: int,
        attention: str,
        breakdown: Breakdown | None = None,
    ) -> tuple[float, str, Details]:
        """(MFU, details) of a step over ``batches``."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = step()
        if not np.isfinite(loss):
            raise RuntimeError(f"the loss is {loss}")
        if breakdown is not None:
            breakdown.take()
        seconds = self._seconds(step, 2.0)
        counts = torch.stack([count_batch(batch) for batch in batches]).sum(0)
        by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
        # Memory of CUDA graphs counts as free between replays.
        peak = torch.cuda.max_memory_reserved if config.train.cuda_graph else torch.cuda.max_memory_allocated
        details: Details = {
            "samples/s": by_name["samples"] / seconds,
            "tokens/s": by_name["tokens"] / seconds,
            "ms": 1000 * seconds,
            "packs a micro-batch": micro_batch,
            "GiB at most": peak() / 2**30,
            "attention": attention,
        }
        if breakdown is not None:
            details |= {f"ms {part}": 1000 * s for part, s in zip(PARTS, breakdown.take(), strict=True) if s}
        rate = training_flops(counts, config.model) / seconds / 1e12
        return 100 * rate / HOPPER_TFLOPS, "% MFU", details

    def _data(self) -> None:
        """The loader by itself, over photos of web sizes in packs of stage 1."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        data = BenchData(self.folder, self.tiny, "", "")
        for decoder in ("dali", "cpu"):
            self._try(f"loader, {decoder}", partial(self._loaded, data, decoder))

    def _loaded(self, data: BenchData, decoder: str) -> tuple[float, str, Details]:
        config = recipe("l16", 1, False, micro_batch_size=1, global_batch_size=4)
        settings: dict[str, Any] = {
            "data.train_data": data.indexed["stage 1"], "data.tokenizer": data.tokenizer, "data.decoder": decoder,
            "model.drop_path_rate": 0.0, **({"data.seq_length": 1200} if self.tiny else {}),
        }  # fmt: skip
        config = override(config, settings)
        loader = Loader(config, "train")
        batches = iter(loader)
        for _ in range(config.data.prefetch + 2):
            next(batches)
        samples, begin, least = 0, time.perf_counter(), 0.0 if self.tiny else 6.0
        while not samples or time.perf_counter() - begin < least:
            samples += len(next(batches).keys)
        seconds = time.perf_counter() - begin
        loader.close()
        return samples / seconds, "samples/s", {"cores": len(os.sched_getaffinity(0))}


def recipe(model: str, stage: int, tiny: bool, **train: int) -> RunConfig:
    """A recipe of the paper for one GPU (BF16); ``tiny`` shrinks its sizes."""
    name = f"{model}_stage{stage}"
    flags = {**ONE_RANK, **{f"train.{key}": value for key, value in train.items()}, **(_TINY if tiny else {})}
    return override(from_dict(load_yaml(name), name), flags)


def head_losses(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that return the summed loss of the answer rows, float32 []: ours and Megatron-Core's unfused one.

    Args:
        hidden: [R, 1, D].
        labels: int64 [R].
    """
    places, ones = torch.arange(len(labels), device=labels.device), torch.ones(len(labels), device=labels.device)

    def unfused() -> torch.Tensor:
        logits = torch.nn.functional.linear(head.ln_post(hidden), head.weight)  # [R, 1, V]
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels[:, None]).sum()

    return {"ours": lambda: head(hidden, places, labels, ones), "unfused": unfused}


def add_head_gradients(loss: torch.Tensor, hidden: torch.Tensor, weight: Any) -> torch.Tensor:
    """Return the gradient of ``hidden``, and add that of the head's ``weight`` to its ``main_grad``.

    In training the fused loss or DDP adds it.
    """
    weight.grad_added_to_main_grad = False
    gradient, of_weight = torch.autograd.grad(loss, [hidden, weight])
    if not weight.grad_added_to_main_grad:
        weight.main_grad.add_(of_weight)
    return gradient


def quick_weights(model: torch.nn.Module, config: RunConfig) -> None:
    """Fill weights on their device: normal matrices, and vectors of 0.1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.model.init_method_std)
            else:
                parameter.fill_(0.1)
