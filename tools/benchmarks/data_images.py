"""Generated data for ``data.py``: photos, captions and shards, the same on every machine.

Photos are noise with the spectrum of natural images (amplitude falls a little faster than 1/frequency). JPEG compresses
and decodes it like web pictures: about two bits per pixel at quality 90.
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from genlip_megatron.command import WorkerPool
from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.data.prepare import index_shards
from genlip_megatron.tokenizer import END_OF_TURN, load_tokenizer

# Mean answer length of the two training stages, without closing tokens.
ANSWER_TOKENS = {"stage 1": 66, "stage 2": 200}
_USERS_SHARDS = 4
_BASE_SIDE, _BASES_PER_JOB, _PHOTOS_PER_JOB = 1024, 4, 48
_SPECTRUM = 1.5
_SYLLABLES = "ba do ri lo men tar vi shu kel no pra gin sto el wa tri mo fen du car li ost ne hal zi"
_VOCABULARY = 5000  # words


def _base_picture(rng: np.random.Generator) -> np.ndarray:
    """uint8 [side, side, 3] noise that tiles seamlessly: one strong brightness plane and two weaker colour planes."""
    side = _BASE_SIDE
    frequency = side * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    planes = []
    for gain in (1.0, 0.25, 0.25):
        spectrum = np.exp(2j * np.pi * rng.random(frequency.shape)) / (frequency + 1) ** _SPECTRUM
        plane = np.fft.irfft2(spectrum, s=(side, side))
        planes.append(gain * plane / plane.std())
    grey, red, blue = planes
    pixels = np.stack((grey + red, grey - 0.5 * red - 0.3 * blue, grey + blue), -1)
    return np.clip(48 * pixels + 115, 0, 255).astype(np.uint8)


def _render(job: int, count: int, low: int, high: int) -> list[bytes]:
    """JPEGs cut from a few base pictures, shifted, flipped and dimmed; aspect ratios are 1:2 to 2:1."""
    rng = np.random.default_rng([job, 1])
    bases = [_base_picture(rng) for _ in range(min(_BASES_PER_JOB, count))]
    photos = []
    for i in range(count):
        side, stretch = np.exp(rng.uniform(np.log(low), np.log(high))), np.exp2(rng.uniform(-0.5, 0.5))
        height, width = round(side * stretch), round(side / stretch)
        top, left = rng.integers(0, _BASE_SIDE, 2)
        rows, columns = (np.arange(height) + top) % _BASE_SIDE, (np.arange(width) + left) % _BASE_SIDE
        pixels = bases[i % len(bases)][rows[:, None], columns[None, :: rng.choice((-1, 1))]]
        image = Image.fromarray(pixels).point((np.arange(256) * rng.uniform(0.7, 1.0)).astype(np.uint8).tolist() * 3)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


def render_photos(count: int, low: int, high: int, workers: int) -> list[bytes]:
    """``count`` JPEGs with areas of low^2 to high^2 pixels, log-uniform, the same for any number of workers."""
    sizes = [min(_PHOTOS_PER_JOB, count - start) for start in range(0, count, _PHOTOS_PER_JOB)]
    with WorkerPool(workers) as pool:
        jobs = [pool.submit(_render, job, size, low, high) for job, size in enumerate(sizes)]
        return [photo for job in jobs for photo in job.result()]


@functools.cache
def _vocabulary() -> list[str]:
    syllables = np.random.default_rng(0).choice(_SYLLABLES.split(), (_VOCABULARY, 3))
    return ["".join(parts[: 1 + i % 3]) for i, parts in enumerate(syllables.tolist())]


def _sentence(words: int, rng: np.random.Generator) -> str:
    """Text of made-up words, which follow Zipf's law."""
    ranks = np.minimum(rng.zipf(1.2, words), _VOCABULARY) - 1
    return " ".join(_vocabulary()[rank] for rank in ranks.tolist()).capitalize() + "."


def write_captions(count: int, stage: str, tokenizer: Path) -> list[str]:
    """Captions of a stage; token counts are lognormal around the stage's mean."""
    rng = np.random.default_rng(2)
    words_per_token = 3000 / len(load_tokenizer(tokenizer).encode(_sentence(3000, rng)))
    sigma = 0.35  # a spread of about a third
    tokens = rng.lognormal(np.log(ANSWER_TOKENS[stage]) - sigma**2 / 2, sigma, count)
    return [_sentence(max(3, round(n * words_per_token)), rng) for n in tokens]


def train_tokenizer(path: Path) -> None:
    """Train a byte-level BPE ``tokenizer.json`` on such captions, for a machine without a real one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(3)
    backend.train_from_iterator([DEFAULT_PROMPT, *(_sentence(500, rng) for _ in range(20))], trainer)
    backend.save(str(path))


def write_shards(folder: Path, photos: Sequence[bytes], captions: Sequence[str], per_shard: int) -> list[str]:
    """Write WebDataset tars with a ``jpg`` and a ``json`` per photo."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(photos), per_shard):
        shards.append(str(folder / f"photos-{start // per_shard:05d}.tar"))
        with tarfile.open(shards[-1], "w") as archive:
            for i in range(start, min(start + per_shard, len(photos))):
                caption = json.dumps({"caption": captions[i]}).encode()
                for suffix, content in (("jpg", photos[i]), ("json", caption)):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return shards


class BenchData:
    """Data of the benchmark.

    Args:
        folder: folder for generated files.
        quick: generate little data.
        tokenizer: tokenizer file; "": train one.
    """

    def __init__(self, folder: Path, quick: bool, tokenizer: str) -> None:
        self.folder, self.quick, self.tokenizer = folder, quick, tokenizer
        self.workers = len(os.sched_getaffinity(0))
        self.rounds = 2 if quick else 5
        if not tokenizer:
            self.tokenizer = str(folder / "tokenizer.json")
            train_tokenizer(Path(self.tokenizer))

    @functools.cached_property
    def indexed(self) -> dict[str, list[str]]:
        """{stage: indexed shards of photos of web sizes with captions of the stage}; generated on first use."""
        count, high = (48, 512) if self.quick else (768, 1024)
        photos, stages = render_photos(count, 256, high, self.workers), {}
        for stage in ANSWER_TOKENS:
            captions = write_captions(count, stage, Path(self.tokenizer))
            stages[stage] = write_shards(self.folder / stage, photos, captions, count // 3)
            self.index(stages[stage])
        return stages

    def index(self, shards: list[str]) -> None:
        """Index shards with ``prepare_data.py``'s workers."""
        _, problems = index_shards(shards, self.tokenizer, DEFAULT_PROMPT, self.workers)
        if problems:
            sys.exit("\n".join(problems))

    def linked_shards(self, folder: str) -> list[str]:
        """Links to the first shards of the user's folder; their indexes are written beside the links."""
        links = []
        for shard in expand_shards([folder], "--data")[:_USERS_SHARDS]:
            links.append(str(self.folder / Path(shard).name))
            os.symlink(os.path.abspath(shard), links[-1])
        self.index(links)
        return links
