"""Promises about the code as a whole: imports go one way, and Megatron-Core's pin is deliberate."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlip_megatron import megatron_patches
from genlip_megatron.convert.folder import SOURCES

PACKAGE = Path(megatron_patches.__file__).parent
FORBIDDEN = {
    "data": {"model", "train", "checkpoint", "infer", "evaluate"},
    "model": {"data", "train", "checkpoint", "infer", "evaluate"},
    "parallel": {"train", "infer", "evaluate"},
    "checkpoint": {"train", "infer", "evaluate", "convert"},
    "faults": {"data", "model", "checkpoint", "train", "convert", "infer", "evaluate", "batch"},
    "convert": {"train", "data", "infer", "evaluate"},
    "config": {"data", "model", "train", "checkpoint", "parallel"},
    "batch": {"data", "model", "train", "checkpoint", "parallel"},
}
# Files that are copied into exported folders: they need these libraries, Python's own and each other alone.
SELF_CONTAINED, LIBRARIES = "hf", {"torch", "transformers", "numpy", "PIL"}


def test_imports_go_one_way() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genlip_megatron."):
                target = node.module.split(".")[1]
                if target in FORBIDDEN.get(part, set()):
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {node.module}")
    assert not wrong, wrong


def test_exported_files_are_self_contained() -> None:
    allowed = LIBRARIES | sys.stdlib_module_names
    wrong, files = [], list((PACKAGE / SELF_CONTAINED).glob("*.py"))
    assert len(files) == 1 + len(SOURCES) and {file.name for file in files} >= set(SOURCES)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                known = node.level == 1 and f"{node.module}.py" in SOURCES
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                known = all(str(module).split(".")[0] in allowed for module in modules)
            else:
                continue
            if not known:
                wrong.append(f"{file.name} line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, wrong


def test_megatron_core_is_the_version_whose_cuda_calls_are_mapped() -> None:
    assert importlib.metadata.version("megatron-core") == megatron_patches.SUPPORTED_MEGATRON_CORE, (
        "the pin moved: run the golden, layout and resume tests on the new version, map new torch.cuda calls in "
        "genlip_megatron/megatron_patches.py, read Megatron-Core's changes to TransformerLayer, SelfAttention, "
        "DistributedOptimizer and dist_checkpointing, then change SUPPORTED_MEGATRON_CORE and setup.py together"
    )


def test_another_version_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_patches, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.99\.0 without CUDA.*pip install megatron-core==0\.16\.1"):
        megatron_patches.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer is off on a machine with a GPU")
def test_cuda_calls_mean_the_cpu() -> None:
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).cuda().to("cuda").device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    torch.cuda.Stream().wait_stream(torch.cuda.current_stream())
    torch.cuda.manual_seed(7)
    first = torch.rand(3)
    torch.cuda.manual_seed(7)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize(
    "module",
    [
        "batch",
        "data.manifest",
        "data.pack",
        "data.plan",
        "data.resize",
        "data.read_assignment",
        "model.cross_entropy",
        "model.mask",
        "model.rope",
        "faults.inject",
        "faults.replicas",
        "faults.spikes",
        "evaluate.attributes",
        "evaluate.scenes",
        "train.breakdown",
        "config.checks",
        "train.step",
    ],
)
def test_worked_examples_in_docstrings_hold(module: str) -> None:
    loaded = importlib.import_module(f"genlip_megatron.{module}")
    failed, tried = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_settings_are_checked_without_torch() -> None:
    """So that ``--help``, a mistake, and a worker of a launch that is over take no seconds."""
    code = "import sys, genlip_megatron.config.command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_collectives_of_one_rank_keep_their_meaning() -> None:
    def double(output: torch.Tensor, source: torch.Tensor, group: object = None, async_op: bool = False) -> str:
        return "communicated"

    call = megatron_patches._within_one_rank(double)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    source, output = torch.arange(4.0), torch.zeros(2, 2)
    work = call(output, source, group=group, async_op=True)
    assert work.wait() and torch.equal(output.flatten(), source)
    assert call(source, source, group=group) is None
