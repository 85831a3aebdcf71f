"""Golden tensors of the authors' model class, as PackedBatch and configuration of this project."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig

GOLDEN_DIR = Path(__file__).parent / "golden"


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
        attention_output_gate=settings["gated_attention"],
    )
    return model, load_file(path)


def golden_run(model: ModelConfig, seq_length: int, tp: int = 1, pp: int = 1) -> RunConfig:
    """A float32 run of a golden model."""
    return RunConfig(
        model=model,
        data=DataConfig(seq_length=seq_length),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp),
        train=TrainConfig(precision="fp32"),
    )


def golden_batch(tensors: dict[str, Tensor]) -> PackedBatch:
    """The golden rows laid end to end as one micro-batch; sample ids are made unique over the rows."""
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


def vision_batch(pixels: Tensor, grid: Tensor) -> PackedBatch:
    """One image without text: pixels [P, 3, 16, 16], grid (frames, rows, columns)."""
    height, width = int(grid[0, 1]), int(grid[0, 2])
    count = height * width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return PackedBatch(
        token_ids=torch.zeros(count, dtype=torch.int64),
        is_image=torch.ones(count, dtype=torch.bool),
        position_ids=torch.stack((torch.zeros(count, dtype=torch.int64), rows.flatten(), columns.flatten())),
        sample_ids=torch.zeros(count, dtype=torch.int64),
        sample_starts=torch.zeros(1, dtype=torch.int64),
        image_lengths=torch.tensor([count]),
        text_lengths=torch.zeros(1, dtype=torch.int64),
        patches=pixels.flatten(1),
        loss_rows=torch.zeros(0, dtype=torch.int64),
        labels=torch.zeros(0, dtype=torch.int64),
        loss_weights=torch.zeros(0),
    )
