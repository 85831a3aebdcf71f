"""Write a Megatron checkpoint of weights only, one parameter at a time, in one process.

It has the format of a run's own checkpoints, so every reader loads it on any layout. It lacks a run's state: optimizer,
schedule, data, random states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from genlip_megatron.checkpoint import manifest, parts, paths
from genlip_megatron.checkpoint.manifest import COMMON, CONFIG, WEIGHTS_ONLY, Manifest
from genlip_megatron.checkpoint.write import HashingFile
from genlip_megatron.config import RunConfig
from genlip_megatron.convert.source import Source, listed, to_dtype
from genlip_megatron.model.state_dict import ModelParameter, model_parameters
from genlip_megatron.outputs import first_other

# No run of this project trained the weights.
ITERATION = 0
_WEIGHTS = "__0_0.distcp"
_TRAINED = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def precision_of(source: Source, dtype: torch.dtype | None) -> str:
    """``train.precision`` of the written weights: fp32 or bf16.

    Args:
        dtype: of the written weights; None keeps each tensor's dtype.

    Raises:
        ValueError: another dtype, or different dtypes within one parameter.
    """
    dtypes = {dtype} if dtype is not None else set(source.dtypes.values())
    if strange := dtypes - set(_TRAINED):
        raise ValueError(
            f"--dtype keep: the weights are {strange.pop()}, and training supports fp32 and bf16. Give one as --dtype"
        )
    if dtype is None:
        names = [list(parameter.shapes) for parameter in model_parameters(source.model)]
        mixed = [group for group in names if len({source.dtypes[name] for name in group}) > 1]
        if mixed:
            raise ValueError(
                f"--dtype keep: {listed(mixed[0])} become one parameter and differ in dtype. Give --dtype fp32 or bf16"
            )
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"


def foreign(root: Path) -> str:
    """A file of the folder that ``write_checkpoint`` does not write, or why it is not its output; "" for its output."""
    place = paths.step_folder(root, ITERATION)
    try:
        saved = manifest.read(place)
    except manifest.Damaged as error:
        return str(error)
    if saved.kind != WEIGHTS_ONLY:
        return f"{place.name}, a checkpoint of a run"
    names = {f"{place.name}/{name}" for name in (manifest.MANIFEST, *saved.files)}
    return first_other(root, lambda path: path == paths.LATEST or path in names).removeprefix(f"{place.name}/")


def write_checkpoint(
    root: Path,
    source: Source,
    config: RunConfig,
    dtype: torch.dtype | None,
    tokenizer: str,
    progress: Callable[[int], Any] = lambda size: None,
) -> Path:
    """Write the weights as the one checkpoint of an empty folder.

    Args:
        root: the folder; no other process reads it yet.
        source: of the weights.
        config: recorded as the run's; ``train.precision`` is that of the weights.
        dtype: of the new weights; None keeps each tensor's dtype.
        tokenizer: fingerprint.
        progress: gets the bytes of each written parameter.

    Returns:
        The checkpoint, ``root/iter_0000000``.
    """
    place = paths.step_folder(root, ITERATION)
    place.mkdir()
    model, results = source.model, []
    tensors: dict[str, TensorStorageMetadata] = {}
    with HashingFile(place / _WEIGHTS) as file:
        for parameter in model_parameters(model):
            (whole,) = parameter.layout.split(source.read(parameter), model, 1)
            whole = _in_own_storage(to_dtype(", ".join(parameter.shapes), whole, dtype or whole.dtype))
            described, result = _write(tensors.get(parameter.key), parameter, model.num_layers, whole, file)
            tensors[parameter.key] = described
            results.append(result)
            progress(whole.nbytes)
    FileSystemWriter(place).finish(Metadata(state_dict_metadata={**tensors}), [results])
    save_config(CheckpointingConfig("torch_dist", 1), str(place))
    torch.save({"iteration": ITERATION, "objects": {}}, place / COMMON)
    (place / CONFIG).write_text(config.to_yaml())
    files = {_WEIGHTS: file.facts}
    for name in (".metadata", "metadata.json", COMMON, CONFIG):
        paths.sync(place / name)
        files[name] = manifest.facts_of(place / name)
    saved = Manifest(
        iteration=ITERATION,
        kind=WEIGHTS_ONLY,
        layout=parts.describe_layout(config, 1),
        tokenizer=tokenizer,
        versions=manifest.versions(),
        revision=manifest.revision(),
        created=manifest.now(),
        files=files,
    )
    paths.write_file(place / manifest.MANIFEST, saved.to_bytes())
    paths.point_to(root, ITERATION)
    return place


def _in_own_storage(tensor: Tensor) -> Tensor:
    """The values in a storage without other data, because torch.save writes the whole storage of a view."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write(
    so_far: TensorStorageMetadata | None, parameter: ModelParameter, num_layers: int, whole: Tensor, file: HashingFile
) -> tuple[TensorStorageMetadata, WriteResult]:
    """Write a parameter; returns the metadata of its tensor, this piece included, and the piece's place in the file."""
    layers = parameter.layer is not None
    values = whole[None] if layers else whole
    offsets = torch.Size([parameter.layer or 0] * layers + [0] * whole.dim())
    if so_far is None:
        size = torch.Size((num_layers,) * layers + tuple(whole.shape))
        so_far = TensorStorageMetadata(TensorProperties.create_from_tensor(values), size, [])
    so_far.chunks.append(ChunkStorageMetadata(offsets, values.shape))
    begin = file.tell()
    torch.save(values, cast(IO[bytes], file))
    length = file.tell() - begin
    index = MetadataIndex(parameter.key, offsets, len(so_far.chunks) - 1)
    return so_far, WriteResult(index, length, _StorageInfo(_WEIGHTS, begin, length))
