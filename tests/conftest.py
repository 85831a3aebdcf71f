"""Options and fixtures of the test suite."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.testing.processes import Zygote
from genlip_megatron.testing.runs import make_data

pytest_plugins = ["tests.fault_table"]

if "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any code asks for a device
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network, and huggingface_hub tries for 20 s
megatron_patches.install()
# On tensors this small, more threads only wait for each other and keep cores busy. Processes of tests inherit this.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir``: check against another folder of golden files. ``--gpu``: tests see the machine's GPUs."""
    parser.addoption("--golden-dir", default=str(Path(__file__).parent / "golden"), help="folder of golden tensors")
    parser.addoption(
        "--gpu", action="store_true", help="let tests see GPUs; which are meant for it: docs/install-gpu.md"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with a ``golden_file`` argument on every golden file of the folder."""
    if "golden_file" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden-dir")).glob("*.safetensors"))
        if not files:
            raise pytest.UsageError(f"--golden-dir {metafunc.config.getoption('--golden-dir')}: no .safetensors file")
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set with its tokenizer and index."""
    folder = tmp_path_factory.mktemp("demo")
    make_data(folder)
    return folder


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The parent process of the fault tests' runs."""
    zygote = Zygote(tmp_path_factory.mktemp("ranks"))
    yield zygote
    zygote.close()
