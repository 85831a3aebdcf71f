"""Greedy generation gives the authors' tokens, on one process and on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.batch import Sample
from genlip_megatron.config import RunConfig
from genlip_megatron.infer.generate import generate
from genlip_megatron.model.genlip import build_model
from genlip_megatron.model.specs import transformer_config
from genlip_megatron.model.weights import fill_weights
from genlip_megatron.parallel import groups
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import golden_run, load_golden
from genlip_megatron.testing.runs import build_run, layout, tiny_config


def run_generate(path: str, flags: dict[str, Any]) -> list[int]:
    model, golden = load_golden(Path(path))
    run = golden_run(model, 96, **flags)
    groups.initialize(run)
    chunks = build_model(run, transformer_config(run))
    for chunk in chunks:
        fill_weights(chunk, lambda name: golden[f"weights/{name}"])
    _, rows, columns = golden["generation/grid"][0].tolist()
    prompt = golden["generation/prompt_ids"][0, rows * columns :].tolist()
    request = Sample(golden["generation/pixel_values"].flatten(1), rows, columns, prompt)
    return generate(chunks, [request], stop_ids=(), max_new_tokens=len(golden["generation/tokens"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "TP2", "CP2", "TP2xCP2", "TP2xPP3"])
def test_greedy_tokens_equal_the_authors(golden_file: Path, name: str) -> None:
    _, golden = load_golden(golden_file)
    world_size, flags = layout(name)
    for tokens in run_distributed(world_size, run_generate, str(golden_file), flags):
        assert tokens == golden["generation/tokens"].tolist()


def captions_of_a_new_model(config: RunConfig) -> list[list[int]]:
    groups.initialize(config)
    run = build_run(config)
    generator = torch.Generator().manual_seed(3)
    requests = [
        Sample(torch.randint(0, 256, (rows * 3, 768), generator=generator, dtype=torch.uint8), rows, 3, [5, 6])
        for rows in (2, 4, 3)
    ]
    return generate(run.model, requests, stop_ids=(), max_new_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [("TP2xPP2", {}), ("PP2xVPP2", {}), ("CP2xDP2", {"parallel__fsdp": True})])
def test_several_requests_on_wrapped_models(name: str, flags: dict[str, Any]) -> None:
    expected = run_distributed(1, captions_of_a_new_model, tiny_config(Path("unused")))[0]
    world_size, sizes = layout(name)
    for captions in run_distributed(world_size, captions_of_a_new_model, tiny_config(Path("unused"), **sizes, **flags)):
        assert captions == expected
