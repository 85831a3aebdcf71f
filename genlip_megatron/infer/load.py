"""A model ready to be used, from a checkpoint of a run or from a Hugging Face folder.

The weights of a Megatron checkpoint of any layout are read a parameter at a time, by their released names, into the
Hugging Face model: there is one inference, with a key-value cache, and it needs neither process groups nor the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.convert.hf_folder import hf_config, preprocessor_config
from genlip_megatron.convert.source import DTYPES, to_dtype
from genlip_megatron.data.text import Tokenizer, load_tokenizer
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, GenLIPVisionModel
from genlip_megatron.model.state_dict import in_encoder, model_parameters

_PIXEL_FIELDS = ("image_mode", "size", "fixed_resize", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: on its device, in evaluation mode.
        image_processor: makes its images.
        tokenizer: None when the vision encoder alone was loaded.
        prompt: that its captions were trained with.
        place: the checkpoint or folder that was read.
        step: after which it was saved; None when the folder does not say.
    """

    model: Any
    image_processor: GenLIPImageProcessor
    tokenizer: Tokenizer | None
    prompt: str
    place: Path
    step: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the GPU if there is one.

    Raises:
        ValueError: no device of this name, or none in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError("another kind of device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); allowed are auto, cpu and cuda[:N]") from None
    return device


def load(
    place: str | Path,
    log: Callable[[str], None],
    encoder_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    tokenizer: str = "",
    progress: Callable[[int], Any] = lambda size: None,
) -> Loaded:
    """The model of a run's newest good checkpoint, of one checkpoint, or of a Hugging Face folder.

    Args:
        place: folder of a run, of a checkpoint (``iter_NNNNNNN``), or an exported or released folder.
        log: told of damaged checkpoints that are passed over, and of a folder without image settings.
        encoder_only: the vision encoder without text parts and tokenizer.
        device: where to put it.
        dtype: "fp32", "bf16" or "fp16"; "auto": as the weights are stored.
        tokenizer: file to use instead of the one that the checkpoint or folder names.
        progress: told the bytes of a checkpoint as they are read.

    Raises:
        ValueError: nothing that can be used is there, its tokenizer is another, or a weight does not fit the dtype;
            says what to do.
    """
    place = Path(place)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {dtype}: allowed are auto, {', '.join(DTYPES)}")
    if not place.is_dir():
        raise ValueError(f"--load {place}: no such folder; name a run, a checkpoint iter_NNNNNNN or an exported folder")
    wanted = None if dtype == "auto" else DTYPES[dtype]
    kind = GenLIPVisionModel if encoder_only else GenLIPForCausalLM
    released = bool([*place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")])
    read = _from_released if released else _from_checkpoint
    loaded = read(place, kind, wanted, tokenizer, log, progress)
    loaded.model.requires_grad_(False).eval().to(device)
    return loaded


def _from_checkpoint(
    place: Path,
    kind: Any,
    dtype: torch.dtype | None,
    tokenizer: str,
    log: Callable[[str], None],
    progress: Callable[[int], Any],
) -> Loaded:
    """From a Megatron checkpoint."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.checkpoint import loading
    from genlip_megatron.convert.conversion import open_checkpoint

    try:
        place, saved, source = open_checkpoint(place, log, progress)
    except ValueError as error:
        raise ValueError(f"--load {error}") from None
    config = loading.read_config(place)
    whole = kind is GenLIPForCausalLM
    reader = _tokenizer(tokenizer or config.data.tokenizer, config.model.vocab_size) if whole else None
    if reader is not None and reader.fingerprint != saved.tokenizer:
        raise ValueError(
            f"--tokenizer {tokenizer or config.data.tokenizer}: not the tokenizer of {place}: its fingerprint is "
            f"{reader.fingerprint}, the checkpoint's {saved.tokenizer}; name the right file"
        )
    with torch.device("meta"):
        model = kind(GenLIPConfig(**_model_fields(hf_config(config.model))))
    weights: dict[str, Tensor] = {}
    for parameter in model_parameters(source.model):
        if whole or any(map(in_encoder, parameter.shapes)):
            for name, tensor in zip(parameter.shapes, source.read(parameter), strict=True):
                # A copy: what is read may be a view into the mapped file.
                weights[name] = to_dtype(name, tensor, dtype or tensor.dtype).clone()
    model.load_state_dict(weights, assign=True)
    return Loaded(
        model, images_of(preprocessor_config(config.data)), reader, config.data.prompt, place, saved.iteration
    )


def _from_released(
    place: Path,
    kind: Any,
    dtype: torch.dtype | None,
    tokenizer: str,
    log: Callable[[str], None],
    progress: Callable[[int], Any],
) -> Loaded:
    """From a folder in the authors' format."""
    from genlip_megatron.convert.conversion import folder_images, folder_prompt, open_released, read_json
    from genlip_megatron.convert.safetensors_file import check_dtype, contents

    stored = contents(place)
    whole = kind is GenLIPForCausalLM
    if "embeddings.weight" in stored:
        # Released configurations leave out what the weights' shapes say.
        fields = hf_config(open_released(place, heads_hint="in its config.json").model)
    elif whole:
        raise ValueError(f"--load {place}: the vision encoder alone, without text; captions need a whole model")
    elif not (place / "config.json").is_file():
        raise ValueError(f"--load {place}: no config.json there, which says the sizes of a vision encoder alone")
    else:
        fields = read_json(place / "config.json")
    try:
        config = GenLIPConfig(**_model_fields(fields))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--load {place}: config.json: {error}") from None
    reader = _tokenizer(tokenizer or str(place / "tokenizer.json"), config.vocab_size) if whole else None
    images, prompt = images_of(folder_images(place, log)), folder_prompt(place)
    if dtype is not None:
        check_dtype(place, dtype, lambda name: whole or in_encoder(name))
    model = kind.from_pretrained(place, config=config, dtype=dtype or "auto")
    return Loaded(model, images, reader, prompt, place)


def _model_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a ``GenLIPConfig`` among the fields of a ``config.json``."""
    return {name: value for name, value in fields.items() if name not in ("architectures", "auto_map", "dtype")}


def images_of(fields: dict[str, Any]) -> GenLIPImageProcessor:
    """The image processor of the fields of a ``preprocessor_config.json``."""
    return GenLIPImageProcessor(**{name: fields[name] for name in _PIXEL_FIELDS if name in fields})


def _tokenizer(path: str, vocab_size: int) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, which should be the model's tokenizer; name it with --tokenizer")
    return load_tokenizer(path, vocab_size)


def override_images(
    processor: GenLIPImageProcessor,
    image_mode: str | None = None,
    image_size: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> GenLIPImageProcessor:
    """``processor`` with other settings where these are given.

    Args:
        image_mode: "fixed" or "native".
        image_size: side in pixels, in fixed mode.
        min_pixels, max_pixels: area, in native mode.

    Raises:
        ValueError: a setting that is not allowed, or of the other mode.
    """
    mode = image_mode or processor.image_mode
    given = {"image_size": image_size, "min_pixels": min_pixels, "max_pixels": max_pixels}
    for name, value in given.items():
        needed = "fixed" if name == "image_size" else "native"
        if value is not None and mode != needed:
            raise ValueError(f"--{name.replace('_', '-')} {value}: of {needed} images, and these are {mode}")
    return GenLIPImageProcessor(
        image_mode=mode,
        size=processor.size if image_size is None else image_size,
        fixed_resize=processor.fixed_resize,
        min_pixels=processor.min_pixels if min_pixels is None else min_pixels,
        max_pixels=processor.max_pixels if max_pixels is None else max_pixels,
    )
