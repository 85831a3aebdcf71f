"""Loader: plan + samples -> PackedBatch, prefetched ahead of the training step.

Each lane of the plan gives one pack per step. Data-parallel rank r of D works lanes r * lanes / D to
(r + 1) * lanes / D - 1, in micro-batches. The cursor counts consumed steps, never prefetched ones.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig, source_epochs, source_weights
from genlip_megatron.data.assemble import SampleReader
from genlip_megatron.data.dataset import Dataset, open_dataset
from genlip_megatron.data.decode import make_decoder
from genlip_megatron.data.patterns import NothingFound
from genlip_megatron.data.plan import Phase, Plan, Source
from genlip_megatron.data.quarantine import Quarantine
from genlip_megatron.data.read import ShardReader
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.data.text import encode_prompt
from genlip_megatron.device import current_device
from genlip_megatron.tokenizer import load_tokenizer

_MAX_WORKERS = 16

# After the last micro-batch of a step: (step, the plan's cursor after it, (bad samples, cut captions) so far).
_Cursor = tuple[int, dict[str, Any], tuple[int, int]] | None


def drop_path_factors(seed: int, step: int, samples: list[int], layers: int, rate: float) -> torch.Tensor:
    """float32 [layers, 2, samples]: 0 with probability ``rate``, else 1 / (1 - rate).

    Drawn from Philox keyed by (seed, sample id) at counter (step), so all ranks and layouts get the same values.
    """
    draws = np.empty((len(samples), layers * 2))
    for i, sample in enumerate(samples):
        philox = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64), counter=[0, 0, 0, step])
        draws[i] = np.random.Generator(philox).random(layers * 2)
    kept = (draws >= rate) / (1 - rate)
    return torch.from_numpy(kept.astype(np.float32)).T.reshape(layers, 2, len(samples))


def merge_cursors(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the cursors of all data-parallel ranks into one of all lanes."""
    lanes = {lane: state for part in states for lane, state in part["plan"]["lanes"].items()}
    return {
        **states[0],
        "plan": {**states[0]["plan"], "lanes": lanes},
        "quarantined": sum(state["quarantined"] for state in states),
    }


def validation_sets(entries: Sequence[str]) -> dict[str, list[str]]:
    """{name: entries} of the sets of ``data.valid_data``, each with a loss of its own: every manifest, and all shards.

    >>> validation_sets(["a/val.dataset.json", "b/1.tar", "b/val.dataset.json", "b/2.tar"])
    {'a/val': ['a/val.dataset.json'], 'shards': ['b/1.tar', 'b/2.tar'], 'b/val': ['b/val.dataset.json']}
    """
    paths = [entry.removesuffix(".json").removesuffix(".dataset") for entry in entries]
    depth, sets = 1, dict[str, list[str]]()
    names = ["/".join(path.split("/")[-depth:]) for path in paths]
    while len(set(names)) < len(set(paths)) and depth < max(path.count("/") + 1 for path in paths):
        depth += 1
        names = ["/".join(path.split("/")[-depth:]) for path in paths]
    for entry, name in zip(entries, names, strict=True):
        sets.setdefault(name if entry.endswith(".json") else "shards", []).append(entry)
    return sets


def open_split(config: RunConfig, split: str, fingerprint: str, open_shards: int = 256) -> list[Dataset]:
    """The sources of ``split``: of "train" one for all entries, or with weights one per entry; of "valid" one per set.

    Raises:
        ValueError: data that cannot be found or used.
    """
    data, setting = config.data, f"data.{split}_data"
    entries = data.train_data if split == "train" else data.valid_data
    apart = split == "train" and (data.train_weights or data.train_epochs)
    groups: list[Sequence[str]] = [[entry] for entry in entries] if apart else [entries]
    if split == "valid" and entries:
        groups = list(validation_sets(entries).values())
    try:
        return [open_dataset(group, data, fingerprint, setting, open_shards) for group in groups]
    except NothingFound as error:
        if len(entries) == 1:
            raise
        named = ", ".join(map(repr, entries[:10])) + (", ..." if len(entries) > 10 else "")
        raise ValueError(f"{error} ({setting} was read as {len(entries)} entries: {named})") from error


def build_plan(config: RunConfig, split: str, datasets: list[Dataset]) -> Plan:
    """The plan of ``split``: endless and shuffled for "train", one pass in order for "valid"."""
    data, train = config.data, split == "train"
    phases = [Phase(start, weights) for start, weights in source_weights(data)] if train else []
    if train and (epochs := source_epochs(data)):
        phases = [Phase(0, tuple(n * len(dataset) for n, dataset in zip(epochs, datasets, strict=True)))]
    return Plan(
        [Source(len(dataset), dataset.lengths) for dataset in datasets],
        data.seq_length,
        config.train.global_batch_size,
        config.train.seed,
        phases,
        data.chunk_size,
        data.shuffle_window,
        data.pack_buffer,
        "-".join(dataset.fingerprint for dataset in datasets),
        shuffle=train,
        epochs=None if train else 1,
    )


class ValidationSet(NamedTuple):
    """A set of ``data.valid_data``, and how much of it one validation uses."""

    name: str
    size: int  # samples
    steps: int  # global batches of one validation
    samples: int  # of these batches


class Prefetcher(Iterator[PackedBatch]):
    """Assembles micro-batches in a thread, up to ``depth`` ahead of the caller.

    The thread starts at once, not at the first ``next``: pipeline stages ask for their first micro-batch one after
    another, but must assemble it together.
    """

    def __init__(
        self,
        make: Iterator[tuple[PackedBatch, _Cursor]],
        depth: int,
        share: ReadAssignment,
        taken: Callable[[_Cursor, float], None],
    ) -> None:
        self._make, self._share, self._taken = make, share, taken
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while not self._share.any_stops(self._stop.is_set()):
                item = next(self._make, None)
                if item is None:
                    break
                self._put(item)
            self._put(StopIteration())
        except BaseException as error:  # surfaces in the consumer
            self._put(error)

    def __next__(self) -> PackedBatch:
        if self._stop.is_set():
            raise StopIteration
        begin = time.monotonic()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._put(item)  # the next call raises it again
            raise item
        batch, cursor = item
        self._taken(cursor, time.monotonic() - begin)
        return batch

    def close(self, timeout: float | None = None) -> None:
        """End the thread, together with those of the ranks that share its micro-batches.

        Args:
            timeout: seconds to wait for the thread. None waits as long as a read takes, so the caller never races the
                old thread.
        """
        self._stop.set()
        self._thread.join(timeout)


class Loader:
    """Micro-batches of one data-parallel rank.

    Args:
        config: the run's configuration.
        split: "train" (endless, shuffled) or "valid" (one pass in order over each set, the same every time).
        data_parallel_rank, data_parallel_size: they select this rank's lanes.
        share: the part of each micro-batch that this rank reads, and the group that exchanges the parts.
    """

    def __init__(
        self,
        config: RunConfig,
        split: str,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        share: ReadAssignment | None = None,
    ) -> None:
        self.config, self.split = config, split
        data, lanes = config.data, config.train.global_batch_size
        self.share = share or ReadAssignment()
        self.tokenizer = load_tokenizer(data.tokenizer, config.model.vocab_size)
        encode_prompt(data.prompt, self.tokenizer, "data.prompt")  # finds errors before data are read
        mine = lanes // data_parallel_size
        self.lanes = range(data_parallel_rank * mine, (data_parallel_rank + 1) * mine)
        # A lane's window lies in few shards; the shards of all lanes of this rank should stay open.
        open_shards = min(max(128, 32 * mine), 2048)
        self.datasets = open_split(config, split, self.tokenizer.fingerprint, open_shards)
        samples = sum(len(dataset) for dataset in self.datasets)
        if split == "train" and data_parallel_size > samples:
            raise ValueError(
                f"data.train_data has {samples} good samples for {data_parallel_size} data-parallel ranks. "
                "Use fewer ranks or more data."
            )
        save = config.checkpoint.save
        self.quarantine = Quarantine(
            str(Path(save) / "quarantine.jsonl") if save and split == "train" else "",
            data.max_consecutive_failures,
        )
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = data.num_workers or max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // ranks_here))
        device = current_device() if data.decoder in ("auto", "dali") else torch.device("cpu")
        self.samples = SampleReader(
            self.datasets,
            data,
            self.tokenizer,
            make_decoder(data.decoder, workers, device),
            ShardReader(data.cache_dir, int(data.cache_gb * 1e9), data.read_retries, data.read_timeout),
            self.quarantine,
            self.share,
            device,
        )
        self.plan = build_plan(config, split, self.datasets)
        self.sets = self._validation_sets() if split == "valid" else []
        self.step = 0
        self.skipped: list[list[int]] = []  # [first, last] steps skipped on purpose
        self.waited = 0.0  # seconds that steps waited for data, since it was last set to 0
        self.truncated = 0  # captions of consumed steps that were cut to fit their pack
        self._quarantined = self._quarantined_before = 0
        self._consumed = self._start = self.plan.state_dict(self.lanes)
        self._prefetchers: list[Prefetcher] = []

    def __len__(self) -> int:
        return len(self.samples)

    def _validation_sets(self) -> list[ValidationSet]:
        most, sets = self.config.log.eval_iters, []
        names = validation_sets(self.config.data.valid_data)
        for name, dataset in zip(names, self.datasets, strict=True):
            plan, steps, samples = build_plan(self.config, "valid", [dataset]), 0, 0
            # All lanes, because the ranks must agree on the number of steps.
            while (not most or steps < most) and any(packs := [plan.next_pack(i) for i in range(plan.lanes)]):
                steps, samples = steps + 1, samples + sum(map(len, packs))
            sets.append(ValidationSet(name, len(dataset), most or steps, samples))
        return sets

    def __iter__(self) -> Prefetcher:
        """Micro-batches: "train" never ends, "valid" gives the steps of each of ``sets`` in turn."""
        for ahead in self._prefetchers:
            ahead.close()
            if self.split == "train":
                # Prefetched micro-batches come again and are counted again.
                self.plan.load_state_dict(self._consumed)
                self.quarantine.total, self.samples.truncated = self._quarantined, self.truncated
        self._prefetchers = [Prefetcher(self._micro_batches(), self.config.data.prefetch, self.share, self._taken)]
        return self._prefetchers[0]

    def _taken(self, cursor: _Cursor, waited: float) -> None:
        self.waited += waited
        if cursor is not None and self.split == "train":
            self.step, self._consumed, (self._quarantined, self.truncated) = cursor

    def _micro_batches(self) -> Iterator[tuple[PackedBatch, _Cursor]]:
        size = self.config.train.micro_batch_size
        for step, packs, cursor in self._training_steps() if self.split == "train" else self._validation_steps():
            for start in range(0, len(packs), size):
                last = start + size >= len(packs)
                batch = self.assemble(packs[start : start + size], step)
                counts = self.quarantine.total, self.samples.truncated
                yield batch, (step, cursor, counts) if last else None

    def _training_steps(self) -> Iterator[tuple[int, list[list[int]], dict[str, Any]]]:
        for step in itertools.count(self.step + 1):
            packs = [self.plan.next_pack(lane) for lane in self.lanes]
            yield step, packs, self.plan.state_dict(self.lanes)

    def _validation_steps(self) -> Iterator[tuple[int, list[list[int]], dict[str, Any]]]:
        step, first = 0, 0  # step of the validation; first sample of the set
        for of_set, dataset in zip(self.sets, self.datasets, strict=True):
            plan = build_plan(self.config, "valid", [dataset])
            for _ in range(of_set.steps):
                step += 1
                yield step, [[first + i for i in plan.next_pack(lane)] for lane in self.lanes], {}
            first += len(dataset)

    def assemble(self, packs: list[list[int]], step: int) -> PackedBatch:
        """One micro-batch of the given packs. A collective over the ranks that share it."""
        batch = self.samples.micro_batch(packs, step)
        model = self.config.model
        if model.drop_path_rate and self.split == "train":
            ids = [sample for pack in packs for sample in pack]
            factors = torch.ones(model.num_layers, 2, len(batch.sample_starts))
            factors[:, :, : len(ids)] = drop_path_factors(
                self.config.train.seed, step, ids, model.num_layers, model.drop_path_rate
            )
            batch = replace(batch, drop_path=factors)
        # Pinning copies, so it happens here, in the loader's thread.
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def skip(self, steps: int) -> None:
        """Skip the next ``steps`` steps for good; their samples count as consumed. Call before iterating."""
        for _ in range(steps):
            for lane in self.lanes:
                self.plan.next_pack(lane)
        self.skipped.append([self.step + 1, self.step + steps])
        self.step += steps
        self._consumed = self.plan.state_dict(self.lanes)

    @property
    def quarantined(self) -> tuple[int, int]:
        """(bad samples before this run was resumed, of all ranks; since then, of this rank)."""
        return self._quarantined_before, self._quarantined

    def state_dict(self) -> dict[str, Any]:
        """The cursor of consumed steps of this rank's lanes; ``merge_cursors`` joins those of all ranks."""
        return {
            "step": self.step,
            "plan": self._consumed,
            "skipped": self.skipped,
            "quarantined": self._quarantined,
            "quarantined_before": self._quarantined_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step of ``state``, which holds all lanes; call before iterating."""
        self.plan.load_state_dict(state["plan"], self.config.data.change_lanes)
        self.step, self._consumed = state["step"], self.plan.state_dict(self.lanes)
        self.skipped = [list(interval) for interval in state["skipped"]]
        self._quarantined_before = state["quarantined_before"] + state["quarantined"]
        # After a rollback this process had already counted some of these.
        self._quarantined = self.quarantine.total = 0

    def restart(self) -> None:
        """Begin again with the data of the first step. Call before iterating."""
        self.load_state_dict({"step": 0, "plan": self._start, "skipped": [], "quarantined": 0, "quarantined_before": 0})

    def close(self) -> None:
        """End the threads and close the shards. The loader cannot be used afterwards."""
        for ahead in self._prefetchers:
            ahead.close(10)
        self.samples.close()
