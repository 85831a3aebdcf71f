"""Loader: plan + read + decode + text -> PackedBatch, prepared ahead of the step.

A step's packs are the plan's lanes; data-parallel rank r of D works lanes r * lanes / D up to the next rank's, in
micro-batches. The cursor is that of consumed steps, never of prefetched ones. A sample that turns out bad at run
time keeps its place in the pack, carries no loss and is counted.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from genlip_megatron import host
from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES, PackedBatch, Sample, pack_samples
from genlip_megatron.config import RunConfig
from genlip_megatron.data.decode import ImageTask, make_decoder
from genlip_megatron.data.index import ShardIndex, expand_shards, load_index
from genlip_megatron.data.plan import Plan
from genlip_megatron.data.resize import native_size
from genlip_megatron.data.text import load_tokenizer, parse_turns, tokenize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleTable:
    """Every good sample of a split: what planning and reading need, without opening a shard."""

    indexes: list[ShardIndex]
    shard_of: np.ndarray  # int32 [samples]
    row_of: np.ndarray  # int32 [samples]
    heights: np.ndarray  # int64 [samples]: target size in pixels
    widths: np.ndarray
    image_tokens: np.ndarray  # int64 [samples]
    text_tokens: np.ndarray  # int64 [samples], before truncation
    fingerprint: str

    def __len__(self) -> int:
        return len(self.shard_of)


def load_table(config: RunConfig, split: str) -> SampleTable:
    """The samples of ``split`` ("train" or "valid") from its shards' indexes.

    Raises:
        ValueError: missing shards or indexes, or an image that does not fit a pack.
    """
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, config.model.vocab_size)
    patterns = data.train_data if split == "train" else data.valid_data
    indexes = [load_index(shard, tokenizer, data.prompt) for shard in expand_shards(patterns, f"data.{split}_data")]
    rows = np.concatenate([index.rows for index in indexes])
    if not len(rows):
        refused = sum(len(index.refused) for index in indexes)
        raise ValueError(
            f"data.{split}_data: no good sample in {len(indexes)} shards ({refused} refused); "
            "tools/prepare_data.py reports the reasons"
        )
    if data.image_mode == "native":
        shapes = zip(rows["height"].tolist(), rows["width"].tolist(), strict=True)
        sizes = [native_size(height, width, data.min_pixels, data.max_pixels) for height, width in shapes]
        heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    else:
        heights = widths = np.full(len(rows), data.image_size, dtype=np.int64)
    image_tokens = (heights // PATCH_SIZE) * (widths // PATCH_SIZE)
    if int(image_tokens.max()) + 2 > data.seq_length:
        raise ValueError(
            f"data.seq_length = {data.seq_length}: an image of {int(image_tokens.max())} patches does not fit beside "
            f"its closing tokens; raise it to at least {int(image_tokens.max()) + 2}, or lower the image size"
        )
    digest = hashlib.sha256(repr((data.image_mode, data.image_size, data.min_pixels, data.max_pixels)).encode())
    for index in indexes:
        digest.update(index.rows.tobytes())
    return SampleTable(
        indexes=indexes,
        shard_of=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.rows) for index in indexes]),
        row_of=np.concatenate([np.arange(len(index.rows), dtype=np.int32) for index in indexes]),
        heights=heights,
        widths=widths,
        image_tokens=image_tokens,
        text_tokens=rows["text_tokens"].astype(np.int64),
        fingerprint=digest.hexdigest()[:16],
    )


def drop_path_factors(seed: int, step: int, samples: list[int], layers: int, rate: float) -> torch.Tensor:
    """float32 [layers, 2, samples]: 0 with probability ``rate``, else 1 / (1 - rate).

    Drawn from Philox keyed by (seed, sample id) at counter (step): the same on every rank and layout.
    """
    draws = np.empty((len(samples), layers * 2))
    for i, sample in enumerate(samples):
        philox = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64), counter=[0, 0, 0, step])
        draws[i] = np.random.Generator(philox).random(layers * 2)
    kept = (draws >= rate) / (1 - rate)
    return torch.from_numpy(kept.astype(np.float32)).T.reshape(layers, 2, len(samples))


def merge_cursors(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One cursor of all lanes from those of every data-parallel rank."""
    lanes = {lane: state for part in states for lane, state in part["plan"]["lanes"].items()}
    return {"step": states[0]["step"], "plan": {**states[0]["plan"], "lanes": lanes}}


class Loader:
    """Micro-batches of one data-parallel rank.

    Args:
        config: the run's configuration.
        split: "train" (endless, shuffled) or "valid" (one pass in order, the same every time).
        data_parallel_rank, data_parallel_size: which lanes are this rank's.
        needs_images: False reads no image; every other field stays the same.
    """

    def __init__(
        self,
        config: RunConfig,
        split: str,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        needs_images: bool = True,
    ) -> None:
        self.config, self.split, self.needs_images = config, split, needs_images
        self.tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocab_size)
        self.table = load_table(config, split)
        lanes = config.train.global_batch_size
        if split == "train" and data_parallel_size > len(self.table):
            raise ValueError(
                f"data.train_data has {len(self.table)} good samples for {data_parallel_size} data-parallel ranks; "
                "use fewer ranks or more data"
            )
        share = lanes // data_parallel_size
        self.lanes = range(data_parallel_rank * share, (data_parallel_rank + 1) * share)
        self.plan = self._new_plan()
        self.truncated = 0
        self.quarantine: list[tuple[str, str]] = []
        self.step = 0
        self._device = host.device() if config.data.decoder != "pillow" else torch.device("cpu")
        self._decoder = make_decoder(config.data.decoder, config.data.num_workers, self._device)
        self._files = [open(index.shard, "rb") for index in self.table.indexes]  # noqa: SIM115 - read until close
        self._read_lock = threading.Lock()
        self._consumed = self.plan.state_dict(self.lanes)

    def _new_plan(self) -> Plan:
        data = self.config.data
        lengths = np.minimum(self.table.image_tokens + self.table.text_tokens, data.seq_length)
        lanes = self.config.train.global_batch_size
        # Validation deals single samples, so that every lane has some even of a small set.
        chunk = data.chunk_size if self.split == "train" else 1
        if self.split == "train":
            # Each lane should see several chunks an epoch, or its neighbours in a pack stay the same.
            chunk = max(1, min(chunk, len(lengths) // (4 * lanes)))
        return Plan(
            lengths,
            data.seq_length,
            lanes,
            self.config.train.seed,
            chunk,
            data.shuffle_window,
            data.pack_buffer,
            self.table.fingerprint,
            shuffle=self.split == "train",
            epochs=None if self.split == "train" else 1,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        """Micro-batches; ``train`` never ends, ``valid`` gives at most ``log.eval_iters`` global batches."""
        if self.split == "train":
            return self._train()
        return self._valid()

    def _valid(self) -> Iterator[PackedBatch]:
        plan = self._new_plan()
        size = self.config.train.micro_batch_size
        for step in range(self.config.log.eval_iters):
            packs = [plan.next_pack(lane) for lane in self.lanes]
            for start in range(0, len(packs), size):
                yield self.assemble(packs[start : start + size], step)

    def _train(self) -> Iterator[PackedBatch]:
        """Assemble ahead in a thread; ``self._consumed`` is the cursor before the step in progress."""
        ready: queue.Queue[Any] = queue.Queue(self.config.data.prefetch)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            step, size = self.step, self.config.train.micro_batch_size
            try:
                while not stop.is_set():
                    mine = [self.plan.next_pack(lane) for lane in self.lanes]
                    cursor = self.plan.state_dict(self.lanes)
                    step += 1
                    for start in range(0, len(mine), size):
                        last = start + size >= len(mine)
                        batch = self.assemble(mine[start : start + size], step)
                        if not put((batch, (step, cursor) if last else None)):
                            return
            except Exception as error:  # surfaces in the consumer
                put((error, None))

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                batch, consumed = ready.get()
                if isinstance(batch, Exception):
                    raise batch
                if consumed is not None:
                    self.step, self._consumed = consumed
                yield batch
        finally:
            stop.set()
            thread.join(5)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self._read_lock:
            self._files[shard].seek(offset)
            return self._files[shard].read(size)

    def _refuse(self, key: str, reason: str) -> None:
        self.quarantine.append((key, reason))
        logger.warning("sample %s carries no loss: %s (%d so far)", key, reason, len(self.quarantine))

    def _text(self, sample: int, key: str) -> tuple[list[int], list[bool]]:
        """Token ids and loss mask, cut to what the image leaves of a pack; loss-free filler for a bad caption."""
        index = self.table.indexes[self.table.shard_of[sample]]
        row = index.rows[self.table.row_of[sample]]
        planned = int(self.table.text_tokens[sample])
        content = self._read(int(self.table.shard_of[sample]), int(row["caption_offset"]), int(row["caption_size"]))
        try:
            ids, loss = tokenize(
                parse_turns(content, bool(row["caption_is_json"]), self.config.data.prompt), self.tokenizer
            )
            if len(ids) != planned:
                raise ValueError(f"its caption has {len(ids)} tokens, the index says {planned}")
        except ValueError as error:
            self._refuse(key, str(error))
            ids, loss = [self.tokenizer.closing_ids[0]] * planned, [False] * planned
        room = self.config.data.seq_length - int(self.table.image_tokens[sample])
        if planned > room:
            self.truncated += 1
        return ids[:room], loss[:room]

    def _images(self, samples: list[int], keys: list[str]) -> list[torch.Tensor | None]:
        tasks: list[ImageTask] = []
        bad: dict[int, str] = {}
        crop = self.config.data.image_mode == "fixed" and self.config.data.fixed_resize == "resize-center-crop"
        for i, sample in enumerate(samples):
            shard = int(self.table.shard_of[sample])
            row = self.table.indexes[shard].rows[self.table.row_of[sample]]
            content = self._read(shard, int(row["image_offset"]), int(row["image_size"]))
            if zlib.crc32(content) != int(row["image_crc"]):
                bad[i] = "its bytes changed since the index was made (crc32)"
            tasks.append(ImageTask(content, int(self.table.heights[sample]), int(self.table.widths[sample]), crop))
        images: list[torch.Tensor | None] = []
        for i, result in enumerate(self._decoder(tasks)):
            reason = bad.get(i) or (result if isinstance(result, str) else None)
            if reason:
                self._refuse(keys[i], reason)
            images.append(None if reason or isinstance(result, str) else result)
        return images

    def _blank(self, count: int) -> torch.Tensor:
        return torch.zeros(count, PATCH_VALUES, dtype=torch.uint8, device=self._device)

    def _samples(self, ids: list[int]) -> list[Sample]:
        """The samples with text and, where images are needed, patches; a bad one gets weight 0."""
        table, keys = self.table, [self.key(sample) for sample in ids]
        images = self._images(ids, keys) if self.needs_images else None
        samples = []
        for i, (sample, key) in enumerate(zip(ids, keys, strict=True)):
            rows, columns = int(table.heights[sample]) // PATCH_SIZE, int(table.widths[sample]) // PATCH_SIZE
            tokens, loss_mask = self._text(sample, key)
            patches = None if images is None else images[i]
            good = images is None or patches is not None
            if images is not None and patches is None:
                patches = self._blank(rows * columns)
            samples.append(Sample(patches, rows, columns, tokens, loss_mask, float(good), key))
        return samples

    def assemble(self, packs: list[list[int]], step: int) -> PackedBatch:
        """One micro-batch of the given packs."""
        ids = [sample for pack in packs for sample in pack]
        samples = iter(self._samples(ids))
        batch = pack_samples([[next(samples) for _ in pack] for pack in packs], self.config.data.seq_length)
        if self.needs_images and batch.patches is None:
            batch = replace(batch, patches=self._blank(1))
        model = self.config.model
        if model.drop_path_rate and self.split == "train":
            factors = torch.ones(model.num_layers, 2, len(batch.sample_starts))
            factors[:, :, : len(ids)] = drop_path_factors(
                self.config.train.seed, step, ids, model.num_layers, model.drop_path_rate
            )
            batch = replace(batch, drop_path=factors)
        return batch

    def key(self, sample: int) -> str:
        """The sample's name in its shard."""
        return self.table.indexes[self.table.shard_of[sample]].keys[self.table.row_of[sample]]

    def requests(self, samples: Iterable[int]) -> tuple[list[Sample], list[str]]:
        """(each image with the prompt alone, its true answer): for captioning."""
        chosen = list(samples)
        table = self.table
        keys = [self.key(sample) for sample in chosen]
        prompt = self.tokenizer.encode(self.config.data.prompt)
        requests, truths = [], []
        for sample, image in zip(chosen, self._images(chosen, keys), strict=True):
            shard = int(table.shard_of[sample])
            row = table.indexes[shard].rows[table.row_of[sample]]
            content = self._read(shard, int(row["caption_offset"]), int(row["caption_size"]))
            turns = parse_turns(content, bool(row["caption_is_json"]), self.config.data.prompt)
            truths.append(" ".join(text for text, carries_loss in turns if carries_loss))
            rows, columns = int(table.heights[sample]) // PATCH_SIZE, int(table.widths[sample]) // PATCH_SIZE
            patches = self._blank(rows * columns) if image is None else image
            requests.append(Sample(patches, rows, columns, prompt, key=self.key(sample)))
        return requests, truths

    def state_dict(self) -> dict[str, Any]:
        """The cursor of consumed steps, of this rank's lanes; ``merge_cursors`` makes one of all ranks'."""
        return {"step": self.step, "plan": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step of ``state``; call before iterating."""
        self.plan.load_state_dict(state["plan"])
        self.step, self._consumed = state["step"], state["plan"]

    def close(self) -> None:
        """Close the shards and end the decoder's threads."""
        self._decoder.close()
        for file in self._files:
            file.close()
