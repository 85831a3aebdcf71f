"""Data sets with labels: a class for each image, or a mask with the class of each pixel.

| layout | classes | masks |
|---|---|---|
| folder | one subfolder for each class (ImageNet) | ``.../images/...`` and ``.../annotations/...png`` (ADE20K) |
| WebDataset shards | ``KEY.cls``, the number of the class as text | ``KEY.seg.png`` |
| table (CSV, TSV, JSON, Parquet, Arrow) | a column of names or of numbers | a column of PNG files |

The images of a table are paths relative to the table, or bytes as Hugging Face's data sets hold them. Bytes stay in
memory, so a large data set belongs in shards or folders.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genlip_megatron.data import patterns
from genlip_megatron.data.image import IMAGE_SUFFIXES, decode_rgb, open_image
from genlip_megatron.data.tables import column_names, table_rows, table_suffix
from genlip_megatron.evaluate.transforms import IGNORE, reduce_zero_label

_LAYOUTS = "a folder with one subfolder for each class, .tar shards with .cls members, or a table"
_MASK_LAYOUTS = "a folder .../images/... beside .../annotations/..., .tar shards with .seg.png members, or a table"


@dataclass(frozen=True)
class Source:
    """An encoded image in a file, in a shard, or in memory.

    Attributes:
        name: the file, ``SHARD:KEY`` or ``TABLE:row``, for messages.
        path: file or shard; "" if ``content`` holds it.
        offset, size: its place in a shard; size -1: the whole file.
        content: the bytes of an image within a table.
    """

    name: str
    path: str = ""
    offset: int = 0
    size: int = -1
    content: bytes = b""

    @property
    def stamp(self) -> str:
        """Changes when the image may have."""
        if not self.path:
            return hashlib.blake2b(self.content, digest_size=16).hexdigest()
        state = os.stat(self.path)
        return f"{self.path} {self.offset} {self.size} {state.st_size} {state.st_mtime_ns}"

    def _bytes(self) -> bytes:
        if not self.path:
            return self.content
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error.strerror}") from error

    def read(self) -> Image.Image:
        """The image, upright, RGB.

        Raises:
            ValueError: it cannot be used.
        """
        content = self._bytes()
        try:
            return Image.fromarray(decode_rgb(content))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def shape(self) -> tuple[int, int]:
        """(height, width) of the upright image, from its header.

        Raises:
            ValueError: it cannot be used.
        """
        try:
            image, orientation = open_image(self._bytes())
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return (image.width, image.height) if orientation >= 5 else (image.height, image.width)  # 5 to 8: on its side

    def read_mask(self, reduce_zero: bool) -> np.ndarray:
        """uint8 [height, width]: the class of each pixel, 255 where none counts.

        Args:
            reduce_zero: label 0 does not count, and label k is class k - 1.

        Raises:
            ValueError: it cannot be read, or its pixels are not 8-bit numbers.
        """
        content = self._bytes()
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                labels = np.asarray(image)
        except Exception as error:  # every codec error means a bad mask
            raise ValueError(f"{self.name}: not a PNG mask ({error}). Replace the file.") from error
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: a mask needs one 8-bit number for each pixel. Save it as PNG of mode L or P."
            )
        return reduce_zero_label(labels) if reduce_zero else labels


@dataclass(frozen=True)
class Labelled:
    """An image with its class."""

    image: Source
    label: int

    @property
    def stamp(self) -> str:
        """Changes when the image or its class may have."""
        return f"{self.image.stamp} {self.label}"

    def read(self) -> Image.Image:
        """The image, as ``Source.read``."""
        return self.image.read()


@dataclass(frozen=True)
class Masked:
    """An image with a class for each pixel."""

    image: Source
    mask: Source

    @property
    def stamp(self) -> str:
        """Changes when the image or its mask may have."""
        return f"{self.image.stamp} {self.mask.stamp}"

    def read(self) -> Image.Image:
        """The image, as ``Source.read``."""
        return self.image.read()


def read_classes(
    where: Sequence[str],
    flag: str,
    image_column: str = "image",
    label_column: str = "label",
    known: Sequence[str] | None = None,
) -> tuple[list[Labelled], list[str]]:
    """(the images with their classes, the names of the classes).

    Args:
        where: the value of ``flag``: a folder, shards or a table.
        flag: for messages.
        image_column, label_column: of a table.
        known: the classes of the training data, for the validation data.

    Raises:
        ValueError: no such data, no classes or only one, an image without a label, or a class not in ``known``.
    """
    pairs = list(_pairs(where, flag, image_column, label_column, masks=False))
    if not pairs:
        raise ValueError(f"{flag} {_text(where)}: no image with a class. Expected {_LAYOUTS}.")
    values = [None if os.path.isdir(where[0]) else _number(label) for _, label in pairs]
    if None in values:
        classes = list(known or sorted({str(label) for _, label in pairs}))
    else:
        classes = list(known or map(str, range(max(map(int, values)) + 1)))  # type: ignore[arg-type]
        pairs = [(image, str(value)) for (image, _), value in zip(pairs, values, strict=True)]
    numbers = {name: number for number, name in enumerate(classes)}
    for image, label in pairs:
        if str(label) not in numbers:
            if known is None:
                raise ValueError(f"{flag} {_text(where)}: {image.name} has label {label}. Number classes from 0.")
            listed = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
            raise ValueError(
                f"{flag} {_text(where)}: {image.name} has label {label}, outside the {len(classes)} classes of --train "
                f"({listed}). Use the same classes in both."
            )
    if len({str(label) for _, label in pairs}) < 2 and known is None:
        raise ValueError(f"{flag} {_text(where)}: only one class, {pairs[0][1]}. Two or more are needed.")
    return [Labelled(image, numbers[str(label)]) for image, label in pairs], classes


def read_masks(
    where: Sequence[str], flag: str, image_column: str = "image", label_column: str = "label"
) -> list[Masked]:
    """The images with their masks; arguments as ``read_classes``.

    Raises:
        ValueError: no such data, or an image without a mask.
    """
    pairs = list(_pairs(where, flag, image_column, label_column, masks=True))
    if not pairs:
        raise ValueError(f"{flag} {_text(where)}: no image with a mask. Expected {_MASK_LAYOUTS}.")
    return [Masked(image, mask) for image, mask in pairs]


def check_masks(
    samples: Sequence[Masked], flag: str, reduce_zero: bool, classes: int | None, progress: Any = lambda masks: None
) -> int:
    """Read every mask, and the size of every image; returns the number of classes, the highest class + 1.

    Args:
        samples: the data.
        flag: for messages.
        reduce_zero: as in ``Source.read_mask``.
        classes: that of the training data, for the validation data; None: find it.
        progress: called with the number of masks that were read.

    Raises:
        ValueError: a class above those of the training data, only one class, or a mask of another size than its image.
    """

    def present(sample: Masked) -> np.ndarray:
        labels = sample.mask.read_mask(reduce_zero)
        if labels.shape != (shape := sample.image.shape()):
            (height, width), (rows, columns) = shape, labels.shape
            raise ValueError(
                f"{flag}: {sample.mask.name}: a mask of {columns}x{rows} pixels, but its image has {width}x{height}"
            )
        return np.bincount(labels.reshape(-1), minlength=IGNORE + 1)[:IGNORE] > 0

    found = np.zeros(IGNORE, bool)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for sample, seen in zip(samples, pool.map(present, samples), strict=True):
            if classes is not None and seen[classes:].any():
                highest = int(np.flatnonzero(seen)[-1])
                raise ValueError(
                    f"{flag}: {sample.mask.name} has label {highest + reduce_zero}, outside the {classes} classes of "
                    "--train. Use the same classes in both."
                )
            found |= seen
            progress(1)
    if found.sum() < 2 and classes is None:
        raise ValueError(
            f"{flag}: its masks hold {found.sum()} classes; two or more are needed. Label 255, and with "
            "--reduce-zero-label also 0, are not counted."
        )
    return classes if classes is not None else int(np.flatnonzero(found)[-1]) + 1


def per_class(samples: Sequence[Labelled], most: int, seed: int) -> list[Labelled]:
    """At most ``most`` random images of each class, in the order of ``samples``; 0: all."""
    if not most:
        return list(samples)
    left: dict[int, int] = {}
    chosen = []
    for number in np.random.default_rng(seed).permutation(len(samples)).tolist():
        label = samples[number].label
        left[label] = left.get(label, most) - 1
        if left[label] >= 0:
            chosen.append(number)
    return [samples[number] for number in sorted(chosen)]


def held_out(count: int, seed: int = 42, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(numbers to train on, numbers to select on): the last ``share`` of a random order, at least one (CAPI's split).

    >>> tuple(len(part) for part in held_out(1000))
    (900, 100)
    """
    order = np.random.default_rng(seed).permutation(count)
    train = min(round((1 - share) * count), count - 1)
    return order[:train], order[train:]


def _number(label: Any) -> int | None:
    """A whole number, also one written as text; None for anything else."""
    try:
        return int(label) if isinstance(label, (int, str)) else None
    except ValueError:
        return None


def _text(where: Sequence[str]) -> str:
    return where[0] if len(where) == 1 else f"{where[0]} ..."


def _pairs(
    where: Sequence[str], flag: str, image_column: str, label_column: str, masks: bool
) -> Iterator[tuple[Source, Any]]:
    """(image, its label or mask) of every image."""
    first = where[0]
    if first.lower().endswith(".tar"):
        yield from _shards(where, flag, masks)
        return
    if len(where) > 1:
        raise ValueError(f"{flag} {_text(where)}: name one folder, one table, or several .tar shards.")
    if table_suffix(first) and os.path.isfile(first):
        yield from _table(first, flag, image_column, label_column, masks)
    elif not os.path.isdir(first):
        raise ValueError(f"{flag} {first}: no such folder or table. Expected {_MASK_LAYOUTS if masks else _LAYOUTS}.")
    else:
        yield from _annotated(Path(first), flag) if masks else _class_folders(first, flag)


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(IMAGE_SUFFIXES)) and not name.startswith(".")


def _class_folders(root: str, flag: str) -> Iterator[tuple[Source, str]]:
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{flag} {root}: a folder without classes. Put the images of each class into a subfolder.")
    for folder in folders:
        names = sorted(
            os.path.join(place, name)
            for place, _, files in os.walk(os.path.join(root, folder))
            for name in files
            if _is_image(name)
        )
        if not names:
            raise ValueError(f"{flag} {root}: class folder {folder} holds no image. Fill it or remove it.")
        for path in names:
            yield Source(path, path), folder


def _annotated(root: Path, flag: str) -> Iterator[tuple[Source, Source]]:
    parts = list(root.absolute().parts)
    if "images" not in parts:
        raise ValueError(
            f"{flag} {root}: no part of the path is named images. Masks are expected in annotations beside images, as "
            "ADEChallengeData2016/images/training and ADEChallengeData2016/annotations/training."
        )
    parts[len(parts) - 1 - parts[::-1].index("images")] = "annotations"
    for path in sorted(path for path in root.rglob("*") if _is_image(path.name)):
        mask = Path(*parts, path.relative_to(root)).with_suffix(".png")
        if not mask.is_file():
            raise ValueError(f"{flag} {root}: {path.name} has no mask {mask}. Add it or remove the image.")
        yield Source(str(path), str(path)), Source(str(mask), str(mask))


def _shards(where: Sequence[str], flag: str, masks: bool) -> Iterator[tuple[Source, Any]]:
    wanted = "seg.png" if masks else "cls"
    for pattern in where:
        shards = [shard for part in patterns.find(pattern).values() for shard in part]
        if not shards:
            raise ValueError(f"{flag} {pattern}: no such shard. Check the path or the pattern.")
        for shard in shards:
            members: dict[str, dict[str, Source]] = {}
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        folder, _, name = member.name.rpartition("/")
                        stem, _, kind = name.partition(".")
                        if member.isfile() and stem:
                            place = Source(f"{shard}:{member.name}", shard, member.offset_data, member.size)
                            members.setdefault(f"{folder}/{stem}", {})[kind.lower()] = place
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{flag} {shard}: cannot be read as a shard ({error}). Replace it.") from None
            for parts in members.values():
                image = next((parts[kind] for kind in parts if f".{kind}" in IMAGE_SUFFIXES), None)
                if image is None:
                    continue
                if wanted not in parts:
                    raise ValueError(f"{flag} {shard}: {image.name} has no label. Add a member .{wanted}.")
                label = parts[wanted] if masks else parts[wanted]._bytes().decode(errors="replace").strip()
                if not label:
                    raise ValueError(f"{flag} {shard}: the label of {image.name}, its member .cls, is empty. Fill it.")
                yield image, label


def _table(path: str, flag: str, image_column: str, label_column: str, masks: bool) -> Iterator[tuple[Source, Any]]:
    try:
        columns = column_names(path)
        for column, setting in ((image_column, "--image-column"), (label_column, "--label-column")):
            if column not in columns:
                raise ValueError(
                    f"SOURCE {path}: no column {column}, only {', '.join(columns)}. Name it with {setting}."
                )
        for place, cells in table_rows(path, image_column, (image_column, label_column)):
            if isinstance(cells, str):
                raise ValueError(f"SOURCE {path}: row {place['row']}: {cells}. Repair or remove the row.")
            name, label = f"{path}:{place['row']}", cells[label_column]
            if cells[image_column] in (None, ""):
                raise ValueError(f"SOURCE {path}: row {place['row']} has no image. Fill it or remove the row.")
            if label in (None, ""):
                raise ValueError(f"SOURCE {path}: row {place['row']} has no label. Fill it or remove the row.")
            image = _cell(cells[image_column], path, name)
            yield image, _cell(label, path, f"{name} mask") if masks else label
    except ValueError as error:
        raise ValueError(str(error).replace("SOURCE", flag, 1)) from None


def _cell(cell: Any, table: str, name: str) -> Source:
    if isinstance(cell, dict):  # Hugging Face's struct of bytes and path
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return Source(name, content=cell)
    path = os.path.join(os.path.dirname(table), str(cell))
    if not os.path.isfile(path):
        raise ValueError(f"SOURCE {table}: {name} names {cell}, which does not exist. Correct the path.")
    return Source(path, path)
