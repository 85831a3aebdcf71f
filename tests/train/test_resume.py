"""A run continues from a checkpoint as if it had never stopped, and wrong settings are found before it starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.checkpoint import manifest
from genlip_megatron.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE
from genlip_megatron.checkpoint.paths import step_folder
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import failing_set_up, layout, run_steps, tiny_config, weights

STEPS = 6


def train(name: str, steps: int, data: Path, *last: bool, **flags: Any) -> list[dict[str, Any]]:
    """The results of ``run_steps`` on a layout such as "TP2" or "fsdp DP2"."""
    world_size, sizes = layout(name.removeprefix("fsdp "))
    config = tiny_config(data, parallel__fsdp=name.startswith("fsdp"), **sizes, **flags)
    return run_distributed(world_size, run_steps, config, steps, *last)


@pytest.fixture(scope="module")
def whole(demo_data: Path) -> Callable[..., list[dict[str, Any]]]:
    """An uninterrupted run on a layout in a precision."""

    @functools.cache
    def run(name: str, precision: str = "fp32") -> list[dict[str, Any]]:
        return train(name, STEPS, demo_data, train__precision=precision)

    return run


@pytest.fixture(scope="module")
def half(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of half the run on two tensor-parallel ranks."""
    folder = str(tmp_path_factory.mktemp("half"))
    train("TP2", STEPS // 2, demo_data, checkpoint__save=folder)
    return folder


def test_loss_falls(whole: Callable) -> None:
    losses = whole("1")[0]["losses"]
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("DP2", DP_RESHARDABLE),
        ("DP2", FULLY_RESHARDABLE),
        pytest.param("TP2", DP_RESHARDABLE, marks=pytest.mark.long),
        pytest.param("TP2", FULLY_RESHARDABLE, marks=pytest.mark.long),
        ("TP2xPP2", DP_RESHARDABLE),
        ("TP2xPP2", FULLY_RESHARDABLE),
        ("fsdp DP2", FULLY_RESHARDABLE),
    ],
)
def test_resume_is_bit_for_bit_on_the_same_layout(
    name: str, kind: str, whole: Callable, demo_data: Path, tmp_path: Path
) -> None:
    undisturbed, folder = whole(name), str(tmp_path / "run")
    flags = {"checkpoint__save": folder, "checkpoint__load": folder}
    first = train(name, STEPS // 2, demo_data, kind == FULLY_RESHARDABLE, **flags)
    assert manifest.read(step_folder(folder, STEPS // 2)).kind == kind
    second = train(name, STEPS, demo_data, **flags)
    assert first[0]["losses"] + second[0]["losses"] == undisturbed[0]["losses"]
    assert first[0]["keys"] + second[0]["keys"] == undisturbed[0]["keys"]
    expected = weights(undisturbed)
    for tensor, weight in weights(second).items():
        assert torch.equal(weight, expected[tensor]), tensor


@pytest.mark.parametrize("name", ["DP2", "PP2"])
@pytest.mark.slow
def test_resume_on_another_layout_continues_the_curve(name: str, whole: Callable, half: str, demo_data: Path) -> None:
    results, reference = train(name, STEPS, demo_data, checkpoint__load=half), whole("1")[0]
    assert results[0]["losses"] == pytest.approx(reference["losses"][STEPS // 2 :], rel=1e-5)
    # Together the ranks take the packs that one process takes after the trained ones.
    packs = {tuple(keys) for result in results for keys in result["keys"]}
    expected = [tuple(keys) for keys in reference["keys"]]
    assert packs == set(expected[len(expected) // 2 :])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "loading", "precision"),
    [
        ("fsdp DP2", "1", "bf16"),
        ("1", "fsdp DP2", "fp32"),
        ("fsdp TP2xDP2", "fsdp DP2", "fp32"),
        ("fsdp DP2", "TP2xDP2", "fp32"),
    ],
)
def test_checkpoints_do_not_depend_on_fsdp(
    saving: str, loading: str, precision: str, whole: Callable, demo_data: Path, tmp_path: Path
) -> None:
    folder, half = str(tmp_path / "run"), {"train__precision": precision}
    train(saving, STEPS // 2, demo_data, checkpoint__save=folder, **half)
    continued = train(loading, STEPS, demo_data, checkpoint__load=folder, **half)[0]["losses"]
    assert continued == pytest.approx(whole(saving, precision)[0]["losses"][STEPS // 2 :], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data__train_data": "/nowhere/*.tar"}, "data.train_data: '/nowhere/*.tar' matches no .tar file"),
        ({"data__tokenizer": "/nowhere.model"}, "no such file. Give a tokenizer.json, such as the paper's"),
        ({"model__vocab_size": 64}, "do not fit model.vocab_size = 64"),
        ({"data__seq_length": 40}, "data.seq_length = 40: an image of"),
        ({"data__prompt": "Describe."}, "was made with another prompt than data.prompt = 'Describe.'"),
        ({"checkpoint__load": "/nowhere"}, "checkpoint.load = /nowhere: no folder iter_NNNNNNN in it"),
        ({"data__seq_length": 2**26}, "no layout on 1 ranks fits; use more or larger GPUs"),
        ({"train__attention_backend": "varlen"}, "train.attention_backend = varlen: needs a CUDA device"),
        ({"parallel__offload_modules": "core_attn"}, "Megatron-Core offloads with Transformer Engine"),
        ({"train__global_batch_size": 3, "train__micro_batch_size": 2}, "The nearest multiple is 4"),
        ({"parallel__tensor_model_parallel_size": 2}, "world size = 1: not a multiple of tp * pp * cp = 2"),
    ],
)
def test_bad_input_gets_one_clear_error(flags: dict[str, Any], message: str, demo_data: Path) -> None:
    assert message in run_distributed(1, failing_set_up, tiny_config(demo_data, **flags))[0]
