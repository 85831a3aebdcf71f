"""How well a language model reads an encoder: perplexity after tuning the projector (PPL1), then also the LLM (PPL2).

``PPL = exp(sum NLL / sum tokens)`` over the answer tokens and end tokens of held-out samples, with NLL in nats: one
ratio of sums, not a mean over samples or batches. Bits per answer byte, ``sum NLL / (ln 2 * sum bytes)``, also count
the end tokens' NLL, and compare language models with different tokenizers.

Both stages use AdamW without weight decay, warm-up over 3 % of the steps, then a cosine to 0, and gradients clipped to
norm 1 (LLaVA-NeXT's scripts, and the default of the trainer they use). Weights are float32 in any case: updates of 1e-5
would vanish in bf16. The encoder is frozen.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from genlip_megatron import atomic_write
from genlip_megatron.encoders.cache import CacheImage, FeatureCache
from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.evaluate import ranks, transforms
from genlip_megatron.evaluate.dialogues import exchanged_images
from genlip_megatron.evaluate.heads import cosine
from genlip_megatron.evaluate.language_model import LanguageModel
from genlip_megatron.evaluate.loading import TrainingBatches, each_in_workers, in_workers, this_ranks
from genlip_megatron.evaluate.probe_state import ProbeFolder, digest, fill, progress_bar
from genlip_megatron.evaluate.projector import Projector, Text, answer_nll, splice

PROJECTOR = "projector.safetensors"
_WARMUP, _CLIP = 0.03, 1.0


@dataclass(frozen=True)
class Sample:
    """The tokens of a sample and its image.

    Attributes:
        text: the tokens.
        image: number of the image in the list of all images.
        image_stamp: changes when the image may have.
    """

    text: Text
    image: int
    image_stamp: str

    @property
    def stamp(self) -> str:
        """Changes when the image or a token does."""
        return f"{self.image_stamp} {self.text}"


@dataclass(frozen=True)
class Stage:
    """One of the two trainings.

    Attributes:
        name: "ppl1" or "ppl2".
        train_llm: whether the language model is trained with the projector.
        learning_rate: its peak.
        train, val: the samples.
    """

    name: str
    train_llm: bool
    learning_rate: float
    train: Sequence[Sample]
    val: Sequence[Sample]

    def steps(self, options: Options) -> int:
        """Number of updates."""
        steps = max(1, options.epochs * len(self.train) // options.batch_size)
        return min(steps, options.max_steps) if options.max_steps else steps


@dataclass(frozen=True)
class Options:
    """What is equal in both stages.

    Attributes:
        size: side of the images in pixels.
        cache: folder of features; None: they are computed for each batch.
        batch_size: samples of an update, of all ranks together.
        micro_batch_size: samples of a forward pass.
        epochs: passes over the training samples; samples after the last whole batch are left out.
        max_steps: most updates of a stage; 0: no limit.
        seed: of the projector's initial weights and the order of samples.
        save_interval: steps between two saved states.
        workers: processes that read images.
        cache_dtype: of the cache's files.
        bf16: compute the projector and the language model in bf16 (autocast).
    """

    size: int
    cache: Path | None
    batch_size: int = 128
    micro_batch_size: int = 8
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0
    save_interval: int = 500
    workers: int = 0
    cache_dtype: torch.dtype = torch.float32
    bf16: bool = False


@dataclass(frozen=True)
class Score:
    """Sums over the answers of held-out samples.

    Attributes:
        nll: in nats.
        tokens: answer tokens and end tokens.
        answer_bytes: without end tokens.

    >>> score = Score(nll=4 * math.log(2), tokens=2, answer_bytes=1)
    >>> score.perplexity, score.bits_per_byte
    (4.0, 4.0)
    """

    nll: float
    tokens: int
    answer_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL of a token."""
        return math.exp(min(700.0, self.nll / self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """NLL in bits, by the length of the answers."""
        return self.nll / (math.log(2) * self.answer_bytes)


@dataclass
class VisualFeatures:
    """Patch features of numbered images, from a cache or computed for each batch.

    Args:
        encoder: frozen.
        images: those that the numbers name.
        options: the size of the images, and where the cache goes.

    Raises:
        ValueError: the cache folder holds other features.
    """

    encoder: Encoder
    images: Sequence[CacheImage]
    options: Options
    _cache: FeatureCache | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.options.cache is not None:
            name = f"short side {self.options.size} and crop"
            dtype = self.options.cache_dtype
            self._cache = FeatureCache(
                self.options.cache, self.encoder, self.images, self._view, name, dtype, read=self._read
            )

    def _view(self, image: Image.Image) -> Tensor:
        size = self.options.size
        resized = transforms.resize_short(image, size, Image.Resampling.BICUBIC)
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        return self.encoder.to_tensor(resized.crop((left, top, left + size, top + size)))

    def _tensor(self, number: int) -> Tensor:
        return self._view(self.images[number].read())

    def _read(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        return each_in_workers(self._tensor, numbers, self.options.workers)

    def fill(self) -> None:
        """Compute the cache's missing features on all ranks."""
        if self._cache is not None:
            fill(self._cache, f"{self.encoder.name} features")

    def batches(self, jobs: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        """Features [n, D] of the images of each job, on the encoder's device."""
        if self._cache is not None:
            cache = self._cache
            yield from ([cache[number][0].to(self.encoder.device) for number in job] for job in jobs)
            return
        for views in in_workers(lambda job: [self._tensor(number) for number in job], jobs, self.options.workers):
            with torch.no_grad():  # not around ``yield``: it would stay off for the caller
                found = [features.patches for features in self.encoder.encode(views)]
            yield found


def settings(encoder: Encoder, language: LanguageModel, stages: Sequence[Stage], options: Options) -> dict[str, Any]:
    """What decides the result of the last of ``stages``."""
    facts: dict[str, Any] = {}
    for stage in stages:
        facts |= {
            f"{stage.name} learning rate": stage.learning_rate,
            f"{stage.name} steps": stage.steps(options),
            f"{stage.name} training data": digest(stage.train),
            f"{stage.name} held-out data": digest(stage.val),
        }
    return {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "llm": language.name,
        "llm_fingerprint": language.fingerprint,
        "size": options.size,
        "visual_tokens": math.prod(encoder.grid(options.size, options.size)),
        "batch_size": options.batch_size,
        "seed": options.seed,
        "dtype": "bf16" if options.bf16 else "fp32",
        **facts,
    }


def measure(
    encoder: Encoder,
    language: LanguageModel,
    features: VisualFeatures,
    stages: Sequence[Stage],
    options: Options,
    folders: Sequence[ProbeFolder],
) -> list[dict[str, Any]]:
    """The results of the stages, each after training it; a finished stage is not trained again.

    Args:
        encoder: frozen.
        language: its weights are those it was opened with, and are so again at the end.
        features: of the encoder.
        stages: PPL1, then perhaps PPL2, which starts from the projector of PPL1.
        options: of both stages.
        folders: one of each stage, with its ``settings``.

    Returns:
        of each stage "perplexity", "shuffled" and "without_image" with their "bits_per_byte", and facts.
    """
    results = []
    weights = folders[0].folder / PROJECTOR
    if any(folder.result() is None for folder in folders):
        features.fill()
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        result = folder.result()
        if result is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                projector = Projector(encoder.dim, language.dim)
            if number:
                projector.load_state_dict(load_file(weights))
            projector.to(encoder.device)
            begin = time.monotonic()
            train(stage, projector, language, features, options, folder)
            result = _scores(stage, projector, language, features, options)
            if stage.train_llm:
                language.restore()
            if ranks.rank() == 0:
                with atomic_write.atomic_path(folder.folder / PROJECTOR) as partial:
                    save_file({name: tensor.cpu() for name, tensor in projector.state_dict().items()}, partial)
            result |= {
                "learning_rate": stage.learning_rate,
                "steps": stage.steps(options),
                "train_samples": len(stage.train),
                "val_samples": len(stage.val),
                "seconds": round(time.monotonic() - begin, 1),
            }
            result = folder.finish(result)
        results.append(result)
    return results


def train(
    stage: Stage,
    projector: Projector,
    language: LanguageModel,
    features: VisualFeatures,
    options: Options,
    folder: ProbeFolder,
) -> None:
    """Train the projector, and with ``stage.train_llm`` the language model, in place.

    The loss of an update is the mean over the answer tokens of its whole batch, so it does not depend on the
    micro-batch size or the number of ranks.

    Args:
        stage, projector, language, features, options: as in ``measure``.
        folder: a killed training resumes from it.

    Raises:
        ValueError: the loss is not finite.
    """
    name, device, steps = features.encoder.name, features.encoder.device, stage.steps(options)
    trained = {f"projector.{key}": value for key, value in projector.named_parameters()}
    if stage.train_llm:
        language.model.requires_grad_(True)
        trained |= {f"llm.{key}": value for key, value in language.model.named_parameters()}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    first = _restore(folder, trained, optimizer, device)
    batches = TrainingBatches(np.arange(len(stage.train)), options.seed, first, steps, options.batch_size)
    samples = [[stage.train[number] for number, _ in batch] for batch in batches]
    micro = [list(_parts(batch, options.micro_batch_size)) for batch in samples]
    visual = features.batches([[sample.image for sample in part] for batch in micro for part in batch])
    peak = torch.tensor([stage.learning_rate])
    with progress_bar(steps, first, f"{name} {stage.name} training", "step") as bar:
        for step, batch in zip(range(first, steps), micro, strict=True):
            count = torch.tensor(float(sum(sum(sample.text.answers) for part in batch for sample in part)))
            tokens = float(ranks.total(count.to(device)))
            total = torch.zeros((), device=device)
            for part in batch:
                nll = _nll(part, next(visual), projector, language, options)
                (nll * (ranks.world_size() / tokens)).backward()
                total += nll.detach()
            loss = float(ranks.total(total)) / tokens
            if not math.isfinite(loss):
                raise ValueError(
                    f"--lr{1 + stage.train_llm} {stage.learning_rate}: the loss of {name} is {loss} at step "
                    f"{step + 1}. Choose a lower learning rate, or --dtype fp32."
                )
            ranks.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
            rate = cosine(step + 1, steps + 1, math.ceil(_WARMUP * steps), peak)
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if (step + 1) % options.save_interval == 0 or step + 1 == steps:
                folder.save(step + 1, _state(trained, optimizer))
    language.model.requires_grad_(False)


@torch.no_grad()
def score(
    samples: Sequence[Sample],
    images: Sequence[int] | None,
    projector: Projector,
    language: LanguageModel,
    features: VisualFeatures,
    options: Options,
    progress: Any = lambda samples: None,
) -> Score:
    """The sums over ``samples`` on all ranks.

    Args:
        samples: held out.
        images: number of the image that each sample gets; None: no image.
        projector, language, features, options: as in ``train``.
        progress: called with the number of samples that are done.
    """
    jobs = this_ranks(np.arange(len(samples)), options.micro_batch_size)
    sums = torch.zeros(3, dtype=torch.float64)
    visual: Iterator[list[Tensor] | None] = itertools.repeat(None)
    if images is not None:
        visual = features.batches([[images[number] for number in job] for job in jobs])
    for job, tokens in zip(jobs, visual, strict=False):
        chosen = [samples[number] for number in job]
        nll = float(_nll(chosen, tokens, projector, language, options))
        counts = [(sum(sample.text.answers), sample.text.answer_bytes) for sample in chosen]
        sums += torch.tensor([nll, *(sum(column) for column in zip(*counts, strict=True))], dtype=torch.float64)
        progress(len(job))
    nll, count, size = ranks.total(sums.to(features.encoder.device)).tolist()
    return Score(nll, int(count), int(size))


def _scores(
    stage: Stage,
    projector: Projector,
    language: LanguageModel,
    features: VisualFeatures,
    options: Options,
) -> dict[str, Any]:
    own = [sample.image for sample in stage.val]
    conditions = {"image": own, "shuffled": exchanged_images(own, options.seed), "without_image": None}
    found: dict[str, Any] = {}
    with progress_bar(3 * len(own), 0, f"{features.encoder.name} {stage.name} held out", "sample") as bar:
        for condition, images in conditions.items():
            update = lambda samples: bar.update(samples * ranks.world_size())  # noqa: E731
            result = score(stage.val, images, projector, language, features, options, update)
            found[condition] = {
                "perplexity": round(result.perplexity, 6),
                "bits_per_byte": round(result.bits_per_byte, 6),
            }
    return {**found, "tokens": result.tokens, "answer_bytes": result.answer_bytes}


def _nll(
    samples: Sequence[Sample],
    features: list[Tensor] | None,
    projector: Projector,
    language: LanguageModel,
    options: Options,
) -> Tensor:
    device = next(projector.parameters()).device
    texts = [sample.text for sample in samples]
    precision = torch.autocast(device.type, torch.bfloat16) if options.bf16 else contextlib.nullcontext()
    with precision:
        visual: Sequence[Tensor | None] = [None] * len(texts)
        if features is not None:
            projected = projector(torch.cat(features).float())
            visual = projected.split([len(tokens) for tokens in features])
        return answer_nll(language.model, splice(texts, visual, language.model.get_input_embeddings()))


def _parts(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _state(trained: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {key: value.detach() for key, value in trained.items()}
    for key, parameter in trained.items():
        tensors |= {f"optimizer.{kind}.{key}": value for kind, value in optimizer.state[parameter].items()}
    return tensors


def _restore(
    folder: ProbeFolder, trained: dict[str, Any], optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Load the state of a killed training; returns the number of steps done."""
    first, tensors = folder.load(device)
    if not tensors:
        return 0
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(tensors[key])
            state = {kind: tensors[f"optimizer.{kind}.{key}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {**state, "step": state["step"].cpu()}
    return first
