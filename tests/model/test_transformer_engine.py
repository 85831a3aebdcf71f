"""Transformer Engine's layers are the same model as local ones: weights, training, checkpoints; FP8 runs in the right
layers. On a CPU stand-ins replace Transformer Engine; only a GPU tests its kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from genlip_megatron.checkpoint.reshard import reshard
from genlip_megatron.config import RunConfig
from genlip_megatron.model.specs import transformer_config
from genlip_megatron.model.state_dict import find
from genlip_megatron.model.te_support import fused_norms, why_no_engine
from genlip_megatron.model.weights import fill_initial_weights
from genlip_megatron.parallel.groups import prepare_user_buffers
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.parity import BFLOAT16, parity_config, parity_run, problems
from genlip_megatron.testing.runs import build_run, failing_set_up, layout, run_steps, tiny_config, weights
from tests.model.builds import build
from tests.te_stand_ins import run_engine_steps, stand_ins

ROOT = Path(__file__).parent.parent.parent
STEPS = 4
FUSED: dict[str, Any] = {"train__transformer_impl": "transformer_engine"}


@pytest.mark.parametrize(
    ("version", "code", "gpu", "reason"),
    [
        ("2.8.1", "", True, "2.8.1 is not a version that Megatron-Core 0.16.1 supports: 2.9 and below 2.12"),
        ("2.10.0", "", True, None),
        ("2.10.0", "", False, "Transformer Engine 2.10.0 needs a GPU, and torch sees none"),
        ("2.10.0", "raise ImportError('undefined symbol: x')", True, "does not load: undefined symbol: x (docs/ins"),
        ("2.10.0", "raise OSError('libcudnn.so: no')", True, "does not load: libcudnn.so: no (docs/install-gpu.md"),
    ],
)
def test_why_transformer_engine_cannot_run(
    version: str, code: str, gpu: bool, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # so that monkeypatch restores the old entry
        del sys.modules[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = why_no_engine()
    assert found is None if reason is None else reason in (found or "")


def test_on_a_cpu_megatron_core_uses_no_kernels_of_transformer_engine(tmp_path: Path) -> None:
    optimizers = tmp_path / "transformer_engine" / "pytorch" / "optimizers"
    optimizers.mkdir(parents=True)
    for folder in (optimizers, *list(optimizers.parents)[:2]):
        (folder / "__init__.py").touch()
    names = "multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = None"
    (optimizers / "__init__.py").write_text(names)
    code = """
from genlip_megatron import megatron_patches
megatron_patches.install()
from megatron.core import utils
from megatron.core.optimizer import clip_grads
assert clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale, clip_grads.multi_tensor_scale_impl
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2"])
def test_fused_norms_train_as_separate_norms(name: str, demo_data: Path) -> None:
    world_size, flags = layout(name)
    separate = run_distributed(world_size, run_steps, tiny_config(demo_data, **flags), STEPS)
    fused = run_distributed(world_size, run_engine_steps, tiny_config(demo_data, **flags, **FUSED), STEPS)
    assert fused[0]["losses"] == pytest.approx(separate[0]["losses"], rel=1e-6)
    assert fused[0]["norms"] == pytest.approx(separate[0]["norms"], rel=1e-5)
    assert [name for name, _ in fused[0]["seen"]] == ["qkv", "proj", "fc1", "fc2"] * 4
    expected = weights(separate)
    for tensor, weight in weights(fused).items():
        # Adam turns the rounding of tiny gradients into whole steps; each of the four steps moves a weight by up to lr.
        torch.testing.assert_close(weight, expected[tensor], atol=2e-5, rtol=0, msg=tensor)


def parity_run_with_stand_ins(config: RunConfig) -> dict[str, Any]:
    with stand_ins():
        return parity_run(config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_every_gradient_equals_that_of_the_local_layers(stage: str, demo_data: Path) -> None:
    local = run_distributed(1, parity_run, parity_config(demo_data, stage))
    fused = run_distributed(1, parity_run_with_stand_ins, parity_config(demo_data, stage, **FUSED))
    assert problems(fused, local[0]) == [] and len(local[0]["gradients"]) > 40


@pytest.mark.slow
@pytest.mark.parametrize("begin", ["local", "transformer_engine"])
def test_a_checkpoint_of_one_kind_of_layers_continues_in_the_other(begin: str, demo_data: Path, tmp_path: Path) -> None:
    runs = (run_steps, {}), (run_engine_steps, FUSED)
    first, then = runs if begin == "local" else runs[::-1]
    folder = str(tmp_path / "run")
    whole = run_distributed(1, run_steps, tiny_config(demo_data), STEPS)[0]
    run_distributed(1, first[0], tiny_config(demo_data, checkpoint__save=folder, **first[1]), STEPS // 2)
    rest = run_distributed(1, then[0], tiny_config(demo_data, checkpoint__save=folder, **then[1]), STEPS)[0]
    assert rest["losses"] == pytest.approx(whole["losses"][STEPS // 2 :], rel=1e-5)


def test_dp_reshardable_state_is_not_read_in_another_order(demo_data: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run_distributed(1, run_engine_steps, tiny_config(demo_data, checkpoint__save=folder, **FUSED), 1, False)
    message = run_distributed(1, failing_set_up, tiny_config(demo_data, checkpoint__save=folder))[0]
    assert re.search("norms within the linears .*: True in the checkpoint, False here", message)
    with pytest.raises(ValueError, match="another order of parameters, which this tool cannot convert"):
        reshard(Path(folder) / "iter_0000001", "fully_reshardable", tmp_path / "other", build_run)


def fp8_config(data: Path, **flags: Any) -> RunConfig:
    return tiny_config(data, train__precision="bf16", **FUSED, **{"train__fp8": "hybrid", **flags})


_ENDS = {"train__first_last_layers_bf16": True, "train__num_layers_at_end_in_bf16": 2}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train__fp8": "none"}, [False] * 4),
        ({}, [True] * 4),
        ({"train__fp8_recipe": "current"}, [True] * 4),
        ({"train__fp8_recipe": "current", **_ENDS}, [False, True, False, False]),
    ],
)
def test_every_layer_is_in_fp8_unless_first_and_last_layers_stay_in_bf16(
    flags: dict[str, Any], expected: list[bool], demo_data: Path
) -> None:
    (result,) = run_distributed(1, run_engine_steps, fp8_config(demo_data, **flags), 1)
    for i, in_fp8 in enumerate(expected):
        assert {seen for _, seen in result["seen"][4 * i : 4 * i + 4]} == {in_fp8}, "one format for a layer's linears"
    assert len(result["seen"]) == 16


def test_settings_reach_megatron_core(demo_data: Path) -> None:
    with stand_ins():
        current = transformer_config(
            fp8_config(demo_data, train__fp8_recipe="current", train__fp8_primary_weights=True)
        )
        assert (current.fp8, current.fp8_recipe, current.fp8_param) == ("hybrid", "tensorwise", True)
        flags = {"data__image_mode": "fixed", "train__fp8_attention": True, "parallel__cp_comm_type": "all_gather"}
        delayed = transformer_config(fp8_config(demo_data, **flags))
        assert (delayed.fp8_recipe, delayed.fp8_dot_product_attention) == ("delayed", True)
        assert delayed.cp_comm_type == "all_gather"


@pytest.mark.parametrize(("ends", "modes"), [(False, ["fp8"]), (True, ["fp8", "none"])])
def test_user_buffers_match_the_formats_of_the_layers(
    ends: bool, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    base = types.SimpleNamespace(
        UserBufferQuantizationMode=types.SimpleNamespace(NONE="none", FP8="fp8"),
        initialize_ub=lambda **settings: asked.update(settings),
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)  # type: ignore[arg-type]
    transformer = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=2, fp8="hybrid", fp8_recipe="tensorwise",
        first_last_layers_bf16=ends, tensor_model_parallel_size=2, params_dtype=torch.bfloat16,
    )  # fmt: skip
    prepare_user_buffers(transformer, 512)
    assert not asked, "no buffers without tp_comm_overlap"
    transformer.tp_comm_overlap = True
    prepare_user_buffers(transformer, 512)
    assert (asked["shape"], asked["tp_size"], asked["quantization_modes"]) == ([512, 64], 2, modes)


def test_a_recomputed_or_offloaded_norm_is_not_fused(demo_data: Path) -> None:
    flags = {"parallel__recompute": "selective", "parallel__recompute_modules": ["layernorm"]}
    assert fused_norms(tiny_config(demo_data, **FUSED))
    assert not fused_norms(tiny_config(demo_data, **FUSED, **flags))
    assert not fused_norms(tiny_config(demo_data, **FUSED, parallel__offload_modules=["mlp_norm"]))


def test_names_of_fused_norms() -> None:
    for fused, norm in (("self_attention.linear_qkv", "layer_norm1"), ("mlp.linear_fc1", "layer_norm2")):
        for kind in ("weight", "bias"):
            names, entry = find(f"decoder.layers.1.{fused}.layer_norm_{kind}", 2)
            assert names == (f"visual.layers.3.{norm}.{kind}",) and entry.layout.dim is None


def _exact_values(config: RunConfig) -> bool:
    model = build(config)
    weight = model.decoder.layers[0].mlp.linear_fc2.weight
    weight._high_precision_init_val = torch.zeros(weight.shape)
    fill_initial_weights(model, config)
    return bool((weight._high_precision_init_val.bfloat16() == weight).all() and weight.any())


def test_fp8_weights_keep_their_exact_initial_values(demo_data: Path) -> None:
    assert run_distributed(1, _exact_values, tiny_config(demo_data, train__precision="bf16")) == [True]


def _state(config: RunConfig) -> tuple[list[str], str]:
    """(pickled entries of a checkpoint, the error for a state dict that lacks a weight)."""
    with stand_ins():
        model = build(config)
        layers = [name for name in model.sharded_state_dict() if ".layers." in name]
        state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
        model.load_state_dict(state)
        del state["decoder.layers.0.mlp.linear_fc2.weight"]
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            return [name for name in layers if name.endswith("_extra_state")], str(error)
    return [], "nothing"


def test_checkpoints_hold_no_pickled_scales_and_all_weights(demo_data: Path) -> None:
    (pickled, error), *_ = run_distributed(1, _state, tiny_config(demo_data, **FUSED))
    assert not pickled
    assert error == "the model and its state differ in decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device and Transformer Engine",
)
def test_fifty_steps_in_bf16_follow_the_local_layers(demo_data: Path) -> None:
    flags: dict[str, Any] = {
        "model__hidden_size": 256, "model__ffn_hidden_size": 704, "model__rope_sections": [12, 10, 10],
        "train__precision": "bf16", "train__train_iters": 50, "data__decoder": "pillow",
    }  # fmt: skip
    expected, found = (parity_run(parity_config(demo_data, **flags, **more)) for more in ({}, FUSED))
    assert problems([found], expected, BFLOAT16) == []
    local = run_steps(tiny_config(demo_data, **flags), 50)
    fused = run_steps(tiny_config(demo_data, **flags, **FUSED), 50)
    # The first step's gradients differ by rounding to bfloat16, 1/256; training amplifies that in later steps.
    assert fused["losses"][0] == pytest.approx(local["losses"][0], rel=1e-3)
    assert fused["norms"][0] == pytest.approx(local["norms"][0], rel=1e-2)
    assert fused["losses"] == pytest.approx(local["losses"], rel=2e-2)
