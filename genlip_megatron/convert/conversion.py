"""Both directions of conversion: which tensors are written, in which dtype, one parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genlip_megatron.checkpoint import loading
from genlip_megatron.checkpoint.manifest import Manifest
from genlip_megatron.config import DEFAULT_PROMPT, ModelConfig, RunConfig, override
from genlip_megatron.convert.hf_folder import model_config
from genlip_megatron.convert.image_fields import read_image_settings
from genlip_megatron.convert.megatron_source import MegatronSource
from genlip_megatron.convert.safetensors_file import Planned, SafetensorsSource, SafetensorsWriter, contents
from genlip_megatron.convert.source import Source
from genlip_megatron.hf.shared_genlip import image_settings
from genlip_megatron.model.state_dict import in_encoder, model_parameters


def open_checkpoint(
    path: Path, log: Callable[[str], None], progress: Callable[[int], Any] = lambda size: None
) -> tuple[Path, Manifest, MegatronSource]:
    """(folder, manifest, weights) of the checkpoint ``path``, or of the newest good checkpoint of a run's folder.

    Every file is first compared with the manifest; ``progress`` gets the bytes of each.

    Raises:
        ValueError: no checkpoint, no good one, or one whose tensors do not match its model.
    """
    found = loading.find(path, True, log, progress)
    if found is None:
        raise ValueError(
            f"{path}: no checkpoint found. Give a folder iter_NNNNNNN, or the folder of a run with checkpoints"
        )
    place, saved = found
    return place, saved, MegatronSource(place, saved, loading.read_config(place).model)


def planned(source: Source, dtype: torch.dtype | None, encoder_only: bool) -> dict[str, Planned]:
    """The tensors that an export writes: canonical name -> shape and dtype, in reading order.

    Args:
        dtype: of all tensors; None keeps each tensor's dtype.
        encoder_only: without the text's embedding, projections and head.
    """
    return {
        name: Planned(shape, dtype or source.dtypes[name])
        for parameter in model_parameters(source.model)
        for name, shape in parameter.shapes.items()
        if in_encoder(name) or not encoder_only
    }


def export_weights(
    source: Source,
    tensors: dict[str, Planned],
    folder: Path,
    max_shard_size: int,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write ``tensors``, from ``planned``, as safetensors files into a folder.

    Raises:
        ValueError: a value overflows its new dtype.
    """
    writer = SafetensorsWriter(folder, tensors, max_shard_size)
    for parameter in model_parameters(source.model):
        wanted = [name for name in parameter.shapes if name in tensors]
        for name, tensor in zip(wanted, source.read(parameter) if wanted else (), strict=True):
            writer.write(name, tensor)
            progress(tensors[name].nbytes)
    assert not writer.unwritten, "some tensors were not written"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields


def open_released(folder: Path, num_attention_heads: int | None = None, heads_hint: str = "") -> SafetensorsSource:
    """The weights of a Hugging Face folder, or of the authors' released format.

    Args:
        folder: with ``config.json`` and safetensors.
        num_attention_heads: needed if neither the configuration nor the sizes of a released model give it.
        heads_hint: the caller's flag for it, for error messages.

    Raises:
        ValueError: not a whole model, or contradictory; names the folder or file.
    """
    shapes = {name: facts.shape for name, facts in contents(folder).items()}
    try:
        model = model_config(read_json(folder / "config.json"), shapes, num_attention_heads)
    except ValueError as error:
        hint = f" ({heads_hint})" if heads_hint and "num_attention_heads" in str(error) else ""
        raise ValueError(f"{folder}: {error}{hint}") from None
    return SafetensorsSource(folder, model)


def folder_images(folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """``image_settings`` of a folder; the defaults, with a log line, if it has no image processor.

    transformers 5 saves the image processor inside ``processor_config.json``.

    Raises:
        ValueError: an invalid field, or one that this project cannot compute; names the file.
    """
    file = folder / "preprocessor_config.json"
    fields: Any = read_json(file)
    if not fields:
        file = folder / "processor_config.json"
        fields = read_json(file).get("image_processor", {})
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: image_processor = {fields!r}: expected an object")
    if not fields:
        log(f"no image settings in {folder}: using images of 224 x 224 pixels (fixed, squash)")
        return image_settings()
    try:
        return read_image_settings(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def folder_prompt(folder: Path) -> str:
    """The prompt of a folder's captions, by default the paper's.

    Raises:
        ValueError: the prompt is not a string; names the file.
    """
    file = folder / "processor_config.json"
    prompt = read_json(file).get("prompt", DEFAULT_PROMPT)
    if not isinstance(prompt, str):
        raise ValueError(f"{file}: prompt = {prompt!r}: expected a string")
    return prompt


def recorded_run(
    folder: Path,
    model: ModelConfig,
    tokenizer: Path,
    precision: str,
    log: Callable[[str], None],
    images: dict[str, Any] | None = None,
) -> RunConfig:
    """The run configuration to record in a checkpoint of a folder's weights: model, tokenizer, and the folder's image
    settings and prompt. ``log`` gets a line if image settings are missing.

    Args:
        images: ``image_settings`` of weights of another project; this project's file in the folder takes precedence.
    """
    if images is None or "image_mode" in read_json(folder / "preprocessor_config.json"):
        images = folder_images(folder, log)
    size = images.pop("size")
    if images["image_mode"] == "fixed" and size["height"] != size["width"]:
        raise ValueError(f"{folder}: size = {size!r}: training supports only square images")
    data = {
        "data.tokenizer": str(tokenizer.resolve()),
        "data.prompt": folder_prompt(folder),
        "train.precision": precision,
        "data.image_size": size["height"],
        **{f"data.{name}": value for name, value in images.items()},
    }
    return override(RunConfig(model=model), data)
