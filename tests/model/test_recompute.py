"""Values that are freed after their use and made again for the backward pass; that training stays the same bit for bit
is in ``tests/train/test_parity.py``, what it saves in ``tests/test_estimate.py``."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.model.recompute import forget, keep_no_copies, remade


class _Norm:
    """A function that can be watched."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.layer_norm(x, x.shape[-1:])


def test_freed_until_the_backward_pass_and_let_go_after_it() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    F.linear(F.layer_norm(x, (8,)), weight).square().sum().backward()
    expected = (x.grad, weight.grad)
    x.grad = weight.grad = None
    norm = _Norm()
    held = weakref.ref(norm)
    normed = remade(norm, x)
    product = F.linear(normed, weight)
    forget(normed, product)
    assert normed.untyped_storage().size() == 0 and norm.calls == 1
    loss = product.square().sum()
    loss.backward()
    assert norm.calls == 2
    assert expected[0] is not None and expected[1] is not None and x.grad is not None and weight.grad is not None
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])
    # The loss still holds the graph, which must hold nothing of it.
    del norm, normed, product
    gc.collect()
    assert held() is None and loss.grad_fn is not None


def test_what_is_not_marked_or_needs_no_gradient_stays() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    plain = F.layer_norm(x, (8,))
    forget(plain, plain * 2)
    assert plain.untyped_storage().size()
    with torch.no_grad():
        normed = remade(_Norm(), x)
        forget(normed, normed * 2)
    assert normed.untyped_storage().size()


def test_linears_in_fp8_keep_the_input_that_is_made_again() -> None:
    names = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

    def told(modules: tuple[str, ...]) -> set[str]:
        linears = {name: SimpleNamespace(save_original_input=False) for name in names}
        keep_no_copies([SimpleNamespace(get_submodule=linears.__getitem__)], modules)  # type: ignore[list-item]
        return {name for name, linear in linears.items() if linear.save_original_input}

    assert told(("core_attn", "mlp")) == set()
    assert told(("layernorm",)) == {"self_attention.linear_qkv", "mlp.linear_fc1"}
    assert told(("mlp_act", "output_gate")) == {"self_attention.linear_proj", "mlp.linear_fc2"}
