"""Every attention backend equals the dense rule, forward and backward, on any pack; cost grows with the samples."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.attention import SelfAttention

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import ModelConfig, RunConfig, override
from genlip_megatron.model.attention import BACKENDS, GenLIPSelfAttention, choose_backend, context, prepare_attention
from genlip_megatron.model.attention.backend import Place
from genlip_megatron.model.attention.grouped import Grouped
from genlip_megatron.model.attention.two_calls import TwoCalls, reference_kernel

Samples = list[tuple[int, int]]
CPU = torch.device("cpu")


def pack(samples: Samples, padding: int) -> PackedBatch:
    """Samples of (image, text) lengths end to end, then padding; one unused entry at the end."""
    total = sum(map(sum, samples)) + padding
    sample_ids = torch.full((total,), -1)
    is_image = torch.zeros(total, dtype=torch.bool)
    starts: list[int] = []
    slot = 0
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


class Reference(TwoCalls):
    """The two calls of the GPU backends, with the plain kernel."""

    kernel = staticmethod(reference_kernel)


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "two calls", Reference)


class Cut:
    """A stand-in for the context-parallel group of one of ``ranks`` ranks."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


def forward(
    batch: PackedBatch,
    name: str,
    head_dim: int = 16,
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **own: Any,
) -> tuple[list[Any], list[torch.Tensor], torch.Tensor]:
    """(backend of each part, [query, key, value, gradient of the output], output), where queries attend in ``ranks``
    parts."""
    model = ModelConfig(hidden_size=2 * head_dim, num_attention_heads=2, rope_sections=(2, 2, 2))
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch.num_tokens, 2, head_dim)
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
    q, k, v = (x.requires_grad_(torch.is_grad_enabled()) for x in inputs[:3])
    backends = [
        prepare_attention(batch, model, dtype, name, device, Cut(rank, ranks), gather_keys=True).backend
        for rank in range(ranks)
    ]
    parts = zip(backends, q.chunk(ranks), strict=True)
    return backends, inputs, torch.cat([backend(part, k, v, head_dim**-0.5, **own) for backend, part in parts])


def attend(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    _, inputs, out = forward(*args, **kwargs)
    out.backward(inputs[3])
    grads = [x.grad for x in inputs[:3] if x.grad is not None]
    assert len(grads) == 3
    return [out, *grads]


EXACT = ["grouped", "two calls"]


def assert_same(samples: Samples, padding: int, head_dim: int = 16, backend: str = "grouped", ranks: int = 1) -> None:
    batch = pack(samples, padding)
    oracle = attend(batch, "dense", head_dim)
    for ours, theirs in zip(attend(batch, backend, head_dim, ranks), oracle, strict=True):
        # Softmax over up to 300 keys in float32: rounding reaches 3e-6 on values up to 5.
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


PACKS: dict[str, Samples] = {
    "one": [(196, 40)],
    "image-only": [(4, 0)],
    "text-only": [(0, 7), (0, 1), (3, 2)],
    "one-patch": [(1, 1), (1, 0), (1, 30)],
    "hundreds": [(2, 3)] * 300,
    "mixed": [(64, 10), (1, 4), (30, 25), (30, 25), (31, 25), (100, 3)],
    "nothing": [],
}


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_head_sizes(head_dim: int, backend: str) -> None:
    assert_same([(9, 5), (16, 3)], 2, head_dim, backend)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("samples", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("padding", [0, 5])
def test_packs(samples: Samples, padding: int, backend: str) -> None:
    if samples or padding:
        assert_same(samples, padding, backend=backend)


@pytest.mark.parametrize("backend", [*EXACT, "dense"])
@pytest.mark.parametrize("ranks", [2, 4, 7])
@pytest.mark.parametrize("samples", PACKS.values(), ids=PACKS)
def test_a_sequence_split_anywhere(samples: Samples, ranks: int, backend: str) -> None:
    """Each rank has queries only for its slots: all image, all text, all padding, samples split in two or more."""
    used = sum(map(sum, samples))
    assert_same(samples, -used % ranks + ranks * 8, backend=backend, ranks=ranks)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)).filter(any), min_size=1, max_size=12),
    st.integers(0, 9),
    st.sampled_from(EXACT),
    st.integers(1, 5),
)
def test_any_pack(samples: Samples, padding: int, backend: str, ranks: int) -> None:
    total = sum(map(sum, samples)) + padding
    assert_same(samples, padding + -total % ranks, backend=backend, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 4])
def test_flex_follows_the_rule(ranks: int) -> None:
    """Only the forward pass: flex has no backward pass on a CPU."""
    batch = pack(PACKS["mixed"], 4 + -sum(map(sum, PACKS["mixed"])) % 4)
    with torch.no_grad():
        ours, oracle = (forward(batch, backend, ranks=ranks)[2] for backend in ("flex", "dense"))
    torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", [*EXACT, "dense"])
def test_padding_gives_zeros_and_takes_no_gradient(backend: str) -> None:
    out, *grads = attend(pack([(3, 2)], 4), backend)
    assert not out[5:].any()
    assert not any(grad[5:].any() for grad in grads)


def test_cost_grows_with_the_samples_not_with_the_pack() -> None:
    """Ten times the samples need ten times the query-key pairs; a dense pack would need a hundred times."""

    def pairs(count: int) -> int:
        backend = prepare_attention(pack([(20, 10)] * count, 0), ModelConfig(), torch.float32, "grouped", CPU).backend
        assert isinstance(backend, Grouped)
        return sum(size * queries * keys for size, queries, keys in backend.shapes)

    assert pairs(100) == 10 * pairs(10)


HALF, FLOAT = torch.bfloat16, torch.float32


def test_choice_on_a_cpu_gives_the_reason() -> None:
    name, reason = choose_backend("auto", Place(CPU, FLOAT, 72))
    assert name == "grouped"
    assert reason.startswith("the first of varlen, te, grouped that runs here; ")
    assert "varlen needs a CUDA device; this is cpu" in reason
    assert "te Transformer Engine is not installed" in reason


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("varlen", "train.attention_backend = varlen: needs a CUDA device; this is cpu. Backends that run here: den"),
        ("flex", "it has no backward pass on a CPU"),
        ("te", "Transformer Engine is not installed"),
        ("fast", "'fast': unknown. Use auto, dense, grouped, varlen, flex, te"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_refused(wanted: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        choose_backend(wanted, Place(CPU, HALF, 72))
    assert message in str(error.value)


def test_every_backend_can_be_configured() -> None:
    for name in set(BACKENDS) - {"two calls"}:
        assert override(RunConfig(), {"train.attention_backend": name}).train.attention_backend == name


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert choose_backend("auto", Place(gpu, HALF, 72))[0] == "varlen"
    assert choose_backend("auto", Place(gpu, FLOAT, 72))[0] == "grouped"
    assert choose_backend("auto", Place(gpu, HALF, 36))[0] == "grouped"
    assert choose_backend("flex", Place(gpu, HALF, 72)) == ("flex", "as set")
    with pytest.raises(ValueError, match="varlen: needs bfloat16 activations"):
        choose_backend("varlen", Place(gpu, FLOAT, 72))
    versions = {"transformer_engine": "2.10.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.ModuleType("loads"))
    assert choose_backend("auto", Place(gpu, HALF, 72), transformer_engine=True)[0] == "te"
    versions["transformer_engine"] = "2.20.0"
    with pytest.raises(ValueError, match=r"2\.20\.0 is not a version that .* supports: 2\.9 and below 2\.12"):
        choose_backend("te", Place(gpu, HALF, 72))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_backend("auto", Place(gpu, HALF, 72))[0] == "grouped"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen, flex and te attention need a CUDA device")
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("backend", ["varlen", "flex", "te"])
@pytest.mark.parametrize("samples", [[(196, 40)] * 3, [(16, 0), (0, 9), (1, 4)]], ids=["full", "odd"])
def test_gpu_backends_equal_dense_in_bf16(samples: Samples, backend: str, head_dim: int, ranks: int) -> None:
    gpu = torch.device("cuda")
    reason = BACKENDS[backend].why_not(Place(gpu, HALF, head_dim))
    if reason:
        pytest.skip(f"{backend}: {reason}")
    batch = pack(samples, 4 + -sum(map(sum, samples)) % 4)
    results = [attend(batch, name, head_dim, ranks, HALF, gpu) for name in (backend, "dense")]
    for ours, oracle in zip(*results, strict=True):
        # bfloat16 has 8 significant bits: 1/128 of values up to 4.
        torch.testing.assert_close(ours, oracle, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("moved", [True, False])
def test_the_gate_survives_offloading_of_the_queries(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(4, 1, 2, 32).split(8, dim=-1)
    monkeypatch.setattr(SelfAttention, "get_query_key_value_tensors", lambda self, x: views)
    attention = object.__new__(GenLIPSelfAttention)
    torch.nn.Module.__init__(attention)
    attention._gate_rows = 8
    attention.offload_core_attention, attention.checkpoint_core_attention = True, not moved
    *others, gate = attention.get_query_key_value_tensors(torch.randn(4, 1, 16))
    assert all(mine is theirs for mine, theirs in zip(others, views, strict=False)) and torch.equal(gate, views[3])
    assert (gate.untyped_storage().data_ptr() == views[0].untyped_storage().data_ptr()) is not moved


def test_values_from_other_ranks_keep_only_their_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context.tensor_parallel, "all_to_all", lambda group, x: x)
    one_rank = mock.Mock(size=lambda: 1)
    value = context.sequence_for_heads(*torch.randn(3, 6, 2, 8), one_rank)[2]
    assert value.untyped_storage().nbytes() == value.numel() * 4
