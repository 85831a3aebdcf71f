"""The contestants of ``data.py``: the project's loader and ``webdataset``, each in its own process."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from common import tokens_of
from PIL import Image

from genlip_megatron.batch import PATCH_SIZE, PackedBatch, Sample, pack_samples
from genlip_megatron.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from genlip_megatron.data.decode import to_patches
from genlip_megatron.data.image import IMAGE_SUFFIXES
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.resize import native_size
from genlip_megatron.data.text import parse_turns
from genlip_megatron.tokenizer import load_tokenizer

Contents = dict[str, tuple[np.ndarray, np.ndarray]]  # key -> token ids, patches
_contestant: Any = None  # in the contestant's process


def run_config(data: list[str], tokenizer: str, mode: str, seq_length: int, decoder: str) -> RunConfig:
    """A run on one core."""
    return RunConfig(
        model=ModelConfig(drop_path_rate=0.0),
        data=DataConfig(
            train_data=tuple(data), tokenizer=tokenizer, image_mode=mode, seq_length=seq_length, decoder=decoder,
            num_workers=1,
        ),
        train=TrainConfig(global_batch_size=1),
    )  # fmt: skip


def apart(make: Callable[..., Any], *args: Any) -> ProcessPoolExecutor:
    """A process on one core that holds the object ``make(*args)``."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (make, *args))


def _begin(make: Callable[..., Any], *args: Any) -> None:
    global _contestant
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    _contestant = make(*args)


def call(process: ProcessPoolExecutor, method: str, *args: Any) -> Any:
    """The result of a method of the object in ``process``."""
    return process.submit(_call, method, *args).result()


def _call(method: str, *args: Any) -> Any:
    return getattr(_contestant, method)(*args)


@dataclass(frozen=True)
class Turn:
    """What a contestant did in a timed turn."""

    samples: int
    tokens: int
    seconds: float
    cpu_seconds: float  # of all its threads


def contents(batch: PackedBatch) -> Contents:
    """Token ids and patches of every sample."""
    assert batch.patches is not None
    found, first = {}, 0
    for key, start, image, text in zip(
        batch.keys, batch.sample_starts.tolist(), batch.image_lengths.tolist(), batch.text_lengths.tolist(),
        strict=False,
    ):  # fmt: skip
        ids = batch.token_ids[start + image : start + image + text]
        found[key] = ids.numpy(), batch.patches[first : first + image].numpy()
        first += image
    return found


def timed_turn(batches: Iterator[PackedBatch], packs: int) -> Turn:
    """Time ``packs`` packs."""
    samples = tokens = 0
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for batch in islice(batches, packs):
        samples += len(batch.keys)
        tokens += int((batch.sample_ids >= 0).sum())
    return Turn(samples, tokens, time.perf_counter() - begin, time.process_time() - cpu_begin)


class Ours:
    """The project's loader."""

    def __init__(self, config: RunConfig) -> None:
        self.loader = Loader(config, "train")

    def contents(self, keys: set[str]) -> Contents:
        """Contents of the given samples."""
        dataset = self.loader.datasets[0]
        ids = islice((i for i in range(len(dataset)) if dataset.key(i) in keys), len(keys))
        return contents(self.loader.assemble([list(ids)], 0))

    def turn(self, packs: int) -> Turn:
        """Time packs of a new loader, from its first pack on."""
        batches = iter(self.loader)
        next(batches)
        turn = timed_turn(batches, packs)
        batches.close()
        return turn


class Baseline:
    """``webdataset`` and Pillow, with the same rules for text and size."""

    def __init__(self, config: RunConfig) -> None:
        import webdataset

        self.data = config.data
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.prompt_tokens = functools.lru_cache(1024)(self.tokenizer.encode)
        shards = webdataset.WebDataset(list(config.data.train_data), shardshuffle=False).repeat()
        samples = shards.map(self._sample, handler=webdataset.ignore_and_continue)
        self.packs = self._packs(iter(samples))

    def _sample(self, record: dict[str, Any]) -> Sample:
        content = next(record[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in record)
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.mode != "RGB":
            image = image.convert("RGB")
        height = width = self.data.image_size
        if self.data.image_mode == "native":
            height, width = native_size(image.height, image.width)
        patches = to_patches(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)))
        ids: list[int] = []
        loss: list[bool] = []
        caption = record["json"] if "json" in record else record["txt"]
        for text, is_answer in parse_turns(caption, "json" in record, self.data.prompt):
            # A batch of one is the tokenizer's fastest call.
            tokens = self.tokenizer.encode_batch([text])[0] if is_answer else self.prompt_tokens(text)
            ids += tokens
            loss += [is_answer] * len(tokens)
        ids += self.tokenizer.closing_ids
        loss += [True] * len(self.tokenizer.closing_ids)
        grid = height // PATCH_SIZE, width // PATCH_SIZE
        return Sample(torch.from_numpy(patches), *grid, ids, loss, key=record["__key__"])

    def _packs(self, samples: Iterator[Sample]) -> Iterator[PackedBatch]:
        pack: list[Sample] = []
        room = self.data.seq_length
        for sample in samples:
            if tokens_of(sample) > room:
                yield pack_samples([pack], self.data.seq_length)
                pack, room = [], self.data.seq_length
            pack.append(sample)
            room -= tokens_of(sample)

    def contents(self) -> Contents:
        """Contents of the next pack."""
        return contents(next(self.packs))

    def turn(self, packs: int) -> Turn:
        """Time packs."""
        return timed_turn(self.packs, packs)
