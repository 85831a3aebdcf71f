"""Compare the model with golden tensors of the authors' model class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import DataConfig, ModelConfig, RunConfig, TrainConfig, override
from genlip_megatron.device import current_device
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.model.weights import fill_weights
from genlip_megatron.parallel import groups
from genlip_megatron.testing import CHECKOUT
from genlip_megatron.testing.parity import gradients
from genlip_megatron.testing.runs import build_run
from genlip_megatron.train.forward_backward import forward_backward
from genlip_megatron.train.validation import sum_over_ranks

GOLDEN_DIR = CHECKOUT / "tests/golden"


def load_golden(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(model, tensors) of a golden file: ``X.safetensors`` beside ``X.json``."""
    settings = json.loads(path.with_suffix(".json").read_text())["config"]
    model = ModelConfig(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        num_attention_heads=settings["num_attention_heads"],
        ffn_hidden_size=settings["intermediate_size"],
        text_hidden_size=settings["text_embed_dim"],
        vocab_size=settings["vocab_size"],
        rope_sections=tuple(settings["rope_scaling"]["mrope_section"]),
        rope_theta=settings["rope_theta"],
        layer_scale_init=settings["ls_init_value"],
        drop_path_rate=settings["drop_path_rate"],
        attention_output_gate="elementwise" if settings["gated_attention"] else "none",
    )
    return model, load_file(path)


def golden_run(model: ModelConfig, seq_length: int, **flags: Any) -> RunConfig:
    """A run of a golden model with one pack per step; ``flags`` as in ``tiny_config``."""
    train = TrainConfig(global_batch_size=1, precision="fp32")
    config = RunConfig(model=model, data=DataConfig(seq_length=seq_length), train=train)
    return override(config, {name.replace("__", "."): value for name, value in flags.items()})


def golden_batch(tensors: dict[str, Tensor]) -> PackedBatch:
    """The golden rows end to end as one micro-batch, with sample ids that are unique over the rows."""
    rows, length = tensors["inputs/input_ids"].shape
    valid = tensors["inputs/valid"].flatten()
    is_image = tensors["inputs/image_mask"].flatten() & valid
    token_ids = tensors["inputs/input_ids"].flatten().where(valid & ~is_image, torch.tensor(0))
    raw = tensors["inputs/sample_ids"] + torch.arange(rows)[:, None] * 10_000
    sample_ids = torch.full((rows * length,), -1)
    _, sample_ids[valid] = raw.flatten()[valid].unique(return_inverse=True)
    count = int(sample_ids.max()) + 1
    starts = torch.stack([(sample_ids == i).nonzero()[0, 0] for i in range(count)])
    images = torch.stack([((sample_ids == i) & is_image).sum() for i in range(count)])
    totals = torch.stack([(sample_ids == i).sum() for i in range(count)])
    labels = tensors["inputs/labels"]
    shifted = torch.cat((labels[:, 1:], torch.full((rows, 1), -100)), dim=1).flatten()
    loss_rows = (shifted >= 0).nonzero().squeeze(1)
    return PackedBatch(
        token_ids=token_ids,
        is_image=is_image,
        position_ids=tensors["inputs/position_ids"].permute(1, 0, 2).flatten(1),
        sample_ids=sample_ids,
        sample_starts=starts,
        image_lengths=images,
        text_lengths=totals - images,
        patches=tensors["inputs/pixel_values"].flatten(1),
        loss_rows=loss_rows,
        labels=shifted[loss_rows],
        loss_weights=torch.ones(len(loss_rows)),
    )


def _vision_batch(pixels: Tensor, grid: Tensor) -> PackedBatch:
    """One image without text: pixels [P, 3, 16, 16], grid (frames, rows, columns)."""
    _, rows, columns = grid[0].tolist()
    return pack_samples([[Sample(pixels.flatten(1), rows, columns, [])]], rows * columns)


def compare(path: str, flags: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each kind in this rank's part of the model. A collective over all ranks.

    ``hidden``, ``logits`` and ``features`` are absolute. ``loss`` is relative. ``gradient`` is the norm of a tensor's
    difference over the tensor's norm. ``tensors`` is the number of gradients that were compared.

    Args:
        flags: of ``golden_run``, for one data-parallel rank.
    """
    model_config, golden = load_golden(Path(path))
    batch = golden_batch(golden)
    golden = {name: tensor.to(current_device()) for name, tensor in golden.items()}
    config = golden_run(model_config, batch.num_tokens, **flags)
    groups.initialize(config)
    run = build_run(config)
    model = unwrap(run.model[0])
    fill_weights(model, lambda name: golden[f"weights/{name}"])
    valid = golden["inputs/valid"].flatten()
    worst: dict[str, float] = {}

    def keep(kind: str, error: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), error)

    def gathered(hidden: Tensor) -> Tensor:
        for group in filter(None, (model.tp_group if model.config.sequence_parallel else None, model.context)):
            shards = [torch.empty_like(hidden) for _ in range(group.size())]
            torch.distributed.all_gather(shards, hidden.contiguous(), group=group)
            hidden = torch.cat(shards)
        return hidden[:, 0]

    def check_layer(layer: torch.nn.Module, _: tuple, output: tuple[Tensor, None]) -> None:
        expected = golden[f"outputs/layers.{layer.layer_number - 1}"].flatten(0, 1)  # type: ignore[operator]
        keep("hidden", (gathered(output[0].detach())[valid] - expected[valid]).abs().max().item())

    hooks = [layer.register_forward_hook(check_layer) for layer in model.decoder.layers]
    total, count = sum_over_ranks(forward_backward(run, iter([batch]))).tolist()
    for hook in hooks:
        hook.remove()
    keep("loss", abs(total / count / golden["outputs/loss"].item() - 1))
    found = gradients(run)
    for name, gradient in found.items():
        expected = golden[f"grads/{name}"].cpu()
        keep("gradient", ((gradient.float() - expected).norm() / expected.norm()).item())
    worst["tensors"] = len(found)
    if model.embed is not None and model.head is not None:
        with torch.no_grad():
            logits = model.head.logits(model.hidden_states(batch.to(current_device())))
            keep("logits", (logits[valid] - golden["outputs/logits"].flatten(0, 1)[valid]).abs().max().item())
            if torch.distributed.get_world_size() == 1:
                image = _vision_batch(golden["vision/pixel_values"].cpu(), golden["vision/grid"].cpu())
                hidden = model.hidden_states(image.to(current_device()))
                keep("features", (model.head.features(hidden) - golden["vision/ln_post"]).abs().max().item())
                read = model.head.logits(hidden)
                keep("logits", (read - golden["vision/patch_logits"]).abs().max().item())
    return worst
