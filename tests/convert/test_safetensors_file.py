"""The safetensors library reads what the writer writes, in files of the given size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from genlip_megatron.convert.safetensors_file import INDEX, Planned, SafetensorsWriter, contents
from tests.convert.weights import differing, read_released

# Lengths for which a wider dtype after a narrower one would be unaligned.
TENSORS = {
    "a": torch.randn(3, dtype=torch.float32).half(),
    "b": torch.randn(5, 2),
    "c": torch.randn(7).bfloat16(),
    "d": torch.randn(2, 3, 4),
    "e": torch.randn(1),
}


def write(folder: Path, limit: int) -> None:
    writer = SafetensorsWriter(folder, {n: Planned(tuple(t.shape), t.dtype) for n, t in TENSORS.items()}, limit)
    for name in reversed(TENSORS):  # in any order
        writer.write(name, TENSORS[name])


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (60, 3), (1, 5)])
def test_the_library_reads_the_files(limit: int, files: int, tmp_path: Path) -> None:
    write(tmp_path, limit)
    assert differing(read_released(tmp_path), TENSORS) == []
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) == files
    if files == 1:
        assert names == ["model.safetensors"] and not (tmp_path / INDEX).exists()
        return
    assert names[0] == f"model-00001-of-{files:05}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"] == {name: f.file.name for name, f in contents(tmp_path).items()}
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit


def test_the_format_is_that_of_torch_and_values_are_aligned(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0
