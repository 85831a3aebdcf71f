"""Errors that all ranks find are printed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from genlip_megatron.faults.exits import first_of_machine


def test_an_error_before_process_groups_is_printed_by_one_rank_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        printed.append((first_of_machine("an error"), first_of_machine(f"an error of rank {rank}")))
    assert printed == [(True, True), (False, True), (False, True)]
