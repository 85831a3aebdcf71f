"""Values that are freed after use and recomputed for the backward pass. ``tests/train/test_parity.py`` shows that
training stays bit-identical, ``tests/test_estimate.py`` how much memory it saves."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from genlip_megatron.config import RunConfig
from genlip_megatron.model.recompute import discard, recomputable
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from tests.model.builds import build
from tests.te_stand_ins import stand_ins


def _counted_norm() -> mock.Mock:
    return mock.Mock(side_effect=lambda x: F.layer_norm(x, x.shape[-1:]))


def test_value_is_freed_until_the_backward_pass_and_its_inputs_released_after_it() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    F.linear(F.layer_norm(x, (8,)), weight).square().sum().backward()
    expected = (x.grad, weight.grad)
    x.grad = weight.grad = None
    norm = _counted_norm()
    held = weakref.ref(norm)
    normed = recomputable(norm, x)
    product = F.linear(normed, weight)
    discard(normed, product)
    assert normed.untyped_storage().size() == 0 and norm.call_count == 1
    loss = product.square().sum()
    loss.backward()
    assert norm.call_count == 2
    assert expected[0] is not None and expected[1] is not None and x.grad is not None and weight.grad is not None
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])
    # The loss still holds the graph, which must not hold the function.
    del norm, normed, product
    gc.collect()
    assert held() is None and loss.grad_fn is not None


def test_a_second_backward_pass_is_an_error() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    normed = recomputable(_counted_norm(), x)
    product = normed * 2
    discard(normed, product)
    product.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--recompute-modules supports one backward pass"):
        product.sum().backward()


def test_values_that_are_not_recomputable_or_need_no_gradient_stay() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    plain = F.layer_norm(x, (8,))
    discard(plain, plain * 2)
    assert plain.untyped_storage().size()
    with torch.no_grad():
        norm = _counted_norm()
        held = weakref.ref(norm)
        normed = recomputable(norm, x)
        discard(normed, normed * 2)
    assert normed.untyped_storage().size()
    del norm
    gc.collect()
    assert held() is None, "a value without a gradient keeps its function alive"


def _keeping(config: RunConfig) -> list[set[str]]:
    """For each layer, the linears that save their original input and not an FP8 copy of it."""
    with stand_ins():
        model = build(config)
    return [
        {name for name, linear in layer.named_modules() if getattr(linear, "save_original_input", False)}
        for layer in model.decoder.layers
    ]


@pytest.mark.parametrize(
    ("modules", "linears"),
    [
        ("core_attn,mlp", set()),
        ("layernorm", {"self_attention.linear_qkv", "mlp.linear_fc1"}),
        ("mlp_act,output_gate", {"self_attention.linear_proj", "mlp.linear_fc2"}),
    ],
)
def test_fp8_linears_save_the_input_that_is_recomputed(modules: str, linears: set[str], demo_data: Path) -> None:
    flags = {"train__fp8": "hybrid", "train__fp8_recipe": "current", "train__transformer_impl": "transformer_engine"}
    recompute = {"parallel__recompute": "selective", "parallel__recompute_modules": modules}
    config = tiny_config(demo_data, **{"train__precision": "bf16", "data__seq_length": 512}, **flags, **recompute)
    (kept,) = run_distributed(1, _keeping, config)
    assert kept == [linears] * config.model.num_layers
