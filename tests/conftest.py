"""Options and fixtures of the test suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlip_megatron import host

host.install()
torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--golden-dir``: check against another folder of golden files."""
    parser.addoption("--golden-dir", default=str(Path(__file__).parent / "golden"), help="folder of golden tensors")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``golden_file`` over every golden file of the folder."""
    if "golden_file" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden-dir")).glob("*.safetensors"))
        if not files:
            raise pytest.UsageError(f"--golden-dir {metafunc.config.getoption('--golden-dir')}: no .safetensors file")
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set with its tokenizer and index, made by the project's own tools."""
    folder = tmp_path_factory.mktemp("demo")
    root = Path(__file__).parent.parent

    def run(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=root, check=True, capture_output=True)

    run("tools/render_demo_data.py", "--output", str(folder), "--train-samples", "160", "--val-samples", "24")
    run("tools/train_tokenizer.py", str(folder / "train-*.tar"), "--output", str(folder / "tokenizer.model"))
    for split in ("train", "val"):
        run("tools/prepare_data.py", str(folder / f"{split}-*.tar"), "--tokenizer", str(folder / "tokenizer.model"))
    return folder
