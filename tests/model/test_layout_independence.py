"""The table of parameters and the weights: the layout decides which part a rank holds, not the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genlip_megatron.config import ModelConfig
from genlip_megatron.model.state_dict import TABLE, canonical_shapes, find
from genlip_megatron.model.weights import gather_canonical, initial_tensor
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import golden_run
from genlip_megatron.testing.runs import layout
from tests.model.builds import build

MODEL = ModelConfig(5, 32, 4, 48, 24, 61, (2, 1, 1))
SIZES = {
    "l16": (ModelConfig(24, 1024, 16, 2816, 1024), 334_666_752, None),
    "so16": (ModelConfig(27, 1152, 16, 3072, 1152), 467_240_832, None),
    "g16": (ModelConfig(40, 1536, 24, 4096, 1536), 1_229_083_136, None),
    "l16-release": (ModelConfig(24, 1152, 16, 2752, 1024), 388_866_432, 702_392_832),
    "so16-release": (ModelConfig(27, 1152, 16, 3072, 1024), 467_240_832, 780_767_232),
    "g16-release": (ModelConfig(40, 1536, 16, 4096, 1024), 1_229_083_136, 1_543_396_352),
}
TEXT_PARTS = ("embeddings.", "lm_head.", "in_proj.", "proj.")


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_named_sizes(name: str) -> None:
    model, vision, total = SIZES[name]
    sizes = {key: torch.Size(shape).numel() for key, shape in canonical_shapes(model).items()}
    assert sum(size for key, size in sizes.items() if not key.startswith(TEXT_PARTS)) == vision
    if total:
        assert sum(sizes.values()) == total


def initial_weights(model: ModelConfig, flags: dict[str, int]) -> dict[str, torch.Tensor]:
    """Full canonical weights of this rank's stage, gathered over tensor parallelism."""
    built = build(golden_run(model, 64, **flags))
    return gather_canonical(built, dict(built.named_parameters()))


@pytest.mark.parametrize("name", ["1", "TP2", "TP2xPP3"])
@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@pytest.mark.slow
def test_initial_weights_are_bit_equal_on_every_layout(name: str, gate: str) -> None:
    world_size, flags = layout(name)
    model = replace(MODEL, attention_output_gate=gate)
    seen = set()
    for weights in run_distributed(world_size, initial_weights, model, flags):
        for tensor, weight in weights.items():
            expected = initial_tensor(tensor, canonical_shapes(model)[tensor], model, 1234)
            assert torch.equal(weight, expected), tensor
            seen.add(tensor)
    assert seen == set(canonical_shapes(model))


def test_initial_distributions() -> None:
    query = initial_tensor("visual.layers.0.self_attn.q_proj.weight", (256, 128), MODEL, 1)
    assert query.abs().max() <= (6 / 384) ** 0.5
    assert query.abs().max() > 0.99 * (6 / 384) ** 0.5
    fc1 = initial_tensor("visual.layers.0.mlp.fc1.weight", (512, 128), MODEL, 1)
    assert abs(fc1.std().item() - 0.02) < 2e-4
    other = initial_tensor("visual.layers.1.mlp.fc1.weight", (512, 128), MODEL, 1)
    assert not torch.equal(fc1, other)
    assert not torch.equal(fc1, initial_tensor("visual.layers.0.mlp.fc1.weight", (512, 128), MODEL, 2))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
def test_table_round_trips_every_tensor(size: int, gate: str) -> None:
    model = replace(MODEL, attention_output_gate=gate)
    full = {name: torch.randn(shape) for name, shape in canonical_shapes(model).items()}
    seen = set()
    for entry in TABLE:
        names, _ = find(entry.local.format(i=1))
        layout = entry.layout
        tensors = [full[name] for name in names]
        for name, back in zip(names, layout.join(layout.split(tensors, model, size), model), strict=True):
            assert torch.equal(back, full[name]), name
            seen.add(name)
    outside = {name for name in full if name.startswith("visual.layers.") and not name.startswith("visual.layers.1.")}
    assert seen == set(full) - outside
