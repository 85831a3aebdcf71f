"""Load a model for inference, from a checkpoint of a run or from a Hugging Face folder.

The weights of a Megatron checkpoint of any layout are read one parameter at a time into the Hugging Face model. So
there is one inference path, with a key-value cache, and it needs neither process groups nor the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.convert.hf_folder import hf_config, preprocessor_config
from genlip_megatron.convert.source import DTYPES, to_dtype
from genlip_megatron.hf.configuration_genlip import GenLIPConfig
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM, GenLIPVisionModel
from genlip_megatron.model.state_dict import in_encoder, model_parameters
from genlip_megatron.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its image processor, tokenizer and prompt.

    Attributes:
        model: on its device, in evaluation mode.
        image_processor: prepares its images.
        tokenizer: None if only the vision encoder was loaded.
        prompt: prompt of its training.
        place: the checkpoint or folder that was read.
        step: training step of the checkpoint; None if the folder does not say.
    """

    model: Any
    image_processor: GenLIPImageProcessor
    tokenizer: Tokenizer | None
    prompt: str
    place: Path
    step: int | None = None


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU if the machine has one.

    Raises:
        ValueError: unknown name, or the machine has no such device.
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
        raise ValueError(f"--device {name}: cannot be used ({reason}). Allowed are auto, cpu and cuda[:N].") from None
    return device


def load(
    place: str | Path,
    log: Callable[[str], None],
    encoder_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    tokenizer: str = "",
) -> Loaded:
    """The model of a run's newest good checkpoint, of one checkpoint, or of a Hugging Face folder.

    Args:
        place: folder of a run, of a checkpoint (``iter_NNNNNNN``), or an exported or released folder.
        log: called with a line about each damaged checkpoint that is skipped, and about missing image settings.
        encoder_only: load only the vision encoder, without text parts and tokenizer.
        device: device to put the model on.
        dtype: "fp32", "bf16" or "fp16"; "auto": that of the stored weights.
        tokenizer: file to use instead of the one that the checkpoint or folder names.

    Raises:
        ValueError: no usable model, another tokenizer, or a weight that does not fit the dtype.
    """
    place = Path(place)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {dtype}: allowed are auto, {', '.join(DTYPES)}")
    if not place.is_dir():
        raise ValueError(
            f"--load {place}: no such folder. Name a run, a checkpoint iter_NNNNNNN or an exported folder."
        )
    released = bool([*place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")])
    read = _from_released if released else _from_checkpoint
    loaded = read(place, not encoder_only, DTYPES.get(dtype), tokenizer, log)
    loaded.model.requires_grad_(False).eval().to(device)
    return loaded


def _from_checkpoint(
    place: Path, whole: bool, dtype: torch.dtype | None, tokenizer: str, log: Callable[[str], None]
) -> Loaded:
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.checkpoint import loading
    from genlip_megatron.convert.conversion import open_checkpoint

    try:
        place, saved, source = open_checkpoint(place, log)
    except ValueError as error:
        raise ValueError(f"--load {error}") from None
    config = loading.read_config(place)
    tokenizer = tokenizer or config.data.tokenizer
    reader = _tokenizer(tokenizer, config.model.vocab_size) if whole else None
    if reader is not None and reader.fingerprint != saved.tokenizer:
        raise ValueError(
            f"--tokenizer {tokenizer}: not the tokenizer of {place}: its fingerprint is {reader.fingerprint}, the "
            f"checkpoint's {saved.tokenizer}. Name the right file."
        )
    with torch.device("meta"):
        model = _kind(whole)(_config(hf_config(config.model)))
    weights: dict[str, Tensor] = {}
    for parameter in model_parameters(source.model):
        if whole or any(map(in_encoder, parameter.shapes)):
            for name, tensor in zip(parameter.shapes, source.read(parameter), strict=True):
                # Cloned, because the tensor may be a view of the mapped file.
                weights[name] = to_dtype(name, tensor, dtype or tensor.dtype).clone()
    model.load_state_dict(weights, assign=True)
    images = GenLIPImageProcessor(**preprocessor_config(config.data))
    return Loaded(model, images, reader, config.data.prompt, place, saved.iteration)


def _from_released(
    place: Path, whole: bool, dtype: torch.dtype | None, tokenizer: str, log: Callable[[str], None]
) -> Loaded:
    from genlip_megatron.convert.conversion import folder_images, folder_prompt, open_released, read_json
    from genlip_megatron.convert.safetensors_file import check_dtype, contents

    if "embeddings.weight" in contents(place):
        # Released configurations lack some sizes; the shapes of the weights give them.
        heads = read_json(place / "config.json").get("num_attention_heads")
        model = open_released(place, heads, "in its config.json").model
        if sum(model.rope_sections) != model.head_dim // 2:
            log(
                f"{place}: half of one of num_attention_heads = {model.num_attention_heads} heads has "
                f"{model.head_dim // 2} channels, but the rotary sections {list(model.rope_sections)} have "
                f"{sum(model.rope_sections)}. If the heads are wrong, so are the results"
            )
        fields = hf_config(model)
    elif whole:
        raise ValueError(f"--load {place}: only a vision encoder. Captions need a model with its text parts.")
    elif not (place / "config.json").is_file():
        raise ValueError(
            f"--load {place}: no config.json, which gives the sizes of a vision encoder. Export the folder again."
        )
    else:
        fields = read_json(place / "config.json")
    try:
        config = _config(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--load {place}: config.json: {error}") from None
    reader = _tokenizer(tokenizer or str(place / "tokenizer.json"), config.vocab_size) if whole else None
    images, prompt = GenLIPImageProcessor(**folder_images(place, log)), folder_prompt(place)
    if dtype is not None:
        check_dtype(place, dtype, lambda name: whole or in_encoder(name))
    model = _kind(whole).from_pretrained(place, config=config, dtype=dtype or "auto")
    return Loaded(model, images, reader, prompt, place)


def _kind(whole: bool) -> Any:
    return GenLIPForCausalLM if whole else GenLIPVisionModel


def _config(fields: dict[str, Any]) -> GenLIPConfig:
    """The model's configuration from the fields of a ``config.json``."""
    not_arguments = ("architectures", "auto_map", "dtype")
    return GenLIPConfig(**{name: value for name, value in fields.items() if name not in not_arguments})


def _tokenizer(path: str, vocab_size: int) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(
            f"{path}: no such file, but it should be the model's tokenizer. Name the file with --tokenizer."
        )
    return load_tokenizer(path, vocab_size)


def override_images(processor: GenLIPImageProcessor, flags: Mapping[str, Any]) -> GenLIPImageProcessor:
    """``processor`` with the flags that are not None: "image_mode", "image_size", "min_pixels" and "max_pixels".

    Raises:
        ValueError: a value is not allowed, or a flag belongs to the other mode.
    """
    mode = flags.get("image_mode") or processor.image_mode
    settings = {name: getattr(processor, name) for name in ("size", "fixed_resize", "min_pixels", "max_pixels")}
    for name, needed in (("image_size", "fixed"), ("min_pixels", "native"), ("max_pixels", "native")):
        value = flags.get(name)
        if value is None:
            continue
        if mode != needed:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {value}: needs --image-mode {needed}; this model's images are {mode}")
        settings["size" if name == "image_size" else name] = value
    if mode == "fixed" and settings["size"] is None:
        raise ValueError("--image-mode fixed: this model's images are native. Give their side as --image-size")
    return GenLIPImageProcessor(image_mode=mode, **settings)
