"""Every attention backend equals the dense rule, forward and backward, on any pack; and costs what samples cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.model.attention import PrefixLMAttention, choose_backend, plan_attention

Samples = list[tuple[int, int]]
CPU = torch.device("cpu")


def pack(samples: Samples, padding: int) -> PackedBatch:
    """Samples of (image, text) lengths end to end, then padding; one unused entry at the end."""
    total = sum(map(sum, samples)) + padding
    sample_ids = torch.full((total,), -1)
    is_image = torch.zeros(total, dtype=torch.bool)
    starts, slot = [], 0
    for i, (image, text) in enumerate(samples):
        starts.append(slot)
        sample_ids[slot : slot + image + text] = i
        is_image[slot : slot + image] = True
        slot += image + text
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        is_image=is_image,
        position_ids=torch.randint(0, 50, (3, total)),
        sample_ids=sample_ids,
        sample_starts=torch.tensor([*starts, 0]),
        image_lengths=torch.tensor([*(image for image, _ in samples), 0]),
        text_lengths=torch.tensor([*(text for _, text in samples), 0]),
        patches=None,
        loss_rows=empty,
        labels=empty,
        loss_weights=torch.zeros(0),
    )


def attend(batch: PackedBatch, backend: str, head_dim: int = 16, heads: int = 2) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of query, key and value."""
    model = ModelConfig(hidden_size=heads * head_dim, num_attention_heads=heads, rope_sections=(2, 2, 2))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, 1, heads, head_dim, generator=generator) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    attention = PrefixLMAttention(None, 1, None, "self", softmax_scale=head_dim**-0.5)
    out = attention(q, k, v, None, packed_seq_params=plan_attention(batch, model, torch.float32, backend, CPU))
    out.backward(inputs[3].flatten(2))
    return out, q.grad, k.grad, v.grad


def assert_same(samples: Samples, padding: int, head_dim: int = 16) -> None:
    batch = pack(samples, padding)
    for ours, oracle in zip(attend(batch, "grouped", head_dim), attend(batch, "dense", head_dim), strict=True):
        # Softmax over up to 300 keys in float32: rounding reaches 3e-6 on values up to 5.
        torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_head_sizes(head_dim: int) -> None:
    assert_same([(9, 5), (16, 3)], 2, head_dim)


@pytest.mark.parametrize(
    "samples",
    [
        [(196, 40)],
        [(4, 0)],
        [(0, 7), (0, 1), (3, 2)],
        [(1, 1), (1, 0), (1, 30)],
        [(2, 3)] * 120,
        [(64, 10), (1, 4), (30, 25), (30, 25), (31, 25), (100, 3)],
    ],
    ids=["one", "image-only", "text-only", "one-patch", "hundred", "mixed"],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_packs(samples: Samples, padding: int) -> None:
    assert_same(samples, padding)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)).filter(any), min_size=1, max_size=12),
    st.integers(0, 9),
)
def test_any_pack(samples: Samples, padding: int) -> None:
    assert_same(samples, padding)


def test_padding_gives_zeros_and_takes_no_gradient() -> None:
    out, *grads = attend(pack([(3, 2)], 4), "grouped")
    assert not out[5:].any()
    assert not any(grad[5:].any() for grad in grads)


def test_cost_grows_with_the_samples_not_with_the_pack() -> None:
    """Ten times the samples means ten times the query-key pairs, where a dense pack would mean a hundred times."""

    def pairs(count: int) -> int:
        plan = plan_attention(pack([(20, 10)] * count, 0), ModelConfig(), torch.float32, "grouped")
        return sum(group.size * group.length**2 for group in plan.groups)

    assert pairs(100) == 10 * pairs(10)


def test_forced_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast': allowed are dense, grouped, varlen"):
        plan_attention(pack([(1, 1)], 0), ModelConfig(), torch.float32, "fast")


def test_backend_choice() -> None:
    assert choose_backend(torch.device("cpu"), torch.float32) == "grouped"
    assert choose_backend(torch.device("cuda"), torch.float32) == "grouped"
    assert choose_backend(torch.device("cuda"), torch.bfloat16) == "varlen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs a CUDA device")
@pytest.mark.parametrize("samples", [[(196, 40)] * 3, [(16, 0), (0, 9), (1, 4)]])
def test_varlen_equals_dense_in_bf16(samples: Samples) -> None:
    batch = pack(samples, 3)
    model = ModelConfig(hidden_size=128, num_attention_heads=2, rope_sections=(8, 12, 12))
    attention = PrefixLMAttention(None, 1, None, "self", softmax_scale=0.125)
    tensors = [torch.randn(batch.num_tokens, 1, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    batch = replace(batch.to("cuda"), keys=())
    ours, oracle = (
        attention(*tensors, None, packed_seq_params=plan_attention(batch, model, torch.bfloat16, backend))
        for backend in ("varlen", "dense")
    )
    # bfloat16 carries 8 bits: 1/128 of values up to 2.
    torch.testing.assert_close(ours, oracle, atol=2e-2, rtol=2e-2)
