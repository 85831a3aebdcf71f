"""FP8 scales are part of a checkpoint: a resumed run equals the uninterrupted one; runs without FP8 ignore them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from genlip_megatron.checkpoint import loading, manifest, parts, paths
from genlip_megatron.checkpoint.reshard import reshard
from genlip_megatron.checkpoint.write import HostCopies
from genlip_megatron.config import RunConfig
from genlip_megatron.convert.megatron_source import MegatronSource
from genlip_megatron.model.fp8_state import fp8_state, sharded_fp8_state
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import build_run, layout, run_steps, tiny_config
from genlip_megatron.train import resume
from genlip_megatron.train.setup import set_up
from genlip_megatron.train.step import train_step
from tests import te_stand_ins as engine
from tests.te_stand_ins import stand_ins

DELAYED: dict[str, Any] = {
    "train__transformer_impl": "transformer_engine", "train__precision": "bf16", "train__fp8": "hybrid",
    "model__ffn_hidden_size": 64,
}  # fmt: skip
BF16 = {**DELAYED, "train__fp8": "none"}


def state_of(run: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's scales and histories, named by the layer in the whole model."""
    layers = [layer for chunk in run.model for layer in unwrap(chunk).decoder.layers]
    return {f"{layer.layer_number}.{name}": x.clone() for layer in layers for name, x in fp8_state(layer)}


def trained(config: RunConfig, steps: int, history: int = 8) -> dict[str, Any]:
    """Train to a step and save: losses, log lines about FP8, its state at the start, after each step and at the end."""
    said: list[str] = []
    with stand_ins(), mock.patch.object(engine, "HISTORY", history), mock.patch.object(resume, "log", said.append):
        run = set_up(config)
        assert run.train_loader is not None
        batches, losses, states, begun = iter(run.train_loader), [], [], state_of(run)
        while run.iteration < steps:
            losses.append(train_step(run, batches).loss)
            states.append(state_of(run))
        assert resume.save(run, last=True)
        run.train_loader.close()
        return {
            "losses": losses,
            "begun": begun,
            "states": states,
            "ended": state_of(run),
            "said": [line for line in said if "FP8" in line],
        }


def together(results: list[dict[str, Any]], when: str) -> dict[str, torch.Tensor]:
    """The state of all layers; ranks with the same layer must have the same state."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        for name, tensor in result[when].items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), name
    return whole


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) == 4 * 4 * 4  # layers, linears, tensors
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, demo_data: Path, tmp_path: Path) -> None:
    world_size, flags = layout(name)
    flags |= DELAYED
    whole = run_distributed(world_size, trained, tiny_config(demo_data, **flags), 4)
    config = tiny_config(demo_data, **flags, checkpoint__save=str(tmp_path / "run"))
    half = run_distributed(world_size, trained, config, 2)
    rest = run_distributed(world_size, trained, config, 4)
    assert half[0]["losses"] + rest[0]["losses"] == whole[0]["losses"]
    assert_same(together(rest, "begun"), together(half, "ended"))
    for one, other in zip(rest, whole, strict=True):
        # A history's first row is local to the rank until a save.
        assert_same({k: x[1:] if x.dim() > 1 else x for k, x in one["ended"].items()},
                    {k: x[1:] if x.dim() > 1 else x for k, x in other["ended"].items()})  # fmt: skip
    assert not any(result["said"] for result in (*half, *rest))


@pytest.fixture(scope="module")
def saved(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of step 2 with scales, and the scales."""
    root = tmp_path_factory.mktemp("saved") / "run"
    results = run_distributed(
        2, trained, tiny_config(demo_data, **layout("TP2")[1], **DELAYED, checkpoint__save=str(root)), 2
    )
    return paths.step_folder(root, 2), together(results, "ended")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "PP2xVPP2", "CP2"])
def test_another_layout_continues_with_the_scales(
    name: str, saved: tuple[Path, dict[str, torch.Tensor]], demo_data: Path
) -> None:
    world_size, flags = layout(name)
    config = tiny_config(demo_data, **flags, **DELAYED, checkpoint__load=str(saved[0]))
    results = run_distributed(world_size, trained, config, 3)
    assert_same(together(results, "begun"), saved[1])


@pytest.mark.slow
def test_scales_that_do_not_fit_are_reset_and_logged(
    saved: tuple[Path, dict[str, torch.Tensor]], demo_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(demo_data, **DELAYED, checkpoint__load=str(saved[0]))
    longer = run_distributed(1, trained, config, 3, 12)[0]
    histories = {name for name in saved[1] if "amax_history" in name}
    assert all(not longer["begun"][name].any() for name in histories)
    assert all(torch.equal(longer["begun"][name], saved[1][name]) for name in saved[1].keys() - histories)
    assert ["lacks FP8 scales, which start new: decoder.layers.mlp.linear_fc1.fp8.amax_history_bwd and 7 more"
            in line for line in longer["said"]] == [True]  # fmt: skip
    root = str(tmp_path / "run")
    run_distributed(1, trained, tiny_config(demo_data, **BF16, checkpoint__save=root), 1)
    reset = run_distributed(1, trained, tiny_config(demo_data, **DELAYED, checkpoint__save=root), 2)[0]
    assert all((tensor == (0.0 if name in histories else 1.0)).all() for name, tensor in reset["begun"].items())
    assert len(reset["said"]) == 1 and "fp8.amax_history_bwd and 15 more" in reset["said"][0]


def test_scales_are_ignored_by_runs_without_fp8(
    saved: tuple[Path, dict[str, torch.Tensor]], demo_data: Path, tmp_path: Path
) -> None:
    place = saved[0]
    load = {"checkpoint__load": str(place)}
    for flags in (BF16, {**DELAYED, "train__fp8_recipe": "current"}):
        result = run_distributed(1, trained, tiny_config(demo_data, **flags, **load), 3)[0]
        assert (len(result["losses"]), result["begun"], result["said"]) == (1, {}, [])
    local = tiny_config(demo_data, **{**BF16, "train__transformer_impl": "local"}, **load)
    assert len(run_distributed(1, run_steps, local, 3)[0]["losses"]) == 1
    names = set(MegatronSource(place, manifest.read(place), local.model).dtypes)
    assert names and not any("fp8" in name for name in names)
    with pytest.raises(ValueError, match="another order of parameters"):
        reshard(place, "dp_reshardable", tmp_path / "other", build_run)


def changed_before_it_is_copied(config: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the state when an asynchronous save begins, the state that is loaded from it); training changes it meanwhile."""
    copy = HostCopies.copy

    def later(self: HostCopies, planned: Any) -> None:
        for _, tensor in fp8_state(unwrap(run.model[0])):
            tensor.add_(1.0)
        copy(self, planned)

    with stand_ins(), mock.patch.object(HostCopies, "copy", later):
        run = set_up(config)
        assert run.train_loader is not None
        train_step(run, iter(run.train_loader))
        before = state_of(run)
        assert resume.save(run) and resume.finish_saves(run)
        assert not any(torch.equal(before[name], tensor) for name, tensor in state_of(run).items())
        resume.load(run)
        run.train_loader.close()
        return before, state_of(run)


def test_an_asynchronous_save_holds_the_scales_of_its_step(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, **DELAYED, checkpoint__save=str(tmp_path / "run"))
    before, after = run_distributed(1, changed_before_it_is_copied, config)[0]
    assert_same(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["transient-nan", "nan-grad"])
def test_a_bad_step_does_not_change_the_scales(fault: str, demo_data: Path) -> None:
    flags = {**DELAYED, "faults__allow_fault_injection": True, "faults__inject_fault": [f"{fault}@3:0"]}
    whole, bad = (run_distributed(1, trained, tiny_config(demo_data, **f), 3)[0]["states"] for f in (DELAYED, flags))
    assert not torch.equal(whole[1]["1.self_attention.linear_qkv.fp8.amax_history_fwd"],
                           whole[2]["1.self_attention.linear_qkv.fp8.amax_history_fwd"])  # fmt: skip
    # A rerun step equals the undisturbed one; a skipped step leaves the scales of the step before.
    assert_same(bad[2], whole[2] if fault == "transient-nan" else whole[1])


@pytest.mark.parametrize("ends_in_bf16", [True, False])
def test_scales_that_are_not_saved_are_logged(ends_in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.Module()
    state = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(1, 3))
    attention.fp8_meta = {"scaling_fwd": state}
    model = torch.nn.Sequential(attention)
    model.config = SimpleNamespace(first_last_layers_bf16=ends_in_bf16)
    monkeypatch.setattr(parts, "unwrap", lambda chunk: chunk)
    monkeypatch.setattr(parts, "weights_of", lambda model: {})
    monkeypatch.setattr(loading.torch_metadata, "read", lambda place: None)
    said: list[str] = []
    loading._describe_weights(Path("run"), [model], said.append)
    assert ["train.first_last_layers_bf16" in line for line in said] == [True] * ends_in_bf16
    if ends_in_bf16:
        assert sharded_fp8_state(model, "layer.", ()) == {}
