"""Assemble micro-batches: sample numbers -> images and token ids. Each byte is read by one rank of the group.

A bad sample keeps its place, with a blank image, filler text and no loss on every rank of the model-parallel group. So
a bad sample never changes the plan or the stream.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlip_megatron.batch import PATCH_SIZE, PATCH_VALUES, PackedBatch, Sample, pack_samples
from genlip_megatron.config import DataConfig
from genlip_megatron.data.dataset import Dataset
from genlip_megatron.data.decode import Decoder, ImageTask
from genlip_megatron.data.plan import by_part
from genlip_megatron.data.quarantine import BadSample, Quarantine
from genlip_megatron.data.read import Piece, ShardReader
from genlip_megatron.data.read_assignment import ReadAssignment
from genlip_megatron.data.text import Turns, encode_prompt, parse_turns, tokenize_many
from genlip_megatron.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_INDEXES_AT_ONCE = 16


@dataclass(frozen=True)
class _Layout:
    """Where the samples of a micro-batch lie; needs only the plan. All int64 [N]."""

    ids: np.ndarray
    rows: np.ndarray  # of the patch grid
    columns: np.ndarray
    text_tokens: np.ndarray  # as indexed
    room: np.ndarray  # tokens of the pack that the image leaves free
    starts: np.ndarray  # first slot
    slots: int  # of all packs

    @property
    def images(self) -> np.ndarray:
        """Patches of each sample."""
        return self.rows * self.columns

    @property
    def texts(self) -> np.ndarray:
        """Text tokens of each sample in its pack."""
        return np.minimum(self.text_tokens, self.room)

    @property
    def ends(self) -> np.ndarray:
        """End of each sample's text tokens among those of all samples."""
        return np.cumsum(self.texts)


@dataclass
class SampleReader:
    """Reads, decodes and tokenises the samples of a mixture of data sets.

    ``bytes_read`` counts the bytes of images and captions that this rank read. ``truncated`` counts captions that were
    cut because their image left too little room in the pack.
    """

    datasets: list[Dataset]
    data: DataConfig
    tokenizer: Tokenizer
    decoder: Decoder
    reader: ShardReader
    quarantine: Quarantine
    share: ReadAssignment
    device: torch.device

    def __post_init__(self) -> None:
        self.offsets = np.cumsum([0, *map(len, self.datasets)])
        self._crop = self.data.image_mode == "fixed" and self.data.fixed_resize == "resize-center-crop"
        self._pool = ThreadPoolExecutor(_INDEXES_AT_ONCE, thread_name_prefix="index")
        self.bytes_read = {"image": 0, "caption": 0}
        self.truncated = 0

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def source(self, sample: int) -> tuple[Dataset, int]:
        """(the sample's data set, its number there)."""
        number = int(np.searchsorted(self.offsets, sample, side="right")) - 1
        return self.datasets[number], sample - int(self.offsets[number])

    def key(self, sample: int) -> str:
        """The sample's name in its shard."""
        dataset, local = self.source(sample)
        return dataset.key(local)

    def shard(self, sample: int) -> str:
        """The sample's shard."""
        dataset, local = self.source(sample)
        return dataset.shards[dataset.locate(local)[0]].path

    def record(self, sample: int) -> dict[str, Any]:
        """The JSON of the sample's caption file; {} if it is plain text or cannot be read."""
        content, row = self._read([sample], "caption")[0].get(0, (b"", None))
        if row is None or not row["caption_is_json"]:
            return {}
        tree = json.loads(bytes(content).decode("utf-8-sig"))
        return tree if isinstance(tree, dict) else {}

    def _layout(self, packs: Sequence[Sequence[int]]) -> _Layout:
        ids = np.array([sample for pack in packs for sample in pack], np.int64)
        heights, widths, texts = np.empty((3, len(ids)), np.int64)
        for i, mine, local in by_part(self.offsets, ids):
            plan = self.datasets[i].plan_rows(local)
            heights[mine], widths[mine] = self.datasets[i].image_sizes(plan)
            texts[mine] = plan["text_tokens"]
        rows, columns, seq_length = heights // PATCH_SIZE, widths // PATCH_SIZE, self.data.seq_length
        room = seq_length - rows * columns
        lengths = rows * columns + np.minimum(texts, room)
        per_pack = np.split(lengths, np.cumsum([len(pack) for pack in packs]))
        starts = np.concatenate([i * seq_length + np.cumsum(some) - some for i, some in enumerate(per_pack)])
        return _Layout(ids, rows, columns, texts, room, starts, seq_length * len(packs))

    def _read(self, samples: Sequence[int], kind: str) -> tuple[dict[int, tuple[memoryview, np.void]], dict[int, Any]]:
        """({place of a sample: (bytes of its image or caption, checked by the index; its ROW)}, {place: error})."""
        found: dict[int, tuple[memoryview, np.void]] = {}
        errors: dict[int, Any] = {}
        for part, _, numbers in by_part(self.offsets, np.asarray(samples)):
            self.datasets[part].preload(numbers, self._pool)
        pieces: dict[int, tuple[Piece, np.void]] = {}
        for i, sample in enumerate(samples):
            dataset, local = self.source(sample)
            shard, row = dataset.locate(local)
            try:
                entry = dataset.index(shard).rows[row]
            except ValueError as error:
                errors[i] = str(error)
                continue
            piece = Piece(dataset.shards[shard].path, int(entry[f"{kind}_offset"]), int(entry[f"{kind}_size"]))
            pieces[i] = piece, entry
        contents = self.reader.read([piece for piece, _ in pieces.values()])
        for (i, (piece, entry)), content in zip(pieces.items(), contents, strict=True):
            crc = int(entry[f"{kind}_crc"])
            same = isinstance(content, memoryview) and zlib.crc32(content) == crc
            if not same and isinstance(content, memoryview) and self.reader.drop(piece):
                (content,) = self.reader.read([piece])
                same = isinstance(content, memoryview) and zlib.crc32(content) == crc
            if isinstance(content, OSError):
                errors[i] = f"cannot be read: {content}"
            elif not same:
                errors[i] = f"the {kind}'s bytes changed since the index was made (crc32)"
            else:
                found[i] = content, entry
                self.bytes_read[kind] += len(content)
        return found, errors

    def _images(self, samples: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[Tensor | str]:
        """uint8 patches [rows * columns, 768] of each sample, or the error."""
        found, results = self._read(samples, "image")
        tasks = []
        for i, (content, entry) in found.items():
            height, width = grids[i][0] * PATCH_SIZE, grids[i][1] * PATCH_SIZE
            tasks.append(ImageTask(content, height, width, self._crop, bool(entry["plain_jpeg"])))
        results |= zip(found, self.decoder(tasks), strict=True)
        return [results[i] for i in range(len(samples))]

    def _turns(self, samples: Sequence[int]) -> list[Turns | str]:
        """The turns of each sample's caption, or the error."""
        found, results = self._read(samples, "caption")
        for i, (content, entry) in found.items():
            try:
                results[i] = parse_turns(bytes(content), bool(entry["caption_is_json"]), self.data.prompt)
            except ValueError as error:
                results[i] = str(error)
        return [results[i] for i in range(len(samples))]

    def micro_batch(self, packs: Sequence[Sequence[int]], step: int) -> PackedBatch:
        """One micro-batch of the given packs. A collective over the model-parallel group.

        All ranks of the group get the same micro-batch, but each only the patches that it was assigned to read.

        Raises:
            DataFailure: too many bad samples in a row.
        """
        layout = self._layout(packs)
        count, ends = len(layout.ids), layout.ends
        # Per sample the number of ranks that found its image bad, the same for captions, then 2 * token id + predicted.
        shared = np.zeros(2 * count + int(layout.texts.sum()), np.int32)
        bad_image, bad_caption, tokens = shared[:count], shared[count : 2 * count], shared[2 * count :]
        images = self._read_images(layout, bad_image)
        reasons = self._read_captions(layout, bad_caption, tokens)
        self.share.add_up(torch.from_numpy(shared))

        self._record(layout, step, bad_image, images, reasons)
        # A stage that reads nothing opens no index, so it has no keys.
        reads = self.share.images or self.share.captions
        samples = []
        for i in range(count):
            content = tokens[ends[i] - layout.texts[i] : ends[i]]
            if bad_caption[i]:
                content = np.full(layout.texts[i], 2 * self.tokenizer.closing_ids[0])
            patches = images.get(i)
            if isinstance(patches, str):
                patches = self._blank(int(layout.images[i]))
            good = not (bad_image[i] or bad_caption[i])
            grid = int(layout.rows[i]), int(layout.columns[i])
            key = self.key(int(layout.ids[i])) if reads else ""
            samples.append(Sample(patches, *grid, (content >> 1).tolist(), (content & 1).tolist(), float(good), key))
        self.truncated += int((layout.text_tokens > layout.room).sum())
        rest = iter(samples)
        batch = pack_samples([[next(rest) for _ in pack] for pack in packs], self.data.seq_length)
        patches = self.share.send_patches(batch.patches, int(layout.images.sum()), PATCH_VALUES)
        if self.share.images and patches is None:
            patches = self._blank(1)
        self.quarantine.count([sample.weight > 0 for sample in samples])
        return replace(batch, patches=patches)

    def _read_images(self, layout: _Layout, bad: np.ndarray) -> dict[int, Tensor | str]:
        """{place of the sample: its patches, or the error} for the images that this rank reads."""
        first, last = self.share.slots(layout.slots)
        mine = np.flatnonzero((layout.starts < last) & (layout.starts + layout.images > first) & (layout.images > 0))
        grids = [(int(layout.rows[i]), int(layout.columns[i])) for i in mine]
        images = dict(zip(mine.tolist(), self._images(layout.ids[mine].tolist(), grids), strict=True))
        for i, image in images.items():
            bad[i] = isinstance(image, str)
        return images

    def _read_captions(self, layout: _Layout, bad: np.ndarray, tokens: np.ndarray) -> dict[int, str]:
        """Fill in the tokens of the captions that this rank reads; returns {place of a bad one: the error}."""
        mine = [i for i in range(len(layout.ids)) if self.share.reads_caption(i)]
        turns = dict(zip(mine, self._turns(layout.ids[mine].tolist()), strict=True))
        reasons = {i: reason for i, reason in turns.items() if isinstance(reason, str)}
        good, ends = {i: turn for i, turn in turns.items() if not isinstance(turn, str)}, layout.ends
        for i, (ids, loss) in zip(good, tokenize_many(list(good.values()), self.tokenizer), strict=True):
            if len(ids) != layout.text_tokens[i]:
                reasons[i] = f"its caption has {len(ids)} tokens, the index says {layout.text_tokens[i]}"
                continue
            cut = int(layout.texts[i])
            tokens[ends[i] - cut : ends[i]] = 2 * np.array(ids[:cut], np.int32) + np.array(loss[:cut], np.int32)
        for i in reasons:
            bad[i] = 1
        return reasons

    def _record(
        self, layout: _Layout, step: int, bad: np.ndarray, images: dict[int, Tensor | str], captions: dict[int, str]
    ) -> None:
        """Record the bad samples that this rank found. An image read by two ranks is recorded by the first."""
        first, last = self.share.slots(layout.slots)
        # One line per sample: a bad image hides a bad caption.
        found = {i: reason for i, reason in captions.items() if not bad[i]}
        for i, image in images.items():
            if isinstance(image, str) and (bad[i] == 1 or first <= layout.starts[i] < last):
                found[i] = image
        for i, reason in sorted(found.items()):
            sample = int(layout.ids[i])
            self.quarantine.record(BadSample(self.shard(sample), self.key(sample), reason, step))

    def _blank(self, count: int) -> Tensor:
        return torch.zeros(count, PATCH_VALUES, dtype=torch.uint8, device=self.device)

    def requests(self, samples: Iterable[int]) -> tuple[list[Sample], list[str]]:
        """(each image with only the prompt, its true answer), for captioning. Every rank reads all of them.

        A bad image becomes blank, a bad caption an empty answer.
        """
        chosen = list(samples)
        layout = self._layout([chosen])
        prompt = encode_prompt(self.data.prompt, self.tokenizer, "data.prompt")
        grids = list(zip(layout.rows.tolist(), layout.columns.tolist(), strict=True))
        images, captions = self._images(chosen, grids), self._turns(chosen)
        requests, truths = [], []
        for sample, grid, image, turns in zip(chosen, grids, images, captions, strict=True):
            for reason in (image, turns):
                if isinstance(reason, str):
                    logger.warning("%s of %s: %s", self.key(sample), self.shard(sample), reason)
            patches = self._blank(grid[0] * grid[1]) if isinstance(image, str) else image
            requests.append(Sample(patches, *grid, prompt, key=self.key(sample)))
            answer = [] if isinstance(turns, str) else [text for text, carries_loss in turns if carries_loss]
            truths.append(" ".join(answer))
        return requests, truths

    def close(self) -> None:
        """Close the shards and end the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.decoder.close()
        self.reader.close()
