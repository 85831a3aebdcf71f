"""The model equals the authors' model class: outputs of every layer, logits, loss, every gradient, image features.

Float32 on a CPU. Tolerances are several times the worst measured difference (in brackets), which is rounding: this
model adds in another order. Each gradient tensor is compared separately, because a norm over all would hide a missing
reduction.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genlip_megatron.model.mask import prefix_lm_mask
from genlip_megatron.model.rope import rotary_cos_sin
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import compare, golden_batch, load_golden
from genlip_megatron.testing.runs import layout

LIMITS = {
    "hidden": 3e-5,  # absolute, values up to 4 (6.1e-6)
    "logits": 4e-5,  # absolute, values up to 3 (8.4e-6)
    "loss": 1e-6,  # relative (1e-7)
    "gradient": 3e-5,  # norm of the difference relative to the tensor's norm (6.4e-6)
    "features": 2e-5,  # absolute (3.8e-6)
}


def check(worst: dict[str, float]) -> None:
    print(worst)
    for kind, limit in LIMITS.items():
        assert worst.get(kind, 0.0) <= limit, f"{kind}: {worst[kind]:.2e} above {limit:.0e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2", "CP2", "PP3", "TP2xCP2", "TP2xPP3"])
def test_layouts_match_the_authors_model(golden_file: Path, name: str) -> None:
    world_size, flags = layout(name)
    results = run_distributed(world_size, compare, str(golden_file), flags)
    _, golden = load_golden(golden_file)
    expected = sum(tensor.startswith("grads/") for tensor in golden)
    copies = world_size // flags.get("parallel__pipeline_model_parallel_size", 1)
    assert sum(worst["tensors"] for worst in results) == expected * copies, "a gradient tensor was not compared"
    for worst in results:
        check(worst)


def test_dense_oracle_matches_the_authors_model(golden_file: Path) -> None:
    check(run_distributed(1, compare, str(golden_file), {"train__attention_backend": "dense"})[0])


def test_mask_and_rotary_equal_the_authors(golden_file: Path) -> None:
    model, golden = load_golden(golden_file)
    batch = golden_batch(golden)
    rows, length = golden["inputs/input_ids"].shape
    for row in range(rows):
        slots = slice(row * length, (row + 1) * length)
        valid = golden["inputs/valid"][row]
        mask = prefix_lm_mask(batch.sample_ids[slots], batch.is_image[slots])
        assert torch.equal(mask[valid], golden["outputs/mask"][row][valid])
    cos, sin = rotary_cos_sin(batch.position_ids, model.head_dim, model.rope_sections, model.rope_theta, torch.float32)
    valid = golden["inputs/valid"].flatten()
    for ours, name in ((cos, "cos"), (sin, "sin")):
        expected = golden[f"outputs/{name}"].flatten(0, 1)
        # Angles up to 96 radians have a float32 error of 4e-6 (measured: 3.8e-6).
        torch.testing.assert_close(ours[valid], expected[valid], atol=1e-5, rtol=0)
