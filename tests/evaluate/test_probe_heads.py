"""Stacked heads are what they say: attention of one query, trained as each would be by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genlip_megatron.evaluate import classify
from genlip_megatron.evaluate.heads import (
    AttentiveHeads,
    BatchNorm,
    MeanLinearHeads,
    SegmentationHead,
    StackedOptimizer,
    mean_patch,
)

B, P, D, C = 3, 7, 128, 5
LENGTHS = torch.tensor([7, 4, 1])
VALID = torch.arange(P) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def reference(heads: AttentiveHeads, number: int, x: Tensor, valid: Tensor | None) -> Tensor:
    """Logits [B, C] of one head without norms, by torch's own attention, which projects every patch."""
    identity = torch.eye(D)
    pooled, _ = F.multi_head_attention_forward(
        heads.query[number].expand(1, len(x), D),
        x.transpose(0, 1),
        x.transpose(0, 1),
        D,
        heads.attention_heads,
        None,
        torch.cat([torch.zeros(2 * D), heads.value_bias[number]]),
        None,
        None,
        False,
        0.0,
        identity,
        None,
        key_padding_mask=None if valid is None else ~valid,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=heads.key[number],
        v_proj_weight=heads.value[number],
    )
    return F.linear(pooled[0], heads.weight[number], heads.bias[number])


@pytest.mark.parametrize("valid", [None, VALID])
def test_attentive_heads_equal_torchs_attention(valid: Tensor | None) -> None:
    heads = AttentiveHeads(2, D, C)
    assert heads.attention_heads == 2
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(B, P, D)
    logits = heads(x, valid)
    for number in range(2):
        torch.testing.assert_close(logits[number], reference(heads, number, x, valid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["attentive", "mean"])
def test_padding_changes_nothing(kind: str) -> None:
    heads = AttentiveHeads(2, D, C, token_norm=True) if kind == "attentive" else MeanLinearHeads(2, D, C)
    x = torch.randn(B, P, D)
    logits = heads(x, VALID)
    again = AttentiveHeads(2, D, C, token_norm=True) if kind == "attentive" else MeanLinearHeads(2, D, C)
    again.load_state_dict({**heads.state_dict(), **{k: v for k, v in again.state_dict().items() if "norm" in k}})
    torch.testing.assert_close(logits, again(torch.where(VALID[..., None], x, 1e3), VALID))
    heads.eval()
    for number, length in enumerate(LENGTHS):
        alone = heads(x[number : number + 1, :length])
        torch.testing.assert_close(heads(x, VALID)[:, number : number + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "betas", "clip"),
    [("attentive", (0.9, 0.95), 0.5), ("attentive", (0.9, 0.999), 0.0), ("mean", None, 0.0)],
)
def test_stacked_heads_train_as_single_ones(kind: str, betas: tuple[float, float] | None, clip: float) -> None:
    def make(heads: int) -> nn.Module:
        # In float64: Adam divides by the size of a gradient, and so magnifies the rounding of a tiny one.
        if kind == "mean":
            return MeanLinearHeads(heads, 64, C).double()
        return AttentiveHeads(heads, 64, C, final_norm=True).double()

    rates, decays = (1e-3, 1e-2, 5e-2), (0.0, 0.1, 0.5)
    batches = [(torch.randn(6, P, 64).double(), torch.randint(C, (6,))) for _ in range(4)]
    stacked = make(3)
    start = {name: tensor.clone() for name, tensor in stacked.state_dict().items()}
    optimizer = StackedOptimizer(stacked, decays if betas else (0.0,) * 3, betas, clip)
    for x, labels in batches:
        logits = stacked(x)
        F.cross_entropy(logits.transpose(1, 2), labels.expand(3, -1), reduction="none").mean(1).sum().backward()
        optimizer.step(rates)
    for number in range(3):
        single = make(1)
        names = {name for name, _ in single.named_parameters()} | {"final_norm.mean", "final_norm.variance"}
        single.load_state_dict({name: start[name][number : number + 1] for name in start if name in names})
        groups = [
            {"params": [p for name, p in single.named_parameters() if name.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for name, p in single.named_parameters() if not name.endswith("bias")]},
        ]
        theirs = (
            torch.optim.AdamW(groups, rates[number], betas=betas, weight_decay=decays[number])
            if betas
            else torch.optim.SGD(single.parameters(), rates[number], momentum=0.9)
        )
        for x, labels in batches:
            theirs.zero_grad()
            F.cross_entropy(single(x)[0], labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(single.parameters(), clip)
            theirs.step()
        for name, parameter in single.named_parameters():
            ours = dict(stacked.named_parameters())[name][number : number + 1]
            torch.testing.assert_close(ours, parameter, rtol=1e-4, atol=2e-5)


def test_batch_norm_is_torchs() -> None:
    ours, theirs = BatchNorm((D,), 1e-5, affine=True), nn.BatchNorm1d(D)
    for _ in range(3):
        x = torch.randn(9, D) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_segmentation_head_is_batch_norm_and_a_1x1_convolution() -> None:
    head = SegmentationHead(D, C)
    norm, conv = nn.BatchNorm2d(D), nn.Conv2d(D, C, 1)
    with torch.no_grad():
        conv.weight.copy_(head.linear.weight[..., None, None])
        conv.bias.zero_()
    x = torch.randn(B, 6, D)
    whole = x.transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(head(x, (2, 3)), conv(norm(whole)), rtol=1e-5, atol=1e-5)


def test_initial_weights_are_cut_as_torchs() -> None:
    weight = AttentiveHeads(1, 128, C).key
    assert 0.018 < float(weight.std()) < 0.022 and float(weight.abs().max()) > 0.05


def test_the_cached_preset_has_the_head_of_aim_with_a_final_norm() -> None:
    preset = classify.PRESETS["cached"]
    assert preset.head is not None and preset.by_epoch
    heads = AttentiveHeads(1, D, C, **preset.head)
    assert heads.token_norm is not None and heads.final_norm is not None
    assert heads.token_norm.eps == 1e-6 and heads.token_norm.weight is None
    assert heads.bias is None and heads.value_bias is None


def test_mean_patch_leaves_out_padding() -> None:
    x = torch.randn(B, P, D)
    torch.testing.assert_close(mean_patch(x, VALID)[1], x[1, :4].mean(0))
