"""Writing the sharded part of a checkpoint: planned by Megatron-Core's ``torch_dist`` strategy, written by threads of
this process that compute checksums as they go.

Megatron-Core 0.16.1 writes from other processes and computes no checksums. It forks them, which is unsafe with the
decoder's threads, or spawns them, which needs a guard in every entry script. Threads are as fast: writing, syncing and
hashing release the GIL.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from genlip_megatron.checkpoint.collectives import everywhere, gather_on_rank_0, on_rank_0, rank
from genlip_megatron.checkpoint.manifest import FileFacts, balanced

T = TypeVar("T")
# Files per rank, written in parallel; one thread hashes about as fast as one disk writes.
FILES_PER_RANK = 2
_BLOCK = 2**20


@dataclass
class Written:
    """The result of a rank's write.

    Attributes:
        results: where each tensor is, for torch's metadata.
        files: name -> facts.
        stopped, copying, seconds, hashing: seconds that training waited, of copying to host memory, of writing, and of
            checksums within it (of the slowest thread).
        error: why it failed, or None.
        warning: a problem that did not prevent the write, or None.
    """

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileFacts] = field(default_factory=dict)
    stopped: float = 0.0
    copying: float = 0.0
    seconds: float = 0.0
    hashing: float = 0.0
    error: str | None = None
    warning: str | None = None


class HashingFile(io.RawIOBase):
    """A new file that computes its SHA-256 while it is written, and is synced when it is closed.

    Small writes are gathered into blocks, even across ``flush``: torch.save writes dozens of them around every tensor
    and then flushes.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._held = bytearray()
        self.size, self.hashing = 0, 0.0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        if len(self._held) + len(view) > _BLOCK:
            self._put_held()
        if len(view) > _BLOCK:
            self._put(view)
        else:
            self._held += view
        self.size += len(view)
        return len(view)

    def _put_held(self) -> None:
        held, self._held = self._held, bytearray()
        self._put(memoryview(held))

    def _put(self, view: memoryview) -> None:
        left = view
        while len(left):  # the system may write only a part
            left = left[self._file.write(left) :]
        begin = time.monotonic()
        self._digest.update(view)
        self.hashing += time.monotonic() - begin

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._put_held()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
        super().close()

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self.size, self._digest.hexdigest())


Item = tuple[WriteItem, Tensor]


class PlannedWrite:
    """The tensors that this rank writes; on rank 0 also the checkpoint's metadata."""

    def __init__(self, folder: Path, items: list[Item], metadata: Metadata | None) -> None:
        self.folder, self.items, self._metadata = folder, items, metadata

    def write(self) -> Written:
        """Write, hash and sync this rank's files; never raises, because the other ranks wait for the result."""
        begin = time.monotonic()
        try:
            groups = balanced(self.items, [tensor.nbytes for _, tensor in self.items], FILES_PER_RANK)
            groups = [group for group in groups if group]
            names = [f"__{rank()}_{i}.distcp" for i in range(len(groups))]
            with ThreadPoolExecutor(FILES_PER_RANK, "checkpoint") as threads:
                parts = list(threads.map(self._write_file, names, groups))
            written = Written(
                results=[result for results, _ in parts for result in results],
                files={name: file.facts for name, (_, file) in zip(names, parts, strict=True)},
                hashing=max((file.hashing for _, file in parts), default=0.0),
            )
        except Exception as error:  # a full disk, a lost mount: training continues
            cause: BaseException = error
            while cause.__context__ is not None:  # torch.save hides the file's error behind its own
                cause = cause.__context__
            written = Written(error=f"{type(cause).__name__}: {cause}")
        written.seconds = time.monotonic() - begin
        return written

    def _write_file(self, name: str, items: Sequence[Item]) -> tuple[list[WriteResult], HashingFile]:
        with HashingFile(self.folder / name) as file:
            results = []
            for item, tensor in items:
                # torch.save writes the whole storage of a view.
                own = tensor.detach().to("cpu")
                if own.untyped_storage().nbytes() != own.nbytes:
                    own = own.clone()
                results.append(
                    _write_item(_StorageWriterTransforms(), file, own, item, name, SerializationFormat.TORCH_SAVE)
                )
        return results, file

    def finish(self, results: list[list[WriteResult]]) -> None:
        """On rank 0: write the metadata from the results of all ranks."""
        assert self._metadata is not None
        FileSystemWriter(self.folder).finish(self._metadata, results)


class Planner:
    """Plans which rank writes what. A plan is valid while the structure of the state is the same on every rank.

    Args:
        group: ranks that divide the writing of replicated tensors.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group
        self._structure: list[Any] | None = None
        self._distribution: Any = None
        self._items: list[WriteItem] = []
        self._metadata: Metadata | None = None

    def knows(self, state: ShardedStateDict) -> bool:
        """Whether the plan fits a state of this structure. Not a collective; ranks must agree on the answer."""
        return self._structure is not None and self._structure == _structure(state)

    def prepare(self, state: ShardedStateDict) -> None:
        """Make a plan: divide replicated tensors, and check that each element of each tensor is written once.

        A collective.

        Raises:
            NotSaved: it failed on any rank. Raised on every rank.
        """
        self._structure = None
        structure = _structure(state)
        _check_coverage(state)
        self._distribution = determine_main_replica_uniform_distribution(state, self._group)
        planner = everywhere(lambda: self._planner(state))
        _check_coverage(state)
        plans = gather_on_rank_0(planner.create_local_plan())
        self._metadata = on_rank_0(lambda: planner.create_global_plan(plans)[1], only_there=True)
        self._items, self._structure = planner.plan.items, structure

    def plan(self, state: ShardedStateDict, folder: Path) -> PlannedWrite:
        """This rank's part of a state that the planner ``knows``. Not a collective."""
        planner = self._planner(state)
        # Without this check a missing tensor would be noticed only when it is loaded.
        held = [MetadataIndex(t.key, t.global_offset) for t in nested_values(state) if is_main_replica(t.replica_id)]
        planned = [item.index for item in self._items]
        assert len(set(planned)) == len(planned), "the plan writes a tensor twice"
        assert Counter(planned) == Counter(held), "the plan is not of this state"
        items = [(item, planner.resolve_data(item)) for item in self._items]
        for item, tensor in items:
            facts = item.tensor_data
            assert facts is not None and facts.chunk.sizes == tensor.shape and facts.properties.dtype == tensor.dtype
        return PlannedWrite(folder, items, self._metadata)

    def _planner(self, state: ShardedStateDict) -> MCoreSavePlanner:
        """Megatron-Core's planner of this rank's part."""
        distribute_main_replicas_with_precomputed_distribution(state, self._group, self._distribution)
        mine, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(mine, False), is_coordinator=rank() == 0)
        return planner


def _structure(state: ShardedStateDict) -> list[Any]:
    """The description of a state without its values, before replicas are divided."""
    return [tensor.without_data() for tensor in nested_values(state)]


def _check_coverage(state: ShardedStateDict) -> None:
    everyone = determine_global_metadata(state)[1]
    on_rank_0(lambda: validate_sharding_integrity(everyone))


class HostCopies:
    """Copies of tensors in host memory, pinned with a GPU, that stay allocated from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}
        # One stream for all saves. torch reuses a few streams per priority; no other code uses this priority.
        self.stream = torch.cuda.Stream(priority=-1) if torch.cuda.is_available() else None

    def copy(self, planned: PlannedWrite) -> None:
        """Replace the tensors of ``planned`` by copies. The device must have finished its earlier work.

        Raises:
            RuntimeError, MemoryError: too little memory; nothing is replaced and nothing stays allocated.
        """
        held, self._buffers = self._buffers, {}
        buffers: dict[Any, Tensor] = {}
        copies = []
        for item, tensor in planned.items:
            key = (item.index.fqn, item.index.offset)
            buffer = held.pop(key, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            assert key not in buffers, key
            buffers[key] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            copies.append((item, buffer))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._buffers, planned.items = buffers, copies


def in_background(function: Callable[[], T]) -> Future[T]:
    """Run a function in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


class WriteBehind:
    """A write in the background: a thread copies tensors to host memory and writes them from there.

    The copy runs during the next step's forward and backward pass, with a GPU on its own stream. Nothing that is saved
    changes before that step's update, which must ``wait_for_copy``; FP8 state, which the passes change, is already a
    copy. If memory for the copy is missing, the tensors themselves are written and the update waits for that.

    Attributes:
        result: of the write.
    """

    def __init__(self, copies: HostCopies, planned: PlannedWrite) -> None:
        self._copies, self._planned = copies, planned
        self._may_change = threading.Event()
        if copies.stream is not None:
            copies.stream.wait_stream(torch.cuda.current_stream())
        self.result = in_background(self._copy_and_write)

    def wait_for_copy(self) -> None:
        """Wait until the tensors may change."""
        self._may_change.wait()

    def _copy_and_write(self) -> Written:
        begin = time.monotonic()
        try:
            # A thread starts on device 0; entering the stream selects its device.
            with contextlib.nullcontext() if self._copies.stream is None else torch.cuda.stream(self._copies.stream):
                self._copies.copy(self._planned)
            copying, warning = time.monotonic() - begin, None
            self._may_change.set()
        except Exception as error:
            copying, warning = 0.0, f"no copy in host memory, so training waited for the disk ({error})"
        try:
            return replace(self._planned.write(), copying=copying, warning=warning)
        finally:
            self._may_change.set()
