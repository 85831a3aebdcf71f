"""Generated data for ``data.py``: photos, captions, shards and planning tables, the same on every machine.

Photos are noise with the spectrum of natural images (amplitude falls a little faster than 1/frequency). JPEG compresses
and decodes it like web pictures: about two bits per pixel at quality 90.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from genlip_megatron.command import WorkerPool
from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.index import PLAN_ROW
from genlip_megatron.data.manifest import MANIFEST_FORMAT, manifest_paths
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.data.prepare import index_shards
from genlip_megatron.tokenizer import END_OF_TURN, load_tokenizer

PROMPT_TOKENS, CLOSING_TOKENS = 6, 2
# Mean answer length of the two training stages, without closing tokens.
ANSWER_TOKENS = {"stage 1": 66, "stage 2": 200}
_USERS_SHARDS = 4
_BASE_SIDE, _BASES_PER_JOB, _PHOTOS_PER_JOB = 1024, 4, 48
_SPECTRUM = 1.5
# Splits text into words as the tokenizers of current language models do.
_WORDS_PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_COMMON_WORDS = """
the a of in and with on is to at an its it are by two behind front white black red green blue brown dark bright
small large old young man woman child people dog cat bird horse car street house window door wall table chair tree
grass water river sea sky cloud sun light shadow mountain road field garden flower leaf stone wood metal glass paper
standing sitting looking holding wearing walking running left right above below near next between under over while
seems appears shows image photo picture scene background foreground center corner edge surface colour pattern
texture soft sharp smooth rough wide narrow tall short round square several many few some other another each both
against along across through around from toward slightly mostly partly clearly warm cold wet dry open closed empty
full morning evening summer winter city village market kitchen bridge tower boat train bicycle shirt jacket hat hand
face hair eye
"""
_SYLLABLES = "ba do ri lo men tar vi shu kel no pra gin sto el wa tri mo fen du car li ost ne hal zi"


def web_sizes(count: int, rng: np.random.Generator, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [count] heights and widths: areas log-uniform in low^2 .. high^2 pixels, aspect ratios in 1:2 .. 2:1."""
    side = np.exp(rng.uniform(np.log(low), np.log(high), count))
    stretch = np.exp2(rng.uniform(-0.5, 0.5, count))
    return np.rint(side * stretch).astype(np.int64), np.rint(side / stretch).astype(np.int64)


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
    """JPEGs cut from a few base pictures, shifted, flipped and dimmed."""
    rng = np.random.default_rng([job, 1])
    bases = [_base_picture(rng) for _ in range(min(_BASES_PER_JOB, count))]
    photos = []
    for i, (height, width) in enumerate(zip(*web_sizes(count, rng, low, high), strict=True)):
        top, left = rng.integers(0, _BASE_SIDE, 2)
        rows, columns = (np.arange(height) + top) % _BASE_SIDE, (np.arange(width) + left) % _BASE_SIDE
        pixels = bases[i % len(bases)][rows[:, None], columns[None, :: rng.choice((-1, 1))]]
        image = Image.fromarray(pixels).point((np.arange(256) * rng.uniform(0.7, 1.0)).astype(np.uint8).tolist() * 3)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


def render_photos(count: int, low: int, high: int, workers: int) -> list[bytes]:
    """``count`` JPEGs with areas of low^2 to high^2 pixels, the same for any number of workers."""
    sizes = [min(_PHOTOS_PER_JOB, count - start) for start in range(0, count, _PHOTOS_PER_JOB)]
    with WorkerPool(workers) as pool:
        jobs = [pool.submit(_render, job, size, low, high) for job, size in enumerate(sizes)]
        return [photo for job in jobs for photo in job.result()]


def _sentences(words: int, rng: np.random.Generator) -> str:
    """Text of ``words`` words: common ones by Zipf's law, one in twelve rare."""
    common, syllables = _COMMON_WORDS.split(), _SYLLABLES.split()
    chance = 1 / (np.arange(len(common)) + 3.0)
    text: list[str] = []
    left = 0  # words of the sentence
    for word in rng.choice(common, words, p=chance / chance.sum()).tolist():
        if rng.random() < 1 / 12:
            word = "".join(rng.choice(syllables, int(rng.integers(2, 5))))
        if left == 0:
            word, left = word.capitalize(), int(rng.integers(8, 17))
        left -= 1
        text.append(word + ("." if left == 0 else "," if rng.random() < 0.06 else ""))
    return " ".join(text).rstrip(",.") + "."


def write_captions(count: int, stage: str, tokenizer: Path) -> list[str]:
    """Captions of a stage; token counts are lognormal around the stage's mean."""
    rng = np.random.default_rng(2)
    sample = _sentences(3000, rng)
    words_per_token = 3000 / len(load_tokenizer(tokenizer).encode(sample))
    words = lognormal(count, ANSWER_TOKENS[stage], rng) * words_per_token
    return [_sentences(max(3, round(n)), rng) for n in words]


def lognormal(count: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """float64 [count], lognormal with the given mean and a spread of about a third."""
    sigma = 0.35
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)


def train_tokenizer(path: Path) -> None:
    """Train a byte-level BPE ``tokenizer.json`` on such captions, for a machine without a real one."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(3)
    backend.train_from_iterator([DEFAULT_PROMPT, *(_sentences(500, rng) for _ in range(20))], trainer)
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


def plan_rows(stage: str, count: int, seed: int) -> np.ndarray:
    """PLAN_ROW [count] of a stage's samples: web images, and text around the stage's mean.

    Almost all images reach the native mode's limit, as the paper's 1200 tokens per sample imply.
    """
    rng = np.random.default_rng([seed, 4])
    rows = np.empty(count, PLAN_ROW)
    rows["height"], rows["width"] = web_sizes(count, rng, 480, 1600)
    answers = np.rint(lognormal(count, ANSWER_TOKENS[stage], rng)).astype(np.int64) + CLOSING_TOKENS
    rows["text_tokens"], rows["loss_tokens"] = answers + PROMPT_TOKENS, answers
    return rows


def write_table(manifest: str, rows: np.ndarray, repeats: int, shards: int, report: Callable[[], object]) -> None:
    """Write a manifest and planning file without shards, for tokenizer "none": ``rows``, repeated.

    ``report`` is called after each repeat. Afterwards the file is on disk and not in the page cache.
    """
    samples = len(rows) * repeats
    plan, _ = manifest_paths(manifest)
    content, digest = rows.tobytes(), hashlib.sha256()
    with open(plan, "wb") as file:
        for _ in range(repeats):
            file.write(content)
            digest.update(content)
            report()
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ends = [samples * (i + 1) // shards for i in range(shards)]
    tree = {
        "format": MANIFEST_FORMAT,
        "tokenizer": "none",
        "prompt": DEFAULT_PROMPT,
        "samples": samples,
        "plan_sha256": digest.hexdigest(),
        "shards": [
            {"path": f"shard-{i:06d}.tar", "samples": end - start, "digest": f"{i:064x}"}
            for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ],
    }
    Path(manifest).write_text(json.dumps(tree, indent=1))


class BenchData:
    """Data of the sections, generated on first use.

    Args:
        folder: folder for generated files.
        quick: generate little data.
        users_shards: a folder of the user's shards, or "".
        tokenizer: tokenizer file; "": train one.
    """

    def __init__(self, folder: Path, quick: bool, users_shards: str, tokenizer: str) -> None:
        self.folder, self.quick, self.users_shards, self.tokenizer = folder, quick, users_shards, tokenizer
        self.workers = len(os.sched_getaffinity(0))
        self.rounds = 2 if quick else 5
        if not tokenizer:
            self.tokenizer = str(folder / "tokenizer.json")
            train_tokenizer(Path(self.tokenizer))

    @functools.cached_property
    def photos(self) -> list[bytes]:
        """Photos of web sizes."""
        count, high = (48, 512) if self.quick else (768, 1024)
        return render_photos(count, 256, high, self.workers)

    def shards(self, stage: str, repeats: int, per_shard: int) -> list[str]:
        """Shards of the repeated photos with captions of a stage; not indexed."""
        captions = write_captions(len(self.photos) * repeats, stage, Path(self.tokenizer))
        return write_shards(
            self.folder / f"{stage} x {repeats} by {per_shard}", self.photos * repeats, captions, per_shard
        )

    def index(self, shards: list[str]) -> None:
        """Index shards with ``prepare_data.py``'s workers."""
        _, problems = index_shards(shards, self.tokenizer, DEFAULT_PROMPT, self.workers)
        if problems:
            sys.exit("\n".join(problems))

    @functools.cached_property
    def indexed(self) -> dict[str, list[str]]:
        """{stage: indexed shards of the photos with its captions}."""
        stages = {stage: self.shards(stage, 1, -(-len(self.photos) // 3)) for stage in ANSWER_TOKENS}
        self.index([shard for shards in stages.values() for shard in shards])
        return stages

    def linked_shards(self) -> list[str]:
        """Links to the user's first shards; their indexes are written beside the links."""
        links = []
        for shard in expand_shards([self.users_shards], "--data")[:_USERS_SHARDS]:
            links.append(str(self.folder / Path(shard).name))
            os.symlink(os.path.abspath(shard), links[-1])
        self.index(links)
        return links

    def table(self, name: str, stage: str, samples: int, shards: int) -> str:
        """A manifest of simulated samples, a million of them distinct."""
        manifest = str(self.folder / f"{name}.dataset.json")
        block = min(samples, 1_000_000)
        with tqdm(total=samples, desc="planning file", unit="sample", unit_scale=True, file=sys.stderr) as bar:
            rows = plan_rows(stage, block, 0)
            write_table(manifest, rows, samples // block, shards, lambda: bar.update(block))
        return manifest
