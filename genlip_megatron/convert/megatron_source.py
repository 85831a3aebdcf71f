"""The weights of a Megatron checkpoint of any layout, read from its files without a model or a process group.

Torch's distributed checkpoint stores a tensor as the pieces that ranks held, each a ``torch.save`` archive inside a
file. ``torch.save`` stores values uncompressed, so a piece is a view into the mapped file.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from genlip_megatron.checkpoint import torch_metadata
from genlip_megatron.checkpoint.manifest import Manifest
from genlip_megatron.config import ModelConfig
from genlip_megatron.convert.source import DTYPES, compare, listed
from genlip_megatron.model.state_dict import VOCABULARY, ModelParameter, is_fp8_state, model_parameters

_BESIDE_WEIGHTS = ("optimizer.", "random.")
_INTEGERS = {2: torch.int16, 4: torch.int32}


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
        self._maps: dict[Path, mmap.mmap] = {}

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
        sizes = [piece.sizes if layer is None else piece.sizes[1:] for piece in pieces]
        if sum(size.numel() for size in sizes) != shape.numel():
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
        path = self._place / info.relative_path
        with open(path, "rb") as file:
            if path not in self._maps:
                # Private and writable, since torch needs writable memory; it stays unchanged.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            view: Any = _create_file_view(file, info.offset, info.length)
            shape = torch.load(view, map_location="meta", weights_only=True)
            view.seek(0)
            archive: Any = torch._C.PyTorchFileReader(view)
            begin = info.offset + archive.get_record_offset("data/0")
            order = archive.get_record("byteorder").decode() if archive.has_record("byteorder") else sys.byteorder
        if order != sys.byteorder:
            raise ValueError(f"{path}: {key} has another byte order")
        if tuple(shape.shape) != tuple(piece.sizes):
            raise ValueError(f"{path}: {key} is {list(shape.shape)}, expected {list(piece.sizes)}")
        size = dtype.itemsize
        strides = tuple(step * size for step in shape.stride())
        begin += shape.storage_offset() * size
        return np.ndarray(tuple(shape.shape), f"i{size}", self._maps[path], begin, strides)
