"""Fixtures of the launch tests: a cluster, and a copy of the checkout to submit from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from genlip_megatron.testing import CHECKOUT
from genlip_megatron.testing.runs import tiny_config
from tests.launch.lab import Lab, cluster, missing


@pytest.fixture(scope="package")
def lab() -> Iterator[Lab]:
    """Two nodes under a real SLURM."""
    if reason := missing():
        pytest.skip(reason)
    with cluster(2) as lab:
        yield lab


@pytest.fixture(scope="package")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a job needs of the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("genlip_megatron", "examples"):
        shutil.copytree(CHECKOUT / name, folder / name)
    shutil.copy(CHECKOUT / "pretrain_genlip.py", folder)
    return folder


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """The configuration of a tiny run, as a file."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(tiny_config(demo_data, data__num_workers=1, log__log_interval=1, log__eval_interval=0).to_yaml())
    return file
