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
from genlip_megatron.convert.hf_folder import SOURCES

PACKAGE = Path(megatron_patches.__file__).parent
# Which room (a folder or a module of the package) may import which, lazily or not.
ROOMS = {
    "__init__": "",
    "atomic_write": "",
    "device": "",
    "hf": "",
    "log": "",
    "optional": "",
    "tokenizer": "",
    "command": "",
    "megatron_patches": "device",
    "config": "faults",
    "faults": "atomic_write log",
    "batch": "config device",
    "storage": "atomic_write",
    "outputs": "storage",
    "parallel": "config faults",
    "model": "batch config device parallel",
    "data": "__init__ atomic_write batch command config device hf outputs storage tokenizer",
    "checkpoint": "atomic_write config device log megatron_patches model outputs parallel",
    "convert": "batch checkpoint config hf megatron_patches model optional outputs parallel tokenizer",
    "estimate": "config model",
    "infer": "batch checkpoint config convert data device hf log megatron_patches model optional outputs parallel "
    "storage tokenizer",
    "train": "__init__ atomic_write batch checkpoint command config data device estimate faults infer log "
    "megatron_patches model parallel tokenizer",
    "encoders": "__init__ atomic_write convert hf infer log optional outputs",
    "evaluate": "atomic_write batch checkpoint command config convert data encoders hf infer log model optional "
    "outputs storage tokenizer",
    "integrations": "hf",
    "testing": "batch checkpoint config convert data device hf infer megatron_patches model parallel tokenizer train",
}
# Files that are copied into exported folders may import only these libraries, Python's own, and each other.
SELF_CONTAINED, LIBRARIES = "hf", {"torch", "transformers", "numpy", "PIL"}


def _modules() -> dict[str, Path]:
    """File of each module of the package, by its name within the package; "__init__" is the package itself."""
    modules = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)] = file
    return modules


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _imports(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, at its top or within functions, except imports for types."""
    found, waiting = set(), list[ast.AST]([ast.parse(file.read_text())])
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    while waiting:
        node = waiting.pop()
        if _is_for_types(node):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([PACKAGE.name, *package[: len(package) - node.level + 1]]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == PACKAGE.name:
                options = [".".join(parts[1:end]) or "__init__" for end in range(len(parts), 0, -1)]
                found.add(next(option for option in options if option in modules))
    return found - {name}


def test_rooms_import_only_what_the_table_allows() -> None:
    modules = _modules()
    rooms = {name: name.split(".")[0] for name in modules}
    wrong = [
        f"{name} imports {target}"
        for name, file in modules.items()
        for target in _imports(name, file, modules)
        if rooms[target] not in (rooms[name], *ROOMS[rooms[name]].split())
    ]
    assert not wrong, wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = _modules()
    left = {name: _imports(name, file, modules) for name, file in modules.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    circles = {name: sorted(targets & left.keys()) for name, targets in left.items()}
    assert not circles, f"in a circle, or leading to one: {circles}"


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


@pytest.mark.parametrize("module", sorted(name for name, file in _modules().items() if ">>> " in file.read_text()))
def test_worked_examples_in_docstrings_hold(module: str) -> None:
    loaded = importlib.import_module(f"genlip_megatron.{module}")
    failed, tried = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_settings_are_checked_without_torch() -> None:
    """Importing torch takes seconds; ``--help``, user errors and workers of an ended launch must be faster."""
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
