"""A run warns when the launcher gives it too little: cores, or time to save."""

from __future__ import annotations

import os

import pytest

from genlip_megatron.faults.stop import warn_if_killed_before_saving
from genlip_megatron.train.setup import warn_of_few_cores


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be taken away")
def test_few_cores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cores = os.sched_getaffinity(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        warn_of_few_cores()
        assert capsys.readouterr().err == "", "all cores of a small machine are not too few"
        os.sched_setaffinity(0, {min(cores)})
        warn_of_few_cores()
    finally:
        os.sched_setaffinity(0, cores)
    assert f"warning: 1 of {os.cpu_count()} CPU cores for {os.cpu_count()} ranks" in capsys.readouterr().err


def test_torchrun_kills_before_a_step_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    warn_if_killed_before_saving(83)  # without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    warn_if_killed_before_saving(20)
    assert capsys.readouterr().err == ""
    warn_if_killed_before_saving(83)
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT = 30: a step takes 83 s" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    warn_if_killed_before_saving(83)
    assert capsys.readouterr().err == ""
