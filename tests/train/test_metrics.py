"""FLOPs count only useful work: the formula, and the counts of a batch."""

from __future__ import annotations

import pytest
import torch

from genlip_megatron.batch import Sample, pack_samples
from genlip_megatron.config import ModelConfig, from_dict, load_yaml
from genlip_megatron.estimate import SampleMix, default_mix, sample_flops
from genlip_megatron.model.flops import COUNTS, count_batch, training_flops

SIZES = {"l16_stage1": 0.620, "so16_stage1": 0.847, "g16_stage1": 2.124}  # TFLOP


def stage1_sample() -> Sample:
    """196 patches and 74 text tokens; the last 68 carry loss."""
    return Sample(torch.zeros(196, 768, dtype=torch.uint8), 14, 14, [1] * 74, [False] * 6 + [True] * 68)


@pytest.mark.parametrize("name", SIZES)
def test_a_stage1_sample_costs_what_the_formula_says(name: str) -> None:
    config = from_dict(load_yaml(name), name)
    flops = training_flops(count_batch(pack_samples([[stage1_sample()]], 270)), config.model)
    assert flops / 1e12 == pytest.approx(SIZES[name], abs=0.001)
    mix = default_mix(config)
    assert mix == SampleMix(196, 74, 68) and sample_flops(config.model, mix) == pytest.approx(flops)


def test_padding_and_masked_samples_are_not_useful_work() -> None:
    full = training_flops(count_batch(pack_samples([[stage1_sample()]], 270)), ModelConfig())
    padded = training_flops(count_batch(pack_samples([[stage1_sample()], []], 1000)), ModelConfig())
    assert padded == full


def test_counts_of_two_samples() -> None:
    small = Sample(torch.zeros(2, 768, dtype=torch.uint8), 1, 2, [5, 6, 7], [False, True, True])
    counts = dict(zip(COUNTS, count_batch(pack_samples([[small], [small]], 8)).tolist(), strict=True))
    assert counts == {
        "tokens": 10,
        "samples": 2,
        "image_tokens": 4,
        "image_pairs": 2 * 4,
        # Text token k sees 2 patches and k + 1 text tokens: 3 + 4 + 5.
        "text_pairs": 2 * 12,
        "loss_rows": 4,
        "slots": 16,
    }
