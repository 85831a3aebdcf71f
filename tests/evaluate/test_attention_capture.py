"""evaluate/attention_capture.py: what it measures of a model equals maps that the model itself computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from genlip_megatron.evaluate import attention_capture
from genlip_megatron.evaluate.attention_capture import KEY_GROUPS, Recorder, Tokens
from tests.hf.models import hf_model, images, random_weights, tiny

IMAGE, PROMPT, GENERATED = 12, 5, 8


def expected_mass(maps: Tensor, tokens: Tokens) -> Tensor:
    """float64 [3, 6] of full maps [H, S, S]."""
    mean = maps.double().mean(dim=0)
    ends = torch.tensor([0, tokens.prefix, tokens.image, tokens.prompt, tokens.generated]).cumsum(0).tolist()
    prefix, image, prompt, generated = (slice(*ends[i : i + 2]) for i in range(4))
    keys = (slice(0, 1), prefix, image, slice(ends[2], min(ends[2] + 2, ends[3])), prompt, generated)
    return torch.stack([torch.stack([mean[q, k].sum(dim=1).mean() for k in keys]) for q in (image, prompt, generated)])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Replaces torch's attention by a softmax over all pairs, and keeps its maps [H, queries, keys]."""
    maps = []

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        maps.append(scores.softmax(dim=-1)[0])
        return maps[-1] @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return maps


def sequence(model: Any) -> dict[str, Any]:
    (pixels,) = images((3, 4))
    ids = torch.randint(0, 512, (1, PROMPT + GENERATED), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels[None], "use_cache": False}


def recorder(model: Any, **settings: Any) -> Recorder:
    return Recorder(model, model.visual.layers, image=IMAGE, prompt=PROMPT, generated=GENERATED, **settings)


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@torch.no_grad()
def test_genlip_equals_eager_maps(gate: str, eager: list[Tensor]) -> None:
    config = tiny(attention_output_gate=gate)
    model = hf_model("GenLIPForCausalLM", config, random_weights(config))
    inputs = sequence(model)
    plain = model(**inputs, output_hidden_states=True)
    eager.clear()
    with recorder(model, block=7, maps=(2,)) as found:
        measured = model(**inputs)
    assert torch.equal(measured.logits, plain.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    tokens = Tokens(0, IMAGE, PROMPT, GENERATED)
    assert found.tokens == tokens and len(found.layers) == 2
    for number, layer in enumerate(found.layers):
        image, text = eager[2 * number : 2 * number + 2]
        full = torch.cat((nn.functional.pad(image, (0, PROMPT + GENERATED)), text), dim=1)
        assert full.std() > 0.02, "the attention should not be uniform"
        torch.testing.assert_close(layer.mass, expected_mass(full, tokens), atol=1e-5, rtol=0)
        groups = [KEY_GROUPS.index(name) for name in ("image", "prompt", "generated")]
        torch.testing.assert_close(layer.mass[:, groups].sum(dim=1), torch.ones(3).double(), atol=1e-5, rtol=0)
        assert not layer.mass[0, groups[1:]].any(), "the image does not see text"
        if number == 1:
            torch.testing.assert_close(layer.map, full.mean(dim=0), atol=1e-5, rtol=0)
        states = plain.hidden_states[number + 1]
        assert layer.largest_image == pytest.approx(float(states[:IMAGE].abs().max()))
        assert layer.largest_text == pytest.approx(float(states[IMAGE:].abs().max()))
        if gate != "none":
            attention = model.visual.layers[number].self_attn
            x = model.visual.layers[number].layer_norm1(plain.hidden_states[number])
            gate = (x @ attention.q_proj.weight[48:].T + attention.q_proj.bias[48:]).sigmoid()
            assert layer.gate == pytest.approx(float(gate.mean()), abs=1e-5)
            assert layer.closed == pytest.approx(float((gate < 0.05).float().mean()), abs=1e-5)
        else:
            assert layer.gate is None and layer.closed is None
    assert found.layers[0].map is None and found.norms is not None and found.norms.sum() == IMAGE


@torch.no_grad()
def test_a_large_first_key_draws_all_attention() -> None:
    """Queries and the first key point along the channel that rotary embedding turns least."""
    config = tiny()
    model = hf_model("GenLIPForCausalLM", config, random_weights(config))
    channel = torch.arange(48) % 12 == 5
    for layer in model.visual.layers:
        layer.self_attn.q_proj.weight[:48] = 0
        layer.self_attn.q_proj.bias[:48] = 10.0 * channel

        def scale_up(_: nn.Module, __: Any, key: Tensor) -> Tensor:
            return torch.cat((100.0 * channel[None], key[1:]))

        layer.self_attn.k_proj.register_forward_hook(scale_up)
    with recorder(model) as found:
        model(**sequence(model))
    for layer in found.layers:
        assert layer.mass[:, KEY_GROUPS.index("first")].min() > 0.999


@torch.no_grad()
def test_a_language_model_equals_its_eager_maps() -> None:
    """Qwen3 has fewer heads of keys than of queries, and norms both before the rotary embedding."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
    )
    model = Qwen3ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, PROMPT + GENERATED))
    with Recorder(model, model.model.layers, image=0, prompt=PROMPT, generated=GENERATED, block=4) as found:
        plain = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True)
    torch.testing.assert_close(plain, output.logits, atol=1e-4, rtol=0)
    assert len(found.layers) == 2
    for layer, maps in zip(found.layers, output.attentions, strict=True):
        expected = expected_mass(maps[0], Tokens(0, 0, PROMPT, GENERATED))
        torch.testing.assert_close(layer.mass, expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["clip", "dinov2_with_registers"])
@torch.no_grad()
def test_a_vision_encoder_equals_its_eager_maps(family: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"image_size": 64, "patch_size": 16}
    if family == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **sizes))
        prefix, blocks = 1, next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **sizes))
        prefix, blocks = 5, next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for weights in model.parameters():
        weights.mul_(20 if weights.dim() == 2 else 1)
    model.eval()
    (pixels,) = images((4, 4))
    with Recorder(model, blocks, image=16) as found:
        model(pixels[None])
    model.set_attn_implementation("eager")
    maps = model(pixels[None], output_attentions=True).attentions
    tokens = Tokens(prefix, 16)
    assert found.tokens == tokens and len(found.layers) == len(maps) == 2
    for layer, each in zip(found.layers, maps, strict=True):
        torch.testing.assert_close(layer.mass, expected_mass(each[0], tokens), atol=1e-5, rtol=0, equal_nan=True)
        assert layer.cosine is not None and layer.gate is None and layer.largest_text is None


def test_masks_that_do_not_show_the_first_keys_are_refused() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert attention_capture._visible(6, causal[None, None], True).tolist() == [1, 2, 3, 4, 5, 6]
    added = torch.zeros(6, 6).masked_fill(~causal, -torch.inf)
    assert attention_capture._visible(6, added[None, None], True).tolist() == [1, 2, 3, 4, 5, 6]
    assert attention_capture._visible(6, torch.ones(1, 1, 1, 6, dtype=torch.bool), False).tolist() == [6] * 6
    with pytest.raises(ValueError, match="sliding window"):
        attention_capture._visible(6, causal.triu(-2)[None, None], True)
