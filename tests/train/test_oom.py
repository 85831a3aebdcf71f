"""Running out of memory in the first steps, or more processes than GPUs, ends a run with one helpful line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genlip_megatron.command import UserError
from genlip_megatron.config import RunConfig, from_dict, load_yaml, override
from genlip_megatron.parallel import groups
from genlip_megatron.train import loop
from genlip_megatron.train.oom import FIRST_STEPS, out_of_memory

ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free."
)


def recipe(**flags: Any) -> RunConfig:
    config = from_dict(load_yaml("so16_stage1"), "so16_stage1")
    return override(config, {name.replace("__", "."): value for name, value in flags.items()})


def test_the_line_names_the_estimate_and_three_settings_that_save() -> None:
    config = recipe(train__micro_batch_size=4, train__global_batch_size=64)
    text = out_of_memory(config, 8, ERROR)
    assert "\n" not in text
    assert "CUDA out of memory. Tried to allocate 2.00 GiB. The estimate was" in text
    assert text.count("saves about") == 3
    assert "--micro-batch-size 2" in text and "--recompute" in text


def test_settings_already_set_or_impossible_are_not_suggested() -> None:
    config = recipe(
        train__micro_batch_size=1, train__global_batch_size=8, parallel__recompute="full", parallel__fsdp=True
    )
    text = out_of_memory(config, 1, ERROR)
    assert "--micro-batch-size" not in text and "--recompute" not in text and "--fsdp" not in text
    assert "--tp" not in text, "there is one process"
    assert "more or larger GPUs" in text


@pytest.mark.parametrize(("steps", "error"), [(0, UserError), (FIRST_STEPS - 1, UserError), (FIRST_STEPS, type(ERROR))])
def test_running_out_of_memory_in_later_steps_is_a_crash(
    steps: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any, stop: Any) -> int:
        run.iteration += steps
        raise ERROR

    monkeypatch.setattr(loop, "set_up", lambda *_: SimpleNamespace(iteration=100, close=lambda: None))
    monkeypatch.setattr(loop, "train_steps", fail)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    with pytest.raises(error, match="out of memory"):
        loop.train(recipe())


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert groups.own_gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="started 4 processes .* shows 2 GPUs.*--nproc-per-node 2"):
        groups.own_gpu()


@pytest.mark.parametrize(
    ("graphs", "environment", "wanted"),
    [
        (False, {}, ["expandable_segments:True"]),
        (True, {}, ["expandable_segments:False"]),
        (False, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, []),
        (False, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, []),
    ],
)
def test_segments_grow_unless_the_environment_configures_the_allocator(
    graphs: bool, environment: dict[str, str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    groups.grow_segments(recipe(train__cuda_graph=graphs))
    assert told == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_allocations_use_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    groups.grow_segments(recipe(train__cuda_graph=False))
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    segments = [s for s in torch.cuda.memory_snapshot() if 0 <= held.data_ptr() - s["address"] < s["total_size"]]
    assert [segment["is_expandable"] for segment in segments] == [True]
