"""The weights of a Megatron checkpoint of any layout, read from its files without a model or a process group.

Torch's distributed checkpoint stores a tensor as the pieces that ranks held, each a ``torch.save`` archive inside a
file. An archive stores values uncompressed, so a piece is a view into the mapped file.
"""

from __future__ import annotations

import io
import mmap
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from genlip_megatron.checkpoint import torch_metadata
from genlip_megatron.checkpoint.manifest import Manifest
from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.source import DTYPES, compare, listed
from genlip_megatron.model.state_dict import VOCABULARY, ModelParameter, is_fp8_state, model_parameters

_BESIDE_WEIGHTS = ("optimizer.", "random.")
_INTEGERS = {2: torch.int16, 4: torch.int32}
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name


class _Part(io.RawIOBase):
    """A part of a mapped file as a separate file object, without a copy."""

    def __init__(self, mapped: mmap.mmap, offset: int, length: int) -> None:
        self._view, self._at = memoryview(mapped)[offset : offset + length], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        values = self._view[self._at : self._at + len(target)]
        target[: len(values)] = values
        self._at += len(values)
        return len(values)


class MegatronSource:
    """The model weights of a checkpoint; see ``Source``. Optimizer state is not read.

    Args:
        place: a checkpoint whose files match its manifest.
        saved: the manifest.
        model: of the run that saved it.

    Raises:
        ValueError: the tensors are not the model's, or the metadata is not safe to load.
    """

    def __init__(self, place: Path, saved: Manifest, model: ModelConfig) -> None:
        index = torch_metadata.read(place)
        self.model, self._place = model, place
        self._stored: dict[str, TensorStorageMetadata] = {
            key: facts
            for key, facts in index.state_dict_metadata.items()
            if isinstance(facts, TensorStorageMetadata) and not (key.startswith(_BESIDE_WEIGHTS) or is_fp8_state(key))
        }
        self._pieces = {(key.fqn, tuple(key.offset or ())): info for key, info in index.storage_data.items()}
        if strange := {info.relative_path for info in self._pieces.values()} - set(saved.files):
            raise ValueError(f"{place}: its metadata names files that its manifest does not list: {listed(strange)}")
        self.dtypes: dict[str, torch.dtype] = {}
        needed, found = {}, {}
        for parameter in model_parameters(model):
            layers = () if parameter.layer is None else (model.num_layers,)
            needed[parameter.key] = (*layers, *parameter.stored)
            if (facts := self._stored.get(parameter.key)) is not None:
                rows = facts.size[:1]
                if parameter.layout is VOCABULARY and rows[0] > model.vocab_size:
                    rows = torch.Size([model.vocab_size])  # the rest is padding of tensor parallelism
                found[parameter.key] = (*rows, *facts.size[1:])
                self.dtypes |= dict.fromkeys(parameter.shapes, facts.properties.dtype)
        found |= {key: tuple(facts.size) for key, facts in self._stored.items() if key not in found}
        compare(str(place), found, needed, "Does its config.yaml belong to these weights?")
        if wrong := [name for name, dtype in self.dtypes.items() if dtype not in DTYPES.values()]:
            raise ValueError(f"{place}: {listed(wrong)}: expected one of {', '.join(DTYPES)}")
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, parameter: ModelParameter) -> list[Tensor]:
        """The canonical tensors of a parameter; views into the mapped file where one piece holds all of it."""
        return parameter.layout.join([self._whole(parameter)], self.model)

    def _whole(self, parameter: ModelParameter) -> Tensor:
        """The parameter without tensor parallelism."""
        key, layer = parameter.key, parameter.layer
        facts = self._stored[key]
        shape = facts.size
        pieces = facts.chunks
        if layer is not None:
            shape = shape[1:]
            pieces = [piece for piece in pieces if piece.offsets[0] <= layer < piece.offsets[0] + piece.sizes[0]]
        if sum(_numel(piece, layer) for piece in pieces) != shape.numel():
            raise ValueError(f"{self._place}: the stored pieces of {key} do not cover it. Use another checkpoint")
        dtype = facts.properties.dtype
        whole = None
        for piece in pieces:
            values, offsets = self._piece(key, piece, dtype), piece.offsets
            if layer is not None:
                values, offsets = values[layer - offsets[0]], offsets[1:]
            if values.shape == shape and values.flags.aligned:
                return torch.from_numpy(values).view(dtype)
            if whole is None:
                whole = torch.empty(shape, dtype=dtype)
            place = tuple(slice(o, o + s) for o, s in zip(offsets, values.shape, strict=True))
            whole.view(_INTEGERS[dtype.itemsize]).numpy()[place] = values
        assert whole is not None
        return whole

    def _piece(self, key: str, piece: ChunkStorageMetadata, dtype: torch.dtype) -> np.ndarray:
        """The values of one piece as integers of the same size, a view into the mapped file. The view may be unaligned:
        numpy copies from such a view, torch does not."""
        info = self._pieces[key, tuple(piece.offsets)]
        mapped = self._mapped(info.relative_path)
        archive = io.BufferedReader(_Part(mapped, info.offset, info.length))
        with zipfile.ZipFile(archive) as members:
            stored = [m for m in members.infolist() if m.filename.endswith("/data/0")]
            orders = [members.read(m).decode() for m in members.infolist() if m.filename.endswith("/byteorder")]
        if [m.compress_type for m in stored] != [zipfile.ZIP_STORED] or set(orders) - {sys.byteorder}:
            raise ValueError(f"{self._place / info.relative_path}: {key} is compressed or has another byte order")
        (member,) = stored
        lengths = info.offset + member.header_offset + 26
        archive.seek(0)
        shape = torch.load(archive, map_location="meta", weights_only=True)
        if tuple(shape.shape) != tuple(piece.sizes):
            raise ValueError(
                f"{self._place / info.relative_path}: {key} is {list(shape.shape)}, expected {list(piece.sizes)}"
            )
        begin = info.offset + member.header_offset + _LOCAL_HEADER
        begin += sum(struct.unpack("<HH", mapped[lengths : lengths + 4]))
        size = dtype.itemsize
        return np.ndarray(
            tuple(shape.shape),
            f"i{size}",
            mapped,
            begin + shape.storage_offset() * size,
            tuple(step * size for step in shape.stride()),
        )

    def _mapped(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with open(self._place / name, "rb") as file:
                # Private and writable, since torch needs writable memory; it stays unchanged.
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]


def _numel(piece: ChunkStorageMetadata, layer: int | None) -> int:
    return piece.sizes.numel() if layer is None else piece.sizes[1:].numel()
