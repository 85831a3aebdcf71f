"""FP8 attention: where it can run and why not; stacked images attend by the dense rule."""

from __future__ import annotations

import contextlib
import importlib.util
import types
from typing import Any

import pytest
import torch

from genlip_megatron.config import RunConfig, override
from genlip_megatron.model.attention import FP8_BACKEND, core, fp8, te
from genlip_megatron.model.attention.two_calls import reference_kernel
from genlip_megatron.model.te_support import Fp8, Gpu, choose_fp8, fp8_head_dim
from tests.model.test_attention import Cut, Samples, attend, forward, pack

HOPPER, BLACKWELL, AMPERE = Gpu((9, 0), 91300), Gpu((10, 0), 91500), Gpu((8, 0), 91300)


class Kernel:
    """Plain attention over images of one length; records the shapes of its inputs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.shapes = capability, []  # type: ignore[var-annotated]

    def head_dim(self, channels: int) -> int:
        return fp8_head_dim(channels, self.capability)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self.shapes.append(tuple(q.shape))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8.Fp8Images, "kernel", staticmethod(reference_kernel))
    monkeypatch.setattr(te, "in_bf16", contextlib.nullcontext)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize(
    ("samples", "images", "length"),
    [
        ([(9, 5)] * 11, 16, 9),
        ([(9, 5), (16, 3), (9, 0), (4, 2)], 8, 9),
        ([(0, 7), (0, 2)], 8, 16),
        ([], 8, 16),
    ],
    ids=["fixed", "mixed", "text-only", "nothing"],
)
def test_stacked_images_attend_by_the_rule(
    samples: Samples, images: int, length: int, capability: tuple[int, int]
) -> None:
    batch, kernel = pack(samples, 3), Kernel(capability)
    (backend,), inputs, out = forward(batch, FP8_BACKEND, 72, image_kernel=kernel)
    out.backward(inputs[3])
    for ours, oracle in zip((out, *(x.grad for x in inputs[:3])), attend(batch, "dense", 72), strict=True):
        torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=0)
    # One FP8 call for each micro-batch, with few shapes. Stacked images take only this call.
    assert len(backend.calls[0].queries.slots) == sum(image for image, _ in samples if image != length)
    assert kernel.shapes == [(images, length, 2, 80 if capability == (10, 0) else 128)]


def test_images_cut_by_context_parallelism_take_the_bf16_call() -> None:
    batch = pack([(9, 5), (9, 1), (9, 4), (9, 6)], 0)
    backends, _, out = forward(batch, FP8_BACKEND, ranks=4, image_kernel=Kernel((9, 0)))
    torch.testing.assert_close(out, forward(batch, "dense")[2], atol=2e-5, rtol=0)
    assert [backend.images for backend in backends] == [1, 1, 0, 0]


def config(**flags: Any) -> RunConfig:
    flags = {"fp8": "hybrid", "transformer_impl": "transformer_engine", "fp8_attention": True, **flags}
    data = {"data.image_mode": flags.pop("image_mode", "fixed")}
    return override(RunConfig(), data | {f"train.{name}": value for name, value in flags.items()})


@pytest.mark.parametrize(
    ("flags", "gpu", "message"),
    [
        ({}, AMPERE, r"train\.fp8 = hybrid: needs compute capability 8\.9 or above .*not 8\.0"),
        ({}, Gpu(), "needs compute capability 8.9 or above .*and there is no GPU"),
        ({}, Gpu((8, 9), 91300), r"with delayed scaling needs compute capability 9\.0 or above, not 8\.9"),
        ({"fp8_recipe": "current"}, HOPPER, "current scaling .* 10.0 .*not 9.0; on Hopper use --fp8-recipe d"),
        ({"image_mode": "native"}, HOPPER, "images of data.image_mode = native differ in length"),
        ({}, Gpu((9, 0), 90600), r"needs cuDNN 9\.7 or above.*installed is 9\.6\.0"),
        ({}, Gpu((9, 0), 91000), "which has a bug"),
        ({"fp8_recipe": "current"}, Gpu((12, 0), 91500), "no kernel for compute capability 12.0"),
    ],
)
def test_parts_that_cannot_run_are_refused_with_the_reason_or_run_in_bf16(
    flags: dict[str, Any], gpu: Gpu, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_fp8(config(**flags), gpu)
    chosen = choose_fp8(config(**flags, fp8_fallback=True), gpu)
    assert (chosen.linears, chosen.images) == (gpu.capability >= (8, 9), False)
    assert len(chosen.notes) == 1 and chosen.notes[0].endswith("; it runs in BF16")


def test_supported_parts_run_in_fp8() -> None:
    assert choose_fp8(config(fp8="none", fp8_attention=False), AMPERE) == Fp8()
    assert choose_fp8(config(fp8_attention=False), HOPPER) == Fp8(True, False)
    for flags, gpu in (({}, HOPPER), ({}, BLACKWELL), ({"fp8_recipe": "current"}, BLACKWELL)):
        chosen = choose_fp8(config(**flags), gpu)
        assert chosen.linears and chosen.images
        assert "text queries attend in BF16" in chosen.notes[0]


@pytest.mark.parametrize(("tp", "cp", "exchange", "heads"), [(1, 1, None, 16), (2, 1, None, 8), (2, 4, "a2a", 2),
                                                          (2, 4, "all_gather", 8)])  # fmt: skip
def test_a_layers_kernel_takes_the_heads_that_a_rank_attends(
    tp: int, cp: int, exchange: str | None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "TransformerEngineImages", lambda *made: made)
    transformer = types.SimpleNamespace(num_attention_heads=16, kv_channels=64, fp8_dot_product_attention=True)
    groups = types.SimpleNamespace(tp=Cut(0, tp), cp=Cut(0, cp))
    layer = core.PrefixLMAttention(transformer, 1, None, "self", cp_comm_type=exchange, pg_collection=groups)
    assert layer.image_kernel == (heads, 64, 0.125)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device and Transformer Engine",
)
def test_fp8_kernel_is_near_the_rule() -> None:
    gpu, head_dim = torch.device("cuda"), 72
    recipe = "current" if torch.cuda.get_device_capability() >= (10, 0) else "delayed"
    try:
        choose_fp8(config(fp8_recipe=recipe))
    except ValueError as error:
        pytest.skip(str(error))
    import transformer_engine.pytorch as te_pytorch
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    scaling = (Float8CurrentScaling if recipe == "current" else DelayedScaling)(fp8_dpa=True)
    kernel = fp8.TransformerEngineImages(4, head_dim, head_dim**-0.5)
    q, k, v, grad = (torch.randn(8, 196, 4, head_dim, device=gpu, dtype=torch.bfloat16) for _ in range(4))
    padding = kernel.head_dim(head_dim) - head_dim
    results = []
    for attention in (kernel, Kernel((9, 0))):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        for _ in range(3):  # delayed scaling uses the scales of the previous pass
            for x in inputs:
                x.grad = None
            with te_pytorch.fp8_autocast(enabled=attention is kernel, fp8_recipe=scaling):
                padded = [torch.nn.functional.pad(x, (0, padding)) for x in inputs]
                out = attention(*padded, head_dim**-0.5)[..., :head_dim]
            out.backward(grad)
        results.append((out, *(x.grad for x in inputs)))
    for ours, oracle in zip(*results, strict=True):
        # E4M3 has 4 significant bits, E5M2 3: an error of an eighth of a value, which averages out over 196 keys.
        assert (ours - oracle).norm() < 0.1 * oracle.norm()
