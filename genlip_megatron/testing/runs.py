"""Small training runs on any layout, and their results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.config import RunConfig, from_dict, override
from genlip_megatron.testing import CHECKOUT

# Spelling of layouts in tests: tensor, pipeline, interleaved, context and data parallel.
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
}


def layout(name: str) -> tuple[int, dict[str, Any]]:
    """(processes, settings) of a layout such as "TP2xPP2xDP2" or "1".

    >>> layout("TP2xDP2")
    (4, {'parallel__tensor_model_parallel_size': 2})
    """
    world_size, flags = 1, {}
    for part in name.split("x") if name != "1" else ():
        kind, size = part.rstrip("0123456789"), part.lstrip("TPVCD")
        if kind not in (*_SIZES, "DP") or not size.isdigit():
            raise ValueError(f"layout {name!r}: expected 1, or parts such as TP2, PP2, VPP2, CP2, DP2 joined by x")
        world_size *= 1 if kind == "VPP" else int(size)
        if kind != "DP":
            flags[f"parallel__{_SIZES[kind]}"] = int(size)
    return world_size, flags


def make_data(folder: Path) -> None:
    """A small rendered data set with its tokenizer and index, made by the project's own tools."""

    def run(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=CHECKOUT, check=True, capture_output=True)

    run("tools/render_demo_data.py", "--output", str(folder), "--train-samples", "160", "--val-samples", "24")
    run("tools/train_tokenizer.py", str(folder / "train-*.tar"), "--output", str(folder / "tokenizer.model"))
    for split in ("train", "val"):
        run("tools/prepare_data.py", str(folder / f"{split}-*.tar"), "--tokenizer", str(folder / "tokenizer.model"))


def tiny_config(data: Path, **flags: Any) -> RunConfig:
    """A model of four layers on the demo's scenes, with DropPath and projections."""
    tree = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "text_hidden_size": 24,
            "vocab_size": 511,
            "rope_sections": [2, 1, 1],
            "drop_path_rate": 0.2,
        },
        "data": {
            "train_data": [f"{data}/train-*.tar"],
            "valid_data": [f"{data}/val-*.tar"],
            "tokenizer": str(data / "tokenizer.model"),
            "image_mode": "native",
            "max_pixels": 16384,
            "seq_length": 512,
            "pack_buffer": 32,
        },
        "train": {"global_batch_size": 4, "train_iters": 6, "lr_warmup_iters": 2, "precision": "fp32"},
        "log": {"eval_iters": 2, "caption_samples": 0},
    }
    return override(from_dict(tree, "test"), {name.replace("__", "."): value for name, value in flags.items()})


def build_run(config: RunConfig) -> Any:
    """``train.setup.build_run``, imported when a new process calls it."""
    from genlip_megatron.train import setup

    return setup.build_run(config)


def full_weights(run: Any) -> dict[str, torch.Tensor]:
    """Full canonical weights of this rank's pipeline stage, in the compute dtype. FSDP stores bfloat16 weights in
    float32."""
    from genlip_megatron.model.genlip import unwrap
    from genlip_megatron.model.specs import compute_dtype
    from genlip_megatron.model.weights import gather_canonical

    chunks = [unwrap(chunk) for chunk in run.model]
    return {
        name: tensor.clone().to(compute_dtype(run.config))
        for chunk in chunks
        for name, tensor in gather_canonical(chunk, dict(chunk.named_parameters())).items()
    }


def outcomes(run: Any, steps: int, keys: list[tuple[str, ...]]) -> Iterator[Any]:
    """Train up to step ``steps``; yields each step's outcome. ``keys`` gets the sample keys of every micro-batch."""
    from genlip_megatron.train.step import train_step

    taken = iter(run.train_loader)  # now: ranks that share a micro-batch must all prefetch it

    def watched() -> Any:
        for batch in taken:
            keys.append(batch.keys)
            yield batch

    batches = watched()
    while run.iteration < steps:
        outcome = train_step(run, batches)
        assert outcome.updated
        yield outcome


def run_steps(config: RunConfig, steps: int, last: bool = True) -> dict[str, Any]:
    """Train on every rank; returns losses, gradient norms, sample keys of this rank, and final weights of this stage.

    Args:
        last: save optimizer state that any layout can load.
    """
    from megatron.core import parallel_state

    from genlip_megatron.train.resume import finish_saves, save
    from genlip_megatron.train.setup import set_up
    from genlip_megatron.train.validation import evaluate

    run = set_up(config)
    assert run.train_loader is not None
    keys: list[tuple[str, ...]] = []
    taken = list(outcomes(run, steps, keys))
    validation = evaluate(run)
    save(run, last)
    finish_saves(run)
    run.train_loader.close()
    return {
        "losses": [outcome.loss for outcome in taken],
        "norms": [outcome.grad_norm for outcome in taken],
        "validation": validation,
        "keys": keys,
        "data_parallel": parallel_state.get_data_parallel_rank(),
        "weights": full_weights(run),
    }


def failing_set_up(config: RunConfig) -> str:
    """The error message of ``set_up``, or "no error"."""
    from genlip_megatron.train.setup import set_up

    try:
        set_up(config)
    except ValueError as error:
        return str(error)
    return "no error"


def merged(results: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    """Tensors of all pipeline stages."""
    return {name: tensor for result in results for name, tensor in result[kind].items()}


def weights(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return merged(results, "weights")
