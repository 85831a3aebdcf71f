"""Safetensors files: read through a memory map, written one tensor at a time.

The format: 8 bytes with the length of a JSON header (little endian), the header, the tensors' bytes. The header gives
each tensor's dtype, shape and offset after the header. The library's own writer needs all tensors in memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.source import compare, listed, to_dtype
from genlip_megatron.model.state_dict import ModelParameter, canonical_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK = 2**22  # values cast and written at a time


@dataclass(frozen=True)
class Facts:
    """Shape, dtype and file of a tensor in a folder."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """(weight files of a folder, tensor -> file name from its index, or None without an index)."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give a folder with config.json and {SINGLE}")
    index, single = folder / INDEX, (folder / SINGLE).is_file()
    if single and index.is_file():
        raise ValueError(f"{folder}: both {SINGLE} and {INDEX} exist, each a whole model. Keep one of them")
    placed: dict[str, str] | None = None
    if single:
        names = [SINGLE]
    elif index.is_file():
        try:
            placed = dict(json.loads(index.read_text())["weight_map"])
            names = sorted(set(placed.values()))
        except (OSError, ValueError, KeyError, TypeError):
            names = []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{index}: damaged. Expected JSON with a weight_map from tensors to file names")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{index}: files are missing: {listed(missing)}. Download them")
    elif pickles := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")):
        raise ValueError(
            f"{folder}: its weights are pickles ({listed(pickles)}), which can run code when loaded. Save them as "
            "safetensors"
        )
    else:
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} exists. Is it a Hugging Face folder?")
    if others := sorted({path.name for path in folder.glob("model*.safetensors")} - set(names)):
        raise ValueError(
            f"{folder}: {listed(others)} would be ignored beside {listed(names)}. Move or remove the files of another "
            "model"
        )
    return [folder / name for name in names], placed


def contents(folder: Path) -> dict[str, Facts]:
    """Every tensor in the safetensors files of a folder, by name. Reads only the headers.

    Raises:
        ValueError: no weights, a damaged file, or an index that disagrees with the files.
    """
    files, placed = _files(folder)
    found: dict[str, Facts] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if name in found:
                    raise ValueError(f"{name} is in both {found[name].file} and {file}. Keep one of them")
                part = tensors.get_slice(name)
                found[name] = Facts(tuple(part.get_shape()), part.get_dtype(), file)
    if placed is not None:
        wrong = [
            name
            for name in {**placed, **found}
            if name not in found or name not in placed or found[name].file.name != placed[name]
        ]
        if wrong:
            raise ValueError(f"{folder / INDEX}: disagrees with the files on {listed(wrong)}. Download them again")
    return found


def opened(file: Path) -> Any:
    """The safetensors library's reader of a file.

    Raises:
        ValueError: a damaged or unreadable file.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or cut off ({error}). Download or export it again") from None
    except OSError as error:
        raise ValueError(f"{file}: not readable ({error.strerror or error})") from None


def check_dtype(folder: Path, dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    """Check that every ``wanted`` tensor of a folder fits a dtype; reads only tensors that might not.

    Raises:
        ValueError: a value overflows the dtype.
    """
    if dtype != torch.float16:  # the other dtypes have float32's range
        return
    for name, fact in contents(folder).items():
        if wanted(name) and fact.dtype != _NAMES[dtype]:
            with opened(fact.file) as file:
                to_dtype(name, file.get_tensor(name), dtype)


class SafetensorsSource:
    """The weights of a folder in the released format, mapped into memory; see ``Source``.

    Raises:
        ValueError: a tensor is missing, unexpected, or has the wrong shape or dtype; or a file is damaged.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.model = model
        facts = contents(folder)
        if wrong := [f"{name} is {fact.dtype}" for name, fact in facts.items() if fact.dtype not in _BY_NAME]:
            raise ValueError(f"{folder}: {listed(wrong)}: expected {', '.join(_BY_NAME)}")
        shapes = {name: fact.shape for name, fact in facts.items()}
        compare(str(folder), shapes, canonical_shapes(model), "Does config.json belong to these weights?")
        self.dtypes = {name: _BY_NAME[fact.dtype] for name, fact in facts.items()}
        self._files = {name: fact.file for name, fact in facts.items()}

    def read(self, parameter: ModelParameter) -> list[Tensor]:
        """The canonical tensors of a parameter, views into the mapped files."""
        tensors = []
        for name in parameter.shapes:
            with opened(self._files[name]) as file:
                tensors.append(file.get_tensor(name))
        return tensors


@dataclass(frozen=True)
class Planned:
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """Writes safetensors files: first all headers, then the tensors in any order.

    Args:
        folder: an existing folder.
        tensors: name -> shape and dtype, in the order of the files.
        max_shard_size: bytes of tensors in one file; a larger tensor gets its own file. Several files get an index.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Planned], max_shard_size: int) -> None:
        self._tensors = tensors
        shards = list(_shards(tensors, max_shard_size))
        names = [SINGLE]
        if len(shards) > 1:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            index = {
                "metadata": {"total_size": sum(planned.nbytes for planned in tensors.values())},
                "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._places: dict[str, tuple[Path, int]] = {}
        for file, shard in zip(names, shards, strict=True):
            self._begin(folder / file, shard)

    def _begin(self, file: Path, names: Sequence[str]) -> None:
        """Write a file's header and reserve space for its tensors, widest dtype first so that all are aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end, places = 0, {}
        for name in sorted(names, key=lambda name: -self._tensors[name].dtype.itemsize):
            planned = self._tensors[name]
            places[name], end = end, end + planned.nbytes
            header[name] = {
                "dtype": _NAMES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [places[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            begin = out.tell()
            out.truncate(begin + end)
        self._places |= {name: (file, begin + offset) for name, offset in places.items()}

    @property
    def unwritten(self) -> list[str]:
        """Names of tensors that are still missing."""
        return list(self._places)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the planned shape, cast to the planned dtype a block at a time.

        Raises:
            ValueError: a value overflows the dtype.
        """
        planned = self._tensors[name]
        assert tuple(tensor.shape) == planned.shape, name
        file, offset = self._places.pop(name)
        with open(file, "r+b", buffering=0) as out:
            out.seek(offset)
            for block in tensor.reshape(-1).split(_BLOCK):
                left = to_dtype(name, block, planned.dtype).contiguous().view(torch.uint8).numpy().data
                while len(left):  # the system may write less
                    left = left[out.write(left) :]


def _shards(tensors: Mapping[str, Planned], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, planned in tensors.items():
        if shard and size + planned.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += planned.nbytes
    yield shard
