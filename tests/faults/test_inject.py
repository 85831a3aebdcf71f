"""Injected faults happen only on request, at the requested place, and once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlip_megatron.config.checks import check
from genlip_megatron.faults.inject import InjectedError, Injector, flip_bit
from genlip_megatron.testing.runs import tiny_config


@pytest.mark.parametrize(
    ("fault", "flags", "message"),
    [
        (
            "kill@7:0",
            {"faults__allow_fault_injection": False},
            "kill@7:0: breaks the run on purpose and needs faults.allow_fault_injection. Add --allow-fault-injection. "
            "Allowed kinds: kill",
        ),
        ("kil@7:0", {}, "kil@7:0: unknown kind 'kil'. Did you mean 'kill'? Allowed: kill, stop"),
        ("kill@7", {}, "kill@7: not kind@step:rank with a step from 1 on. Use for example kill@7:0."),
        ("kill@0:0", {}, "kill@0:0: not kind@step:rank with a step from 1 on"),
        ("kill.@7:0", {}, "kill.@7:0: not kind@step:rank"),
        ("nan-loss.save@7:0", {}, "nan-loss.save@7:0: a place (step, validation, save) may follow one of kill, stop"),
        ("kill.lunch@7:0", {}, "kill.lunch@7:0: a place (step, validation, save)"),
        ("kill@7:4", {}, "can never happen. Use ranks 0 to 3 of 4 processes"),
        ("kill@10:3", {"train__train_iters": 9}, "can never happen. Use steps 1 to train.train_iters = 9"),
        ("kill.save@7:0", {"checkpoint__save": ""}, "can never happen without checkpoint.save. Add --save"),
        ("full-disk@7:0", {"checkpoint__save": ""}, "can never happen without checkpoint.save. Add --save"),
    ],
)
def test_invalid_faults_are_refused(fault: str, flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    drill = {"faults__inject_fault": (fault,), "faults__allow_fault_injection": True, "checkpoint__save": "run"}
    with pytest.raises(ValueError) as error:
        check(tiny_config(tmp_path, **{"train__train_iters": 20} | drill | flags), world_size=4)
    assert str(error.value).startswith(f"faults.inject_fault = {fault}: ") and message in str(error.value)


def test_rolling_back_needs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on_spike = rollback.*--save"):
        check(tiny_config(tmp_path, faults__on_spike="rollback"))


def test_a_fault_happens_in_its_step_on_its_rank() -> None:
    mine, other = (Injector(("raise@2:1", "nan-loss@3:1"), rank) for rank in (1, 0))
    mine.at("step", 1)
    with pytest.raises(InjectedError):
        mine.at("step", 2)
    mine.at("save", 2)
    mine.at("step", 3)
    assert mine.fires("nan-loss", 3) and mine.fires("nan-loss", 3) and not mine.fires("nan-loss", 4)
    other.at("step", 2)
    assert not other.fires("nan-loss", 3)


def test_a_fault_does_not_happen_again_after_a_rollback() -> None:
    injector = Injector(("spike@3:0", "spike@5:0"), 0)
    injector.at("step", 3)
    assert injector.fires("spike", 3)
    injector.at("step", 2)
    injector.at("step", 3)
    assert not injector.fires("spike", 3) and injector.fires("spike", 5)


def test_a_restarted_run_has_no_faults(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Injector(("raise@2:0",), 0).at("step", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_one_bit_is_flipped(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
    flip_bit([weight])
    assert (weight != 1).sum() == 1 and weight[0, 0].item() == pytest.approx(1, abs=0.01)
