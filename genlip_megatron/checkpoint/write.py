"""Writing the sharded part of a checkpoint: planned by Megatron-Core's ``torch_dist`` strategy, written by threads of
this process that compute checksums as they go.

Megatron-Core 0.16.1 writes from processes that it forks, which is unsafe beside the decoder's threads, or spawns, which
needs a guard in every entry script; and it computes no checksums. Writing, syncing and hashing leave the interpreter's
lock, so threads do as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from genlip_megatron.checkpoint.manifest import FileFacts

# Files of a rank, written side by side; one thread hashes about as fast as one disk writes.
FILES_PER_RANK = 2
_BLOCK = 2**20


@dataclass
class Written:
    """What a rank has written.

    Attributes:
        results: where each tensor is, for the checkpoint's own metadata.
        files: name -> facts.
        stopped, copying, seconds, hashing: in which training waited, of copying to host memory, of writing, and of that
            in checksums (the longest of the threads).
        error: why it failed, or None.
        warning: what did not go as it should, though it is written.
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
    """A new file whose SHA-256 is known when it has been closed; it is synced before that.

    Small pieces are gathered to blocks, also over a ``flush``: around every tensor torch.save writes dozens of them and
    then flushes.
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
        while len(left):  # the system may write less than it was given
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


class PlannedWrite:
    """The tensors that this rank writes, and the checkpoint's metadata on rank 0."""

    def __init__(self, folder: Path, items: list[tuple[WriteItem, Tensor]], metadata: Metadata | None) -> None:
        self.folder, self.items, self._metadata = folder, items, metadata

    def write(self) -> Written:
        """Write, hash and sync this rank's files; never raises, since the other ranks wait for the answer."""
        begin = time.monotonic()
        written = Written()
        try:
            shares = _share_out(self.items, FILES_PER_RANK)
            names = [f"__{rank()}_{i}.distcp" for i in range(len(shares))]
            with ThreadPoolExecutor(FILES_PER_RANK, "checkpoint") as threads:
                parts = list(threads.map(self._write_file, names, shares))
            written.results = [result for results, _, _ in parts for result in results]
            written.files = {name: facts for name, (_, facts, _) in zip(names, parts, strict=True)}
            written.hashing = max((hashing for _, _, hashing in parts), default=0.0)
        except Exception as error:  # a full disk, a lost mount: whatever it is, the run goes on
            cause: BaseException = error
            while cause.__context__ is not None:  # torch.save hides the file's error behind one of its own
                cause = cause.__context__
            written = Written(error=f"{type(cause).__name__}: {cause}")
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
        FileSystemWriter(self.folder).finish(self._metadata, results)


def _share_out(items: Sequence[tuple[WriteItem, Tensor]], count: int) -> list[list[tuple[WriteItem, Tensor]]]:
    """``items`` in up to ``count`` parts of about equal size."""
    parts: list[list[tuple[WriteItem, Tensor]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item, tensor in sorted(items, key=lambda pair: -pair[1].nbytes):
        smallest = sizes.index(min(sizes))
        parts[smallest].append((item, tensor))
        sizes[smallest] += tensor.nbytes
    return [part for part in parts if part]


class Planner:
    """Plans who writes what. A plan is kept as long as the structure of the state stays the same on every rank.

    Args:
        group: the ranks that share the writing of what they all hold.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group
        self._structure: list[Any] | None = None
        self._distribution: Any = None
        self._items: list[WriteItem] = []
        self._metadata: Metadata | None = None

    def knows(self, state: ShardedStateDict) -> bool:
        """Whether the plan is one for a state of this structure. Not a collective: ranks must agree on it."""
        return self._structure is not None and self._structure == _structure(state)

    def prepare(self, state: ShardedStateDict) -> None:
        """Plan anew: share out what replicas hold, and check that each element of each tensor is written once.

        A collective.

        Raises:
            NotSaved: on every rank, when it failed on any.
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
        """What this rank writes of a state that the planner ``knows``. Not a collective."""
        planner = self._planner(state)
        # A tensor that is left out would be missed by nothing until it is to be loaded.
        held = [MetadataIndex(t.key, t.global_offset) for t in nested_values(state) if is_main_replica(t.replica_id)]
        planned = {item.index for item in self._items}
        assert len(planned) == len(self._items) == len(held), "the plan is not of this state"
        assert planned == set(held), "the plan is not of this state"
        items = [(item, planner.resolve_data(item)) for item in self._items]
        for item, tensor in items:
            facts = item.tensor_data
            assert facts is not None and facts.chunk.sizes == tensor.shape and facts.properties.dtype == tensor.dtype
        return PlannedWrite(folder, items, self._metadata)

    def _planner(self, state: ShardedStateDict) -> MCoreSavePlanner:
        """Megatron-Core's planner of what this rank is to write."""
        distribute_main_replicas_with_precomputed_distribution(state, self._group, self._distribution)
        mine, _, _ = _replace_state_dict_keys_with_sharded_keys(state, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(mine, False), is_coordinator=rank() == 0)
        return planner


def _structure(state: ShardedStateDict) -> list[Any]:
    """Everything that describes a state before its replicas are shared out, but its values."""
    return [tensor.without_data() for tensor in nested_values(state)]


def _check_coverage(state: ShardedStateDict) -> None:
    everyone = determine_global_metadata(state)[1]
    on_rank_0(lambda: validate_sharding_integrity(everyone))


class HostCopies:
    """Copies of tensors in host memory that stay allocated from one save to the next; pinned beside a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}
        # One for all saves, since torch hands out the same few to whoever asks; of a priority that others do not use.
        self.stream = torch.cuda.Stream(priority=-1) if torch.cuda.is_available() else None

    def copy(self, planned: PlannedWrite) -> None:
        """Replace what is to be written by copies. What the device was given so far must be done.

        Raises:
            RuntimeError, MemoryError: there is not enough memory; nothing is replaced and nothing stays allocated.
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

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the function's end, up to so many seconds; whether it has ended."""
        self._thread.join(seconds)
        return self.done

    def result(self) -> Any:
        """What the function returned, once it has."""
        self._thread.join()
        return self._result


class WriteBehind(Background):
    """A write behind training: in a thread, tensors are copied to host memory and then written from there.

    The copy as well goes on beside the next step's forward and backward pass, on a stream of its own where there is a
    GPU: nothing that is saved changes before that step's update, which has to ``wait_for_copy``; FP8 state, which the
    passes change, comes as a copy already. Without the memory for a copy the tensors themselves are written, and the
    update waits for that.
    """

    def __init__(self, copies: HostCopies, planned: PlannedWrite) -> None:
        self._copies, self._planned = copies, planned
        self._may_change = threading.Event()
        if copies.stream is not None:
            copies.stream.wait_stream(torch.cuda.current_stream())
        super().__init__(self._copy_and_write)

    def wait_for_copy(self) -> None:
        """Wait until what is written may change."""
        self._may_change.wait()

    def _copy_and_write(self) -> Written:
        begin = time.monotonic()
        try:
            # A thread begins on device 0; a stream brings its own device along.
            with contextlib.nullcontext() if self._copies.stream is None else torch.cuda.stream(self._copies.stream):
                self._copies.copy(self._planned)
            copying, warning = time.monotonic() - begin, None
            self._may_change.set()
        except Exception as error:
            copying, warning = 0.0, f"no copy in host memory, so that training waited for the disk ({error})"
        try:
            return replace(self._planned.write(), copying=copying, warning=warning)
        finally:
            self._may_change.set()
