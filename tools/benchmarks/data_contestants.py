"""The contestants of ``data.py``: the project's loader and ``webdataset``, each in its own process."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
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


def run_config(
    data: list[str], tokenizer: str, mode: str = "fixed", seq_length: int = 16384, lanes: int = 1, decoder: str = "cpu"
) -> RunConfig:
    """A run on one core; the decoder "auto" means "cpu" on a machine without a GPU."""
    return RunConfig(
        model=ModelConfig(drop_path_rate=0.0),
        data=DataConfig(
            train_data=tuple(data), tokenizer=tokenizer, image_mode=mode, seq_length=seq_length, decoder=decoder,
            num_workers=1,
        ),
        train=TrainConfig(global_batch_size=lanes),
    )  # fmt: skip


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    contestant = make(*args)
    with contextlib.suppress(EOFError):  # the benchmark ended early and printed the reason
        while (call := pipe.recv()) is not None:
            pipe.send(getattr(contestant, call[0])(*call[1:]))


class Apart:
    """An object in its own process on one core."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "genlip_megatron.data.loader"])
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, args), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, method: str, *args: Any) -> Any:
        """Call a method of the object and return its result."""
        self._pipe.send((method, *args))
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit("a contestant's process ended; its error stands above")

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


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
            length = sample.rows * sample.columns + len(sample.token_ids)
            if length > room:
                yield pack_samples([pack], self.data.seq_length)
                pack, room = [], self.data.seq_length
            pack.append(sample)
            room -= length

    def contents(self) -> Contents:
        """Contents of the next pack."""
        return contents(next(self.packs))

    def turn(self, packs: int) -> Turn:
        """Time packs."""
        return timed_turn(self.packs, packs)
