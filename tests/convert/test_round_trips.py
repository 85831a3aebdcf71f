"""A conversion keeps weights bit for bit, from and to every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.checkpoint import loading, manifest, paths
from genlip_megatron.config import RunConfig, override
from genlip_megatron.convert.conversion import export_weights, open_checkpoint, planned
from genlip_megatron.convert.hf_folder import hf_config
from genlip_megatron.convert.megatron_source import MegatronSource
from genlip_megatron.convert.megatron_target import precision_of, write_checkpoint
from genlip_megatron.convert.safetensors_file import SafetensorsSource
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import full_weights, layout, tiny_config, weights
from tests.convert.weights import (
    VARIANTS,
    differing,
    random_weights,
    read_released,
    read_source,
    run_of,
    write_released,
)


def to_megatron(released: Path, root: Path, config: RunConfig, dtype: torch.dtype | None = None) -> Path:
    source = SafetensorsSource(released, config.model)
    root.mkdir()
    config = override(config, {"train.precision": precision_of(source, dtype)})
    return write_checkpoint(root, source, config, dtype, "of a tokenizer")


def to_hf(checkpoint: Path, target: Path, dtype: torch.dtype | None = None, shard: int = 10**9) -> Path:
    _, _, source = open_checkpoint(checkpoint, print, lambda size: None)
    target.mkdir()
    export_weights(source, planned(source, dtype, False), target, shard)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_released_weights_come_back_bit_for_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = VARIANTS[variant]
    expected = random_weights(model, dtype)
    place = to_megatron(write_released(tmp_path / "released", expected), tmp_path / "run", run_of(model))
    assert manifest.problems(place, manifest.read(place)) == []
    # Small shards: the tensors of one parameter go to different files.
    assert differing(read_released(to_hf(place, tmp_path / "back", shard=5000)), expected) == []


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize("positions", ["mrope", "1d", "chunked"])
def test_every_model_computes_the_same_after_conversion(gate: str, positions: str, tmp_path: Path) -> None:
    from genlip_megatron.convert.verify import compare_models

    model = replace(VARIANTS["g16-release"], attention_output_gate=gate, positions=positions)
    folder = write_released(tmp_path / "released", random_weights(model))
    (folder / "config.json").write_text(json.dumps(hf_config(model, "float32")))
    place = to_megatron(folder, tmp_path / "run", run_of(model))
    found = compare_models(place, loading.read_config(place), folder)
    assert len(found) == 2 and all(difference.small for difference in found), found
    other = replace(model, positions="1d" if positions == "mrope" else "mrope")
    (folder / "config.json").write_text(json.dumps(hf_config(other, "float32")))
    assert not any(difference.small for difference in compare_models(place, loading.read_config(place), folder))


def loaded(config: RunConfig, place: Path) -> dict[str, Any]:
    """This stage's canonical weights, loaded from a checkpoint as a run loads them."""
    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.setup import build_run

    groups.initialize(config)
    if config.parallel.fsdp:
        run: Any = build_run(config)
    else:
        run = type("Run", (), {"model": build_model(config, transformer_config(config)), "config": config})
    loading.load_weights(place, list(run.model), print)
    return {"weights": full_weights(run)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2", "PP2", "TP2xPP2", "FSDP"])
def test_converted_weights_load_on_any_layout(name: str, tmp_path: Path) -> None:
    model = VARIANTS["g16-release"]
    expected = random_weights(model, torch.bfloat16)
    place = to_megatron(write_released(tmp_path / "released", expected), tmp_path / "run", run_of(model))
    processes, flags = (2, {"parallel__fsdp": True}) if name == "FSDP" else layout(name)
    config = override(run_of(model), {key.replace("__", "."): value for key, value in flags.items()})
    config = override(config, {"train.precision": "bf16"})
    assert differing(weights(run_distributed(processes, loaded, config, place)), expected) == []


def saved(config: RunConfig, last: bool) -> dict[str, Any]:
    """Save a run before its first step; returns this stage's weights."""
    from genlip_megatron.train.resume import finish_saves, save
    from genlip_megatron.train.setup import set_up

    run = set_up(config)
    assert save(run, last) and finish_saves(run)
    run.train_loader.close()
    return {"weights": full_weights(run)}


@pytest.mark.parametrize(
    ("name", "last", "flags"),
    [
        ("1", True, {}),
        ("TP2", False, {}),
        ("PP2xVPP2", True, {"train__precision": "bf16"}),
        ("DP2", False, {"parallel__fsdp": True, "train__precision": "bf16"}),
    ],
)
def test_checkpoints_of_any_layout_survive_export_and_import(
    name: str, last: bool, flags: dict[str, Any], demo_data: Path, tmp_path: Path
) -> None:
    """With both kinds of optimizer state; 511 rows of vocabulary are padded to 512 by tensor parallelism."""
    processes, sizes = layout(name)
    config = tiny_config(demo_data, checkpoint__save=str(tmp_path / "run"), data__num_workers=1, **sizes, **flags)
    expected = weights(run_distributed(processes, saved, config, last))
    exported = to_hf(tmp_path / "run", tmp_path / "exported")
    assert differing(read_released(exported), expected) == []
    place = to_megatron(exported, tmp_path / "again", config)
    again = MegatronSource(place, manifest.read(place), config.model)
    assert differing(read_source(again), expected) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dtype_rounds_each_value_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = VARIANTS["l16"]
    given = random_weights(model)
    place = to_megatron(write_released(tmp_path / "released", given), tmp_path / "run", run_of(model))
    expected = {name: tensor.to(dtype) for name, tensor in given.items()}
    assert differing(read_released(to_hf(place, tmp_path / "back", dtype)), expected) == []


def test_the_newest_good_checkpoint_of_a_run_is_exported(tmp_path: Path) -> None:
    model = VARIANTS["l16"]
    given = random_weights(model)
    root = tmp_path / "run"
    place = to_megatron(write_released(tmp_path / "released", given), root, run_of(model))
    damaged = paths.step_folder(root, 7)
    damaged.mkdir()
    for file in place.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / manifest.MANIFEST).write_bytes(replace(manifest.read(place), iteration=7).to_bytes())
    content = bytearray((damaged / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "__0_0.distcp").write_bytes(content)
    said: list[str] = []
    found, _, _ = open_checkpoint(root, said.append, lambda size: None)
    assert found == place and "iter_0000007" in said[0] and "skipping damaged checkpoints" in said[0]
