"""Attention analysis of models over images: GenLIP with generated captions, other encoders with their patches only."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genlip_megatron.convert.safetensors_file import contents
from genlip_megatron.encoders.genlip import GenLIPEncoder
from genlip_megatron.encoders.hugging_face import HuggingFaceEncoder
from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.encoders.others import TimmEncoder
from genlip_megatron.encoders.random_weights import randomised
from genlip_megatron.encoders.registry import open_encoder, parse_name
from genlip_megatron.evaluate.attention_capture import KEY_GROUPS, QUERY_GROUPS, Recorder
from genlip_megatron.evaluate.patch_statistics import NORM_EDGES
from genlip_megatron.hf.attention_genlip import PATCH_SIZE, to_patches
from genlip_megatron.hf.image_processing_genlip import to_rgb
from genlip_megatron.infer.caption import Captioner, Decoding, prompt_ids
from genlip_megatron.infer.inputs import FileImage, ShardImage
from genlip_megatron.infer.load import Loaded, load, override_images
from genlip_megatron.infer.prepare import Prepared
from genlip_megatron.log import to_stderr

MAP_LAYERS, MAP_GENERATED = (2, 3, 15), 30  # layers from 1, and the last one; generated tokens: Fig. 11
CURVES = ("gate", "closed", "largest_image", "largest_text", "cosine", "outliers")


@dataclass(frozen=True)
class ImageInput:
    """An image as a model reads it, or an error.

    Attributes:
        name: its path or key.
        pixels: float32 [3, height, width], normalised; None if there is an ``error``.
        error: why it cannot be used; "" for a good image.
    """

    name: str
    pixels: Tensor | None
    error: str = ""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers.

    Attributes:
        max_new_tokens: most generated tokens of an image.
        exclude_self: the image's queries leave out the first token of the sequence.
        block: queries that are processed at once.
    """

    max_new_tokens: int = 256
    exclude_self: bool = False
    block: int = 256


@dataclass(frozen=True)
class Subject:
    """A model to analyse.

    Attributes:
        name: as the user named it.
        encoder: the whole model behind the interface of encoders.
        loaded: a GenLIP with its text parts; None: an encoder without text.
        prompt: text before the generated tokens.
        prompt_ids: its tokens.
        size: side of the images in pixels, for encoders of others; None: as each encoder wants it.
    """

    name: str
    encoder: Encoder
    loaded: Loaded | None
    prompt: str = ""
    prompt_ids: Sequence[int] = ()
    size: int | None = None

    def prepare(self, image: FileImage | ShardImage) -> ImageInput:
        """Read, resize and normalise an image; errors go into ``error``."""
        (name,) = image.name.values()
        try:
            pixels = Image.fromarray(image.read())
            if self.size is not None:
                square = to_rgb(pixels).resize((self.size, self.size), Image.Resampling.BICUBIC)
                return ImageInput(name, self.encoder.to_tensor(square))
            return ImageInput(name, self.encoder.preprocess(pixels))
        except ValueError as error:
            return ImageInput(name, None, " ".join(str(error).split()))

    def grid(self, image: ImageInput) -> tuple[int, int]:
        """Rows and columns of patches of an image without an error.

        Raises:
            ValueError: the encoder cannot read images of this size.
        """
        assert image.pixels is not None
        height, width = image.pixels.shape[1:]
        self.encoder.check_size(height, width)
        return self.encoder.grid(height, width)

    def blocks(self) -> list[nn.Module]:
        """Its layers; [] if it is no Transformer."""
        module: Any = self.encoder.module
        if isinstance(self.encoder, TimmEncoder):
            return list(module.blocks)
        if not isinstance(self.encoder, (GenLIPEncoder, HuggingFaceEncoder)):
            return []
        lists = [list(child) for child in module.modules() if isinstance(child, nn.ModuleList)]
        return max(lists, key=len)

    def with_images_of(self, size: int) -> Subject:
        """The same GenLIP, with square images of ``size`` pixels."""
        assert isinstance(self.encoder, GenLIPEncoder)
        processor = override_images(self.encoder.processor, {"image_mode": "fixed", "image_size": size})
        return replace(self, encoder=GenLIPEncoder(self.name, self.encoder.module, processor))


def open_subject(
    name: str,
    *,
    device: torch.device,
    dtype: str,
    tokenizer: str = "",
    prompt: str | None = None,
    images: dict[str, Any] | None = None,
) -> Subject:
    """Open a model.

    Args:
        name: ``[random:]PLACE``, a run, checkpoint or folder that ``infer/load.py`` loads, or an encoder as
            ``encoders/registry.py`` names it.
        device: where its weights go.
        dtype: "fp32", "bf16", "fp16", or "auto": that of the stored weights.
        tokenizer: as ``load``.
        prompt: text before the generated tokens; None: that of the training.
        images: arguments of ``override_images``; an encoder of others takes only ``image_size``.

    Raises:
        ValueError: it cannot be opened, or a setting does not fit it.
    """
    images = images or {}
    kind, where, random_weights = parse_name(name, flag="--load")
    place = Path(where)
    if kind == "genlip" and not _is_encoder_only(place):
        loaded = load(place, to_stderr, device=device, dtype=dtype, tokenizer=tokenizer)
        if random_weights:
            loaded = replace(loaded, model=randomised(loaded.model))
        processor = override_images(loaded.image_processor, images)
        encoder: Encoder = GenLIPEncoder(name, loaded.model, processor)
        prompt = loaded.prompt if prompt is None else prompt
        return Subject(name, encoder, loaded, prompt, prompt_ids(loaded.tokenizer, prompt))
    encoder = open_encoder(name, device=device, dtype="stored" if dtype == "auto" else dtype, log=to_stderr)
    if isinstance(encoder, GenLIPEncoder):
        processor = override_images(encoder.processor, images)
        return Subject(name, GenLIPEncoder(name, encoder.module, processor), None)
    for flag, value in images.items():
        if value is not None and flag != "image_size" and value != "fixed":
            raise ValueError(
                f"--{flag.replace('_', '-')} {value}: {name} is no GenLIP. Use --image-mode fixed and --image-size."
            )
    return Subject(name, encoder, None, size=images.get("image_size"))


def _is_encoder_only(place: Path) -> bool:
    """Whether an exported folder holds only a vision encoder."""
    return any(place.glob("*.safetensors*")) and "embeddings.weight" not in contents(place)


def unify_dtypes(subjects: Sequence[Subject]) -> None:
    """Convert all models to the smallest dtype that holds the weights of each, so that no number is lost."""
    dtypes = [subject.encoder.dtype for subject in subjects]
    for subject in subjects:
        subject.encoder.module.to(functools.reduce(torch.promote_types, dtypes))


def check_grids(subjects: Sequence[Subject], images: Sequence[FileImage | ShardImage], allow_unequal: bool) -> None:
    """Compare the grids of patches that the models make of each usable image.

    Raises:
        ValueError: they differ, or a model cannot read an image.
    """
    for image in images:
        prepared = [subject.prepare(image) for subject in subjects]
        if any(one.error for one in prepared):
            continue
        grids = [subject.grid(one) for subject, one in zip(subjects, prepared, strict=True)]
        if len(set(grids)) > 1 and not allow_unequal:
            listed = ", ".join(f"{one.name} {h}x{w}" for one, (h, w) in zip(subjects, grids, strict=True))
            raise ValueError(
                f"--load: unequal grids of patches: {listed}. Attention mass depends on the number of keys. Choose "
                "--image-size, or pass --allow-unequal."
            )


def generate(subject: Subject, images: Sequence[ImageInput], max_new_tokens: int) -> list[list[int]]:
    """Token ids that the model generates greedily for each image, without the end token; none without text parts."""
    if subject.loaded is None:
        return [[] for _ in images]
    captioner = Captioner(subject.loaded, subject.prompt, Decoding(max_new_tokens=max_new_tokens))
    return captioner.tokens([_prepared(image) for image in images])


@torch.inference_mode()
def record(
    subject: Subject,
    image: ImageInput,
    generated: Sequence[int],
    settings: Settings,
    maps: Sequence[int] = (),
) -> Recorder:
    """Measure one teacher-forced pass over the image, the prompt and the generated tokens.

    Attention is causal among text tokens, so this pass has the attention of the generation.

    Args:
        subject: the model.
        image: without an error.
        generated: token ids of ``generate``.
        settings: what decides the numbers.
        maps: numbers of layers, from 1, whose maps are kept.
    """
    assert image.pixels is not None
    rows, columns = subject.grid(image)
    recorder = Recorder(
        subject.encoder.module,
        subject.blocks(),
        image=rows * columns,
        prompt=len(subject.prompt_ids),
        generated=len(generated),
        exclude_self=settings.exclude_self,
        block=settings.block,
        maps=maps,
    )
    with recorder:
        if subject.loaded is None:
            (features,) = subject.encoder.encode([image.pixels])
        else:
            model, device = subject.encoder.module, subject.encoder.device
            ids = torch.tensor([[*subject.prompt_ids, *generated]], device=device)
            model(ids, image.pixels[None].to(device), use_cache=False, logits_to_keep=1)
    if not recorder.blocks:
        recorder.measure(features.patches)
    return recorder


def measure(
    subject: Subject, images: Sequence[FileImage | ShardImage], settings: Settings, batch_size: int
) -> Iterator[tuple[ImageInput, Recorder | None]]:
    """(image, its measurements) of every image in order; None for an image with an error.

    Args:
        subject: the model.
        images: to measure, each as one sequence.
        settings: what decides the numbers.
        batch_size: images per generation batch.
    """
    for start in range(0, len(images), batch_size):
        batch = [subject.prepare(images[number]) for number in range(start, min(start + batch_size, len(images)))]
        good = [image for image in batch if not image.error]
        texts = iter(generate(subject, good, settings.max_new_tokens) if good else ())
        for image in batch:
            if image.error:
                yield image, None
                continue
            recorder = record(subject, image, next(texts), settings)
            if recorder.layers[-1].largest_image is None or not np.isfinite(recorder.layers[-1].largest_image):
                yield replace(image, error="its activations are not all finite numbers"), None
            else:
                yield image, recorder


def map_image(
    subject: Subject, images: Sequence[FileImage | ShardImage], layers: Sequence[int], size: int
) -> Recorder | None:
    """Attention maps of the first usable image, resized to ``size`` x ``size`` pixels, as in Fig. 11.

    None for an encoder without text, or if no image can be used.

    Args:
        subject: the model.
        images: the inputs.
        layers: numbers of layers, from 1.
        size: in pixels, a multiple of 16.
    """
    if subject.loaded is None:
        return None
    subject = subject.with_images_of(size)
    for image in images:
        prepared = subject.prepare(image)
        if not prepared.error:
            (generated,) = generate(subject, [prepared], MAP_GENERATED)
            return record(subject, prepared, generated, Settings(), layers)
    return None


def summarise(subject: Subject, recorders: Sequence[Recorder]) -> dict[str, Any]:
    """Means over images, as plain lists for JSON; a number that no image has is None.

    ``mass`` and ``density`` (mass / size of the group of keys) are {group of queries: {group of keys: one number for
    each layer}}; ``chance_mass`` and ``chance_density``, of equal attention to all visible keys, have one number.
    """
    found: dict[str, Any] = {
        "name": subject.name,
        "place": str(subject.loaded.place) if subject.loaded else None,
        "step": subject.loaded.step if subject.loaded else None,
        "fingerprint": subject.encoder.fingerprint,
        "dtype": str(subject.encoder.dtype).removeprefix("torch."),
        "prompt": subject.prompt,
        "images": len(recorders),
        "layers": len(recorders[0].layers),
    }
    if all(recorder.tokens is not None for recorder in recorders):
        tokens = [recorder.tokens for recorder in recorders if recorder.tokens is not None]
        sizes = np.array([list(one.sizes().values()) for one in tokens], float)  # [images, G]
        masses = np.array([[_array(layer.mass) for layer in recorder.layers] for recorder in recorders])
        chances = np.array([_array(recorder.chance) for recorder in recorders])
        found["tokens"] = dict(zip(KEY_GROUPS, sizes.mean(axis=0).tolist(), strict=True))
        found["mass"], found["chance_mass"] = _table(_mean(masses)), _table(_mean(chances))
        sizes[sizes == 0] = np.nan
        found["density"] = _table(_mean(masses / sizes[:, None, None, :]))
        found["chance_density"] = _table(_mean(chances / sizes[:, None, :]))
    for name in CURVES:
        values = [[getattr(layer, name) for layer in recorder.layers] for recorder in recorders]
        curve = np.array(values, float)  # None becomes NaN
        if not np.isnan(curve).all():
            found[name] = _plain(_mean(curve) if "largest" not in name else np.nanmax(curve, axis=0))
    norms = torch.stack([recorder.norms for recorder in recorders if recorder.norms is not None]).sum(dim=0)
    found["norms"] = {"edges": list(NORM_EDGES), "share": (norms / norms.sum()).tolist()}
    found["not_applicable"] = _not_applicable(subject, found)
    return found


def _not_applicable(subject: Subject, found: dict[str, Any]) -> dict[str, str]:
    """{what is missing: why}."""
    reasons = {}
    if "mass" not in found:
        reasons["attention"] = "the model computes its attention where it cannot be read, or has none"
    if subject.loaded is None:
        reasons["generated tokens, allocation and maps"] = "an encoder without text"
    elif not found["tokens"]["generated"]:
        reasons["generated tokens and allocation"] = "the model ended every caption at once"
    if "gate" not in found:
        reasons["gate"] = "the model has no output gate"
    return reasons


def map_layers(layers: int, wanted: Sequence[int] | None = None) -> list[int]:
    """Numbers of the layers, from 1, whose maps are drawn.

    Args:
        layers: of the model.
        wanted: of the command line; None: the paper's 2, 3, 15 and the last, as far as they exist.

    Raises:
        ValueError: there is no such layer.

    >>> map_layers(12), map_layers(27)
    ([2, 3, 12], [2, 3, 15, 27])
    """
    if wanted is None:
        return sorted({*(number for number in MAP_LAYERS if number <= layers), layers})
    for number in wanted:
        if not 1 <= number <= layers:
            raise ValueError(f"--maps {number}: the model has layers 1 to {layers}")
    return sorted(set(wanted))


def _prepared(image: ImageInput) -> Prepared:
    assert image.pixels is not None
    rows, columns = (side // PATCH_SIZE for side in image.pixels.shape[1:])
    return Prepared(0, {}, to_patches(image.pixels[None]), rows, columns)


def _array(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.numpy()


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the numbers that exist; NaN where none does."""
    counts = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / counts


def _plain(values: np.ndarray) -> Any:
    """Nested lists with None for NaN."""
    if values.ndim:
        return [_plain(row) for row in values]
    return None if np.isnan(values) else float(values)


def _table(values: np.ndarray) -> dict[str, dict[str, Any]]:
    """[..., Q, G] as {group of queries: {group of keys: [...]}}."""
    return {
        query: {key: _plain(values[..., row, column]) for column, key in enumerate(KEY_GROUPS)}
        for row, query in enumerate(QUERY_GROUPS)
    }
