"""The functions that ``train.fusion`` compiles trace without a graph break, give the same results, and need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.batch import Sample, pack_samples
from genlip_megatron.config import ModelConfig, RunConfig, override
from genlip_megatron.device import current_device
from genlip_megatron.model import genlip, specs
from genlip_megatron.model.attention import prepare_attention
from genlip_megatron.model.fusion import fusion_choice
from genlip_megatron.model.norm import LayerNorm
from genlip_megatron.testing.distributed import run_distributed
from tests.model.builds import build
from tests.train.test_no_waits import MODEL, batch

ROOT = Path(__file__).parent.parent.parent

# Traced and differentiated as compiled, without compiling kernels: a machine without a GPU may lack a compiler.
COMPARE = """
import sys, torch
from genlip_megatron.model import fusion
from genlip_megatron.model.rope import apply_rotary

device, dtype = (sys.argv[1], torch.bfloat16 if sys.argv[1] == "cuda" else torch.float32)
if device == "cpu":
    compile_function = torch.compile
    torch.compile = lambda function: compile_function(function, backend="aot_eager", fullgraph=True)

def results(function, arguments):
    leaves = [x.clone().requires_grad_() if x is not None else None for x in arguments]
    out = function(*leaves)
    (out.float() * torch.linspace(0, 1, out.numel(), device=device).view_as(out)).sum().backward()
    return [out, *(x.grad for x in leaves if x is not None)]

def draw(*shape):
    return torch.randn(shape, device=device).to(dtype)

vector, kept = draw(16), torch.ones(24, 1, 1, device=device)
cases = [(fusion.scaled_residual, (draw(24, 1, 16), bias, draw(24, 1, 16), scale, drop))
         for bias in (None, vector) for scale in (None, vector) for drop in (None, kept)]
cases += [(lambda *a, f=f: torch.cat(f(*a, 1e-6)), (*a, vector, vector)) for f, a in [
    (fusion.scaled_residual_and_norm, arguments) for _, arguments in cases]]
cases.append((apply_rotary, (draw(24, 2, 8), draw(24, 8), draw(24, 8))))
for function, arguments in cases:
    torch.manual_seed(0)
    for plain, fused in zip(results(function, arguments), results(fusion.compiled(function), arguments), strict=True):
        torch.testing.assert_close(fused, plain)

# After torch's limit of variants a function runs uncompiled.
if device == "cpu":
    torch.compile = lambda function, **options: compile_function(function, backend="aot_eager", **options)
torch._dynamo.reset()
fusion.compiled.cache_clear()
with torch._dynamo.config.patch(recompile_limit=1):
    for function, arguments in cases[:3]:
        torch.testing.assert_close(fusion.compiled(function)(*arguments), function(*arguments))
"""


def compare(device: str) -> None:
    # In a separate process, without the function mode of the CPU layer (megatron_patches).
    subprocess.run([sys.executable, "-c", COMPARE, device], cwd=ROOT, env=dict(os.environ), check=True, timeout=300)


@pytest.mark.slow
def test_compiled_functions_trace_without_a_graph_break() -> None:
    compare("cpu")


def test_attention_applies_rotary_positions_by_the_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return 0 * x

    monkeypatch.setattr("genlip_megatron.model.attention.packed.compiled", lambda _: turn)
    packed_batch = pack_samples([[Sample(None, 0, 0, [1, 2, 3])]], 4)
    model, q = ModelConfig(rope_sections=(1, 0, 0), hidden_size=4, num_attention_heads=2), torch.randn(4, 2, 2)
    for fusion in (False, True):
        packed = prepare_attention(packed_batch, model, torch.float32, "dense", torch.device("cpu"), fusion=fusion)
        # All scores are 0, so every token gets the mean of the tokens before it.
        mean = torch.allclose(packed.backend(q, q, q, 1.0)[2], q[:3].mean(0), atol=1e-6)
        assert mean == fusion


def test_a_norm_returns_a_handed_result_once_and_only_for_that_tensor() -> None:
    def norm_of(use: str) -> torch.Tensor:
        norm = LayerNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 4)
        x = torch.arange(4.0, device=current_device())
        norm.hand(x, torch.zeros_like(x))
        given = {"the same": x, "another": x.clone()}
        return norm(given[use]) if use in given else (norm(x), norm(x))[1]

    megatron_patches.install()
    made = torch.nn.functional.layer_norm(torch.arange(4.0, device=current_device()), (4,), eps=1e-6)
    assert torch.equal(norm_of("the same"), torch.zeros_like(made))
    assert torch.equal(norm_of("another"), made) and torch.equal(norm_of("the same, twice"), made)


def norms_and_gradients(fusion: str, recompute: str) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """(norms computed separately, loss, gradients) of two layers; nothing is compiled."""
    settings = {"train.fusion": fusion, "data.seq_length": 64, "parallel.recompute": recompute}
    genlip.fusion_choice = specs.fusion_choice = lambda _: False
    model, norm = build(override(RunConfig(model=MODEL), settings)), torch.nn.LayerNorm.forward
    with mock.patch.object(torch.nn.LayerNorm, "forward", autospec=True, side_effect=norm) as made:
        loss = model(batch(0).to(current_device()))
        loss.backward()
    return made.call_count, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("recompute", "norms"), [("none", (5, 2)), ("full", (9, 5))])
def test_norms_are_computed_with_the_branches_they_follow(recompute: str, norms: tuple[int, int]) -> None:
    """Two layers have two norms each, the head has one. The first layer's first norm and the head's stay separate. With
    recomputation each layer's first norm does too, and runs twice."""
    (plain,) = run_distributed(1, norms_and_gradients, "none", recompute)
    (fused,) = run_distributed(1, norms_and_gradients, "norms", recompute)
    assert (plain[0], fused[0]) == norms
    assert torch.equal(plain[1], fused[1]) and plain[2].keys() == fused[2].keys()
    for name, gradient in plain[2].items():
        torch.testing.assert_close(fused[2][name], gradient, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_kernels_equal_the_plain_operations() -> None:
    compare("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_compiled() -> None:
    assert not fusion_choice("auto") and not fusion_choice("none")
    for setting in ("compile", "norms"):
        with pytest.raises(ValueError, match=f"train.fusion = {setting}: needs a CUDA device.*Use auto or none"):
            fusion_choice(setting)
    with pytest.raises(ValueError, match="train.fusion = 'jit': expected one of auto, none, compile, norms"):
        override(RunConfig(), {"train.fusion": "jit"})
