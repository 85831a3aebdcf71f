#!/usr/bin/env python3
"""Render the demo data set: scenes of coloured shapes and a written word, with true captions.

    tools/render_demo_data.py --output demo

A scene has one to four equal shapes in one corner and a word in the free half, on a light background, in many sizes and
aspect ratios. A sample depends only on (seed, split, number), so the bytes of the shards do not depend on the number of
workers. Held-out scenes are drawn independently: they may repeat a combination of attributes, but not a picture. The
tool replaces shards that it rendered before, but no other file.
"""

from __future__ import annotations

from genlip_megatron.command import WorkerPool, command

# isort: split
import argparse
import io
import json
import math
import os
import random
import re
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from genlip_megatron.atomic_write import atomic_path
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.evaluate import scenes


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple) -> None:
    """One filled shape around (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    else:
        arm = radius * 0.36
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def render(seed: int, split: str, number: int) -> tuple[bytes, bytes]:
    """(JPEG, JSON) of one scene."""
    rng = random.Random(f"{seed}/{split}/{number}")
    attributes = {
        "colour": rng.choice(list(scenes.COLOURS)),
        "shape": rng.choice(scenes.SHAPES),
        "count": rng.choice(scenes.COUNTS),
        "position": rng.choice(scenes.POSITIONS),
        "word": rng.choice(scenes.WORDS),
    }
    width = rng.randrange(72, 129)
    height = min(128, max(72, round(width * rng.uniform(0.7, 1.4))))
    light = tuple(rng.randrange(225, 256) for _ in range(3))
    image = Image.new("RGB", (width, height), light)
    draw = ImageDraw.Draw(image)

    vertical, horizontal = attributes["position"].split()
    half_width, half_height = width / 2, height / 2
    left = half_width if horizontal == "right" else 0.0
    top = half_height if vertical == "bottom" else 0.0
    count = scenes.COUNTS.index(attributes["count"]) + 1
    columns = 1 if count == 1 else 2
    rows = math.ceil(count / columns)
    cell = min(half_width / columns, half_height / rows)
    radius = cell * rng.uniform(0.34, 0.42)
    jitter_x = (half_width - cell * columns) * rng.random()
    jitter_y = (half_height - cell * rows) * rng.random()
    for i in range(count):
        x = left + jitter_x + cell * (i % columns + 0.5)
        y = top + jitter_y + cell * (i // columns + 0.5)
        draw_shape(draw, attributes["shape"], x, y, radius, scenes.COLOURS[attributes["colour"]])

    size = min(half_height * 0.8, width / (len(attributes["word"]) * 0.62))
    font = ImageFont.load_default(size * rng.uniform(0.85, 1.0))
    box = draw.textbbox((0, 0), attributes["word"], font=font)
    room_x, room_y = width - (box[2] - box[0]), half_height - (box[3] - box[1])
    word_top = 0 if vertical == "bottom" else half_height
    at = (room_x * rng.uniform(0.2, 0.8) - box[0], word_top + room_y * rng.uniform(0.3, 0.7) - box[1])
    draw.text(at, attributes["word"], font=font, fill=(60, 60, 60))

    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    record = {
        "caption": scenes.describe(attributes, rng.randrange(len(scenes.TEMPLATES))),
        "attributes": attributes,
        "width": width,
        "height": height,
    }
    return jpeg.getvalue(), json.dumps(record).encode()


def is_own(file: Path) -> bool:
    """Whether a file is a shard that this tool rendered, judged by its first sample."""
    try:
        with tarfile.open(file, "r:") as archive:
            image, record = archive.next(), archive.next()
            content = archive.extractfile(record) if record is not None else None
            names = [re.sub(r"^(train|val)\d{6}", "", member.name) for member in (image, record) if member is not None]
            fields = json.load(content) if content is not None and names == [".jpg", ".json"] else {}
            return fields.keys() == {"caption", "attributes", "width", "height"}
    except (OSError, tarfile.TarError, ValueError, AttributeError):
        return False


def write_shard(folder: str, split: str, shard: int, first: int, count: int, seed: int) -> str:
    """Write one shard atomically; returns its name."""
    target = Path(folder) / f"{split}-{shard:05d}.tar"
    with atomic_path(target) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(first, first + count):
            for suffix, content in zip(("jpg", "json"), render(seed, split, number), strict=True):
                member = tarfile.TarInfo(f"{split}{number:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return target.name


@command
def main() -> None:
    """Render both splits."""
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--train-samples", type=int, default=24000, help="training scenes (default: 24000)")
    parser.add_argument("--val-samples", type=int, default=400, help="held-out scenes (default: 400)")
    parser.add_argument("--samples-per-shard", type=int, default=2000, help="scenes per shard (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all scenes (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args()
    for name in ("train_samples", "val_samples", "samples_per_shard", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    folder = Path(options.output)
    for file in sorted(folder.glob("*.tar")):
        if re.fullmatch(r"(train|val)-\d{5}\.tar", file.name) and not is_own(file):
            parser.error(f"--output {folder}: {file.name} in it was not rendered by this tool. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with WorkerPool(options.workers) as pool:
        jobs = []
        for split, samples in (("train", options.train_samples), ("val", options.val_samples)):
            for shard, first in enumerate(range(0, samples, options.samples_per_shard)):
                count = min(options.samples_per_shard, samples - first)
                jobs.append(pool.submit(write_shard, options.output, split, shard, first, count, options.seed))
        for job in tqdm(jobs, desc="render", unit="shard", file=sys.stderr):
            job.result()
    print(f"{options.train_samples} training and {options.val_samples} held-out scenes in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
