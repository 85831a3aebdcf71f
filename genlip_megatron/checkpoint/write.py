"""Writing the sharded part of a checkpoint: planned by Megatron-Core's ``torch_dist`` strategy, written by threads of
this process that compute checksums as they go.

Megatron-Core 0.16.1 writes from processes that it forks, which is unsafe beside the decoder's threads, or spawns, which
needs a guard in every entry script; and it computes no checksums. Writing, syncing and hashing leave the interpreter's
lock, so threads do as well.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from genlip_megatron.checkpoint.manifest import FileFacts

# Files of a rank, written side by side; one thread hashes about as fast as one disk writes.
FILES_PER_RANK = 2


@dataclass
class Written:
    """What a rank has written.

    Attributes:
        results: where each tensor is, for the checkpoint's own metadata.
        files: name -> facts.
        seconds, hashing: of writing, and of it in checksums (the longest of the threads).
        error: why it failed, or None.
    """

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileFacts] = field(default_factory=dict)
    seconds: float = 0.0
    hashing: float = 0.0
    error: str | None = None


class HashingFile(io.RawIOBase):
    """A new file whose SHA-256 is known when it has been written; it is synced before it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._digest = hashlib.sha256()
        self.size, self.hashing = 0, 0.0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        left = view
        while len(left):  # the system may write less than it was given
            left = left[self._file.write(left) :]
        begin = time.monotonic()
        self._digest.update(view)
        self.hashing += time.monotonic() - begin
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
        super().close()

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self.size, self._digest.hexdigest())


class _Writer(FileSystemWriterAsync):
    """Holds what this rank is to write once it has been planned; writes nothing itself."""

    items: list[tuple[WriteItem, Any]]
    prefix: str

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.prefix = plan.storage_data.prefix
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


class PlannedWrite:
    """The tensors that this rank writes, and the checkpoint's metadata on rank 0."""

    def __init__(self, folder: Path, writer: _Writer, metadata: Metadata | None) -> None:
        self.folder, self._writer, self._metadata = folder, writer, metadata
        self.items: list[tuple[WriteItem, Tensor]] = writer.items

    def write(self) -> Written:
        """Write, hash and sync this rank's files; never raises, since the other ranks wait for the answer."""
        begin = time.monotonic()
        shares = _share_out(self.items, FILES_PER_RANK)
        names = [f"{self._writer.prefix}{i}.distcp" for i in range(len(shares))]
        written = Written()
        try:
            with ThreadPoolExecutor(FILES_PER_RANK, "checkpoint") as threads:
                parts = list(threads.map(self._write_file, names, shares))
            written.results = [result for results, _, _ in parts for result in results]
            written.files = {name: facts for name, (_, facts, _) in zip(names, parts, strict=True)}
            written.hashing = max((hashing for _, _, hashing in parts), default=0.0)
        except Exception as error:  # a full disk, a lost mount: whatever it is, the run goes on
            written = Written(error=f"{type(error).__name__}: {error}")
        written.seconds = time.monotonic() - begin
        return written

    def _write_file(
        self, name: str, items: Sequence[tuple[WriteItem, Tensor]]
    ) -> tuple[list[WriteResult], FileFacts, float]:
        with HashingFile(self.folder / name) as file:
            results = []
            for item, tensor in items:
                # torch.save writes the whole storage that a view looks into.
                alone = tensor.detach().to("cpu")
                if alone.untyped_storage().nbytes() != alone.nbytes:
                    alone = alone.clone()
                results.append(
                    _write_item(_StorageWriterTransforms(), file, alone, item, name, SerializationFormat.TORCH_SAVE)
                )
        return results, file.facts, file.hashing

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Write the metadata, on rank 0, from the results of all ranks."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)


def _share_out(items: Sequence[tuple[WriteItem, Tensor]], count: int) -> list[list[tuple[WriteItem, Tensor]]]:
    """``items`` in up to ``count`` parts of about equal size."""
    parts: list[list[tuple[WriteItem, Tensor]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item, tensor in sorted(items, key=lambda pair: -pair[1].nbytes):
        smallest = sizes.index(min(sizes))
        parts[smallest].append((item, tensor))
        sizes[smallest] += tensor.nbytes
    return [part for part in parts if part]


class Strategy(TorchDistSaveShardedStrategy):
    """``torch_dist`` whose ``async_save`` only plans; the plan stands in ``planned`` afterwards.

    Args:
        reuse_plan: plan the first saves only; the state's structure must stay the same.
    """

    def __init__(self, reuse_plan: bool) -> None:
        super().__init__("torch_dist", 1, cached_metadata=reuse_plan)
        self.planned: PlannedWrite | None = None
        self._cached: tuple[Any, Any, bool] = (None, None, False)

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _Writer(checkpoint_dir, thread_count=1)
        (_, metadata, _), *cached, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(state, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            cached_ckpt_structure=self._cached if self.use_cached_ckpt_structure else None,
        )
        self._cached = (cached[0], cached[1], cached[2])
        if metadata is not None:
            # Only Megatron-Core's reuse across processes reads it; it grows with every rank.
            metadata.all_local_plans = None
            self.cached_global_metadata = metadata
        elif torch.distributed.get_rank() == 0:
            metadata = self.cached_global_metadata
        self.planned = PlannedWrite(Path(checkpoint_dir), writer, metadata)
        return AsyncRequest(None, (), [])


class HostCopies:
    """Copies of tensors in host memory that stay allocated from one save to the next; pinned beside a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def copy(self, planned: PlannedWrite) -> None:
        """Replace what is to be written by copies that the next step does not change."""
        copies = []
        for item, tensor in planned.items:
            key = (item.index.fqn, item.index.offset)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            copies.append((item, buffer))
        torch.cuda.synchronize()
        planned.items = copies


class Background:
    """A function that runs in a thread, and its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._result: Any = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._result = self._function()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What the function returned, once it has."""
        self._thread.join()
        return self._result
