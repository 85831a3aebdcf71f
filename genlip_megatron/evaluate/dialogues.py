"""Images with text for language models with an encoder: captions, or questions and answers.

| source | image | text |
|---|---|---|
| LLaVA's .json or .jsonl | "image", a path | "conversations" with ``<image>`` |
| table (CSV, TSV, JSON, Parquet, Arrow) | a column of paths or bytes | a column of captions, or "conversations" |
| indexed WebDataset shards | the sample's image | the sample's caption file |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genlip_megatron.data.tables import column_names, table_rows, table_suffix
from genlip_megatron.data.text import Turns, parse_turns
from genlip_megatron.evaluate.labelled import Source, held_out
from genlip_megatron.infer.inputs import Inputs, ShardImage

_CONVERSATIONS = ("conversations", "conversation")


@dataclass(frozen=True)
class ShardPicture:
    """The image of a sample of an indexed shard."""

    sample: ShardImage

    @property
    def name(self) -> str:
        """``SHARD:KEY``, for messages."""
        return f"{self.sample.index.shard}:{self.sample.name['key']}"

    @property
    def stamp(self) -> str:
        """Changes when the image does."""
        index, number = self.sample.index, self.sample.number
        return f"{index.shard} {index.keys[number]} {int(index.rows[number]['image_crc'])}"

    def read(self) -> Image.Image:
        """The image, RGB.

        Raises:
            ValueError: it cannot be read, or has changed since the index was made.
        """
        try:
            return Image.fromarray(self.sample.read())
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}. Replace the image and index again.") from error


@dataclass(frozen=True)
class Dialogue:
    """An image and the turns about it.

    Attributes:
        image: read when it is needed.
        turns: (text, whether it is an answer) of each turn, without image markers. A caption has one answer.
    """

    image: Source | ShardPicture
    turns: Turns


def read_dialogues(
    where: Sequence[str],
    flag: str,
    image_folder: str = "",
    image_column: str = "image",
    caption_column: str = "caption",
) -> tuple[list[Dialogue], int]:
    """(the samples with an image, the number of samples without one, which are left out).

    Args:
        where: the value of ``flag``: tables, LLaVA files, indexed shards, or folders of shards.
        flag: for messages.
        image_folder: folder of a table's image paths; "": that of the table.
        image_column, caption_column: of a table.

    Raises:
        ValueError: no such data, a sample that cannot be used, or images that do not exist.
    """
    found: list[Dialogue] = []
    without = 0
    missing: list[str] = []
    for path in where:
        if table_suffix(path) and not path.endswith(".dataset.json"):
            if not os.path.isfile(path):
                raise ValueError(f"{flag} {path}: no such file. Check the path.")
            for image, turns in _table(path, flag, image_folder, image_column, caption_column):
                if image is None:
                    without += 1
                elif image.path and not os.path.isfile(image.path):
                    missing.append(image.path)
                else:
                    found.append(Dialogue(image, turns))
        else:
            found += _shards(path, flag)
    if missing:
        raise ValueError(
            f"{flag} {where[0]}: {len(missing)} of {len(missing) + len(found)} images do not exist, the first is "
            f"{missing[0]}. Name their folder with --image-folder."
        )
    if not found:
        raise ValueError(
            f"{flag} {' '.join(where)}: no sample with an image ({without} without one). Name other data, or check "
            "--image-column."
        )
    return found, without


def split_by_image(images: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(numbers to train on, numbers to hold out), so that no image is in both.

    Args:
        images: the image of each sample; equal ones are the same image.
        share: of the distinct images to hold out; at least one is.
        seed: of the choice.

    >>> split_by_image("aabbcdef", 0.5, 0)
    ([4, 5, 7], [0, 1, 2, 3, 6])
    """
    distinct = list(dict.fromkeys(images))
    _, chosen = held_out(len(distinct), seed, share)
    held = {distinct[number] for number in chosen}
    numbers: tuple[list[int], list[int]] = [], []
    for number, image in enumerate(images):
        numbers[image in held].append(number)
    return numbers


def exchanged_images(images: Sequence[int], seed: int) -> list[int]:
    """The image that each sample gets in the control with shuffled images: never its own.

    Args:
        images: number of the image of each sample; at least two distinct.
        seed: of the random cycle over the distinct images.

    >>> exchanged_images([7, 7, 8], seed=0)
    [8, 8, 7]
    """
    distinct = list(dict.fromkeys(images))
    order = [distinct[number] for number in np.random.default_rng(seed).permutation(len(distinct))]
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [following[image] for image in images]


def _table(
    path: str, flag: str, image_folder: str, image_column: str, caption_column: str
) -> Iterator[tuple[Source | None, Turns]]:
    """(image or None, turns) of every row."""
    try:
        columns = column_names(path)
        text_columns = [name for name in (*_CONVERSATIONS, caption_column) if name in columns]
        listed = ", ".join(columns)
        if image_column not in columns:
            raise ValueError(f"SOURCE {path}: no column {image_column}, only {listed}. Name it with --image-column.")
        if not text_columns:
            raise ValueError(
                f"SOURCE {path}: neither conversations nor a column {caption_column}, only {listed}. Name it with "
                "--caption-column."
            )
        for place, cells in table_rows(path, image_column, (image_column, *text_columns)):
            if isinstance(cells, str):
                raise ValueError(f"SOURCE {path}: row {place['row']}: {cells}. Repair or remove the row.")
            image = _image(cells.get(image_column), image_folder or str(Path(path).parent), f"{path}:{place['row']}")
            yield image, [] if image is None else _turns(cells, caption_column, f"SOURCE {path}: row {place['row']}")
    except ValueError as error:
        raise ValueError(str(error).replace("SOURCE", flag, 1)) from None


def _turns(cells: dict[str, Any], caption_column: str, place: str) -> Turns:
    """The turns of a row, checked as those of the training data are."""
    name = next((name for name in _CONVERSATIONS if cells.get(name)), None)
    record = {"caption": cells.get(caption_column)} if name is None else {name: cells[name]}
    try:
        turns = parse_turns(json.dumps(record).encode(), True, "")
    except ValueError as error:
        raise ValueError(f"{place}: {error}. Repair or remove the row.") from None
    return turns if name else turns[1:]  # without the empty prompt of a caption


def _image(cell: Any, folder: str, name: str) -> Source | None:
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    if isinstance(cell, dict):  # Hugging Face's struct of bytes and path
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return Source(name, content=cell)
    if cell is None or not str(cell).strip():
        return None
    path = str(Path(folder, str(cell)))
    return Source(path, path)


def _shards(path: str, flag: str) -> Iterator[Dialogue]:
    try:
        inputs = Inputs([path])
    except ValueError as error:
        raise ValueError(f"{flag} {str(error).removeprefix('INPUT ')}") from None
    for number in range(len(inputs)):
        sample = inputs[number]
        if not isinstance(sample, ShardImage):
            raise ValueError(f"{flag} {path}: {sample.path} has no caption. Name a table or indexed .tar shards.")
        try:
            turns = sample.turns("")
        except ValueError as error:
            raise ValueError(f"{flag} {path}: {sample.name['key']}: {error}. Repair the sample.") from None
        yield Dialogue(ShardPicture(sample), [turn for turn in turns if turn[0]])
