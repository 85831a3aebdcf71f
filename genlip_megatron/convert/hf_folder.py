"""The files of a Hugging Face folder except the weights: write them, and read a model's configuration from them.

Everything here is plain dictionaries and text: only using a folder needs transformers, writing one does not.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genlip_megatron.config import SETTINGS, DataConfig, ModelConfig, from_dict, load_yaml, recipe_names
from genlip_megatron.hf.shared_genlip import FIXED, IMAGE_STEPS, rope_settings
from genlip_megatron.model.state_dict import sizes_of
from genlip_megatron.outputs import first_other

SOURCES = (
    "attention_genlip.py",
    "configuration_genlip.py",
    "heads_genlip.py",
    "image_processing_genlip.py",
    "modeling_genlip.py",
    "processing_genlip.py",
    "shared_genlip.py",
)
# All files of an exported folder except the weights.
SIDE_FILES = {
    *SOURCES,
    "README.md",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
MAX_NEW_TOKENS = 256  # as in the paper's captions

# Field of the authors' configuration -> our setting.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "text_embed_dim": "text_hidden_size",
    "gated_attention": "attention_output_gate",
    "ls_init_value": "layer_scale_init",
    "drop_path_rate": "drop_path_rate",
    "rope_theta": "rope_theta",
    "layer_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}
# The authors' field says whether there is an elementwise gate.
_GATES: dict[str, bool | str] = {"elementwise": True, "none": False, "headwise": "headwise"}
# Other settings of the model have the same name in both, except the sections, which rope_scaling holds.
_NOT_FIELDS = ("rope_sections", "freeze_embeddings", "freeze_head")
_NAMES |= {
    field.name: field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name not in (*_NAMES.values(), *_NOT_FIELDS)
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def hf_config(model: ModelConfig, dtype: str = "bfloat16", encoder_only: bool = False) -> dict[str, Any]:
    """``config.json``, with the authors' field names, of a model whose weights are stored in ``dtype``.

    Args:
        encoder_only: only the vision encoder is stored.
    """
    names = () if encoder_only else ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    text = dict.fromkeys(names, "modeling_genlip.GenLIPForCausalLM")
    return {
        "architectures": ["GenLIPVisionModel" if encoder_only else "GenLIPForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_genlip.GenLIPConfig",
            "AutoModel": "modeling_genlip.GenLIPVisionModel",
            "AutoBackbone": "heads_genlip.GenLIPBackbone",
            "AutoModelForImageClassification": "heads_genlip.GenLIPForImageClassification",
            **text,
        },
        "model_type": "genlip",
        **{name: getattr(model, ours) for name, ours in _NAMES.items()},
        "gated_attention": _GATES[model.attention_output_gate],
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(model.rope_sections)},
        **FIXED,
        "dtype": dtype,
    }


def model_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], num_attention_heads: int | None = None
) -> ModelConfig:
    """The model of a ``config.json`` and its weights.

    Published configurations leave fields out, so sizes come from the weights' shapes. The number of heads and the
    rotary sections are not in the shapes: if they are missing, they are known only for the released models.

    Args:
        fields: of ``config.json``; may be empty.
        shapes: of the weights, by their names in the released format.
        num_attention_heads: used if the configuration has none; otherwise it confirms the configuration's.

    Raises:
        ValueError: an unsupported value, a contradiction between configuration and weights, or a missing size; names
            the field.
    """
    for name, allowed in FIXED.items():
        if fields.get(name, allowed) != allowed:
            raise ValueError(f"config.json: {name} = {fields[name]!r}: only {allowed!r} is supported")
    values = sizes_of(shapes)
    for name, ours in _NAMES.items():
        value = fields.get(name)
        if name == "ls_init_value" and name in fields:
            value = value or 0.0
        if value is None:
            continue
        known = values.get(ours)
        if name == "gated_attention":
            if not (isinstance(value, bool) or value == "headwise"):
                raise ValueError(f"config.json: {name} = {value!r}: must be true, false or 'headwise'")
            known = _GATES[values[ours]]
        # The weights show whether there is LayerScale, not its initial value.
        contradicts = bool(known) != bool(value) if name == "ls_init_value" else known != value
        if ours in values and contradicts:
            raise ValueError(f"config.json: {name} = {value!r}: the weights have {known!r}")
        if name != "gated_attention":
            values[ours] = value
    release = release_of(values)
    try:
        rope = rope_settings(fields)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    values.setdefault("rope_theta", rope.get("rope_theta", ModelConfig.rope_theta))
    values["rope_sections"] = tuple(rope.get("mrope_section") or (release.rope_sections if release else ()))
    if num_attention_heads is not None:
        if num_attention_heads < 1:
            raise ValueError(f"num_attention_heads = {num_attention_heads}: must be a whole number of at least 1")
        known = values.setdefault("num_attention_heads", num_attention_heads)
        if known != num_attention_heads:
            raise ValueError(f"num_attention_heads = {num_attention_heads}: config.json has {known}")
    if release:
        values.setdefault("num_attention_heads", release.num_attention_heads)
        values.setdefault("drop_path_rate", release.drop_path_rate)
    values.setdefault("drop_path_rate", 0.0)
    if "num_attention_heads" not in values:
        raise ValueError("num_attention_heads is missing: the weights do not show it. Give num_attention_heads")
    if not values["rope_sections"]:
        raise ValueError(
            "config.json: rope_scaling.mrope_section is missing: the weights do not show it. Add three whole numbers"
        )
    check_model(values, _NAMES, "config.json")
    if num_attention_heads is None or fields.get("num_attention_heads") is None:
        hint = ", or confirm the heads by giving them twice, in config.json and as num_attention_heads"
        check_sections(values, release, hint)
    return ModelConfig(**values)


def check_model(values: Mapping[str, Any], names: Mapping[str, str], file: str) -> None:
    """Raise ValueError for a value of the wrong kind, or a number of heads that does not divide the width.

    Args:
        values: by the settings of ``ModelConfig``.
        names: name in ``file`` -> setting.
        file: where the values come from.
    """
    for name, ours in names.items():
        default, allowed = getattr(ModelConfig, ours), SETTINGS[f"model.{ours}"].metadata["range"]
        value = values.get(ours, default)
        # JSON may write 1.0 as 1, but true is not 1.
        good = type(value) is type(default) or (type(value) is int and isinstance(default, float))
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{file}: {name} = {value!r}: must be {_KINDS[type(default)]}")
        if value not in allowed:
            raise ValueError(f"{file}: {name} = {value!r}: {allowed}")
        choices = SETTINGS[f"model.{ours}"].metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{file}: {name} = {value!r}: expected one of {', '.join(choices)}")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % (2 * heads):
        raise ValueError(
            f"num_attention_heads = {heads}: each head needs an even number of channels, so hidden_size = {width} must "
            "be a multiple of twice the heads"
        )


def check_sections(values: Mapping[str, Any], release: ModelConfig | None, hint: str = "") -> None:
    """Raise ValueError if the rotary sections contradict the number of heads: their sum is not half a head.

    Args:
        values: by the settings of ``ModelConfig``.
        release: the released model of these sizes; its own sections and heads are right whatever their sum.
        hint: what else to do, for the error.
    """
    heads, sections = values["num_attention_heads"], values["rope_sections"]
    half = values["hidden_size"] // heads // 2
    released = release and (heads, sections) == (release.num_attention_heads, release.rope_sections)
    if sum(sections) != half and not released:
        raise ValueError(
            f"num_attention_heads = {heads}: half a head has {half} channels, and the sections of the rotary "
            f"embedding, {list(sections)}, are {sum(sections)}. Correct the one that is wrong{hint}"
        )


def release_of(values: Mapping[str, Any]) -> ModelConfig | None:
    """The released model of these sizes, or None."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "text_hidden_size")
    for recipe in recipe_names():
        if recipe.endswith("_release_stage1"):
            model = from_dict(load_yaml(recipe), recipe).model
            if all(getattr(model, name) == values[name] for name in names):
                return model
    return None


def _has_stock_processor(data: DataConfig) -> bool:
    """Whether a processor of transformers resizes and normalises RGB images in the same way."""
    return data.image_mode == "fixed" and data.fixed_resize == "squash"


def preprocessor_config(data: DataConfig, llava_next: bool = False) -> dict[str, Any]:
    """``preprocessor_config.json`` for images resized as in training.

    For images squashed to a fixed size it names a stock processor of transformers, for callers that do not allow the
    folder's code to run. With Pillow its pixels are equal except for rounding (1.2e-7). With torchvision, which version
    5 prefers if it is installed, they differ by at most one 8-bit level (0.003 on average); ``backend="pil"``, or
    ``use_fast=False``, selects Pillow. Stock processors neither rotate images by EXIF nor composite transparency, and
    clip 16-bit greys; the model card has the conversion that images then need.

    Args:
        llava_next: for LLaVA-NeXT, which reads ``crop_size`` and the shortest edge: name CLIP's processor. On square
            images, which LLaVA-NeXT makes, its pixels are those of both ways to resize.
    """
    stock, side = _has_stock_processor(data), data.image_size
    size = {"size": {"height": side, "width": side}} if data.image_mode == "fixed" else {}
    clip = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }
    return {
        "image_processor_type": "ViTImageProcessor" if stock else "GenLIPImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_genlip.GenLIPImageProcessor"},
        "image_mode": data.image_mode,
        **size,
        "fixed_resize": data.fixed_resize,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        **IMAGE_STEPS,
        **(clip if llava_next else {}),
    }


_NATIVE_FEATURES = """
One image gives features [1, patches, D]. Several images, as a list, give packed features [P, D] of all patches;
`model.split_images(features, inputs["image_grid_hw"])` separates them.
"""
_PIPELINE_NATIVE = "Images of different sizes need `batch_size=1`, the default.\n"
_UPRIGHT = "RGB images that are upright: it"
_SQUARE = "RGB images that are upright and square, which LLaVA-NeXT makes; it crops the middle of others, and"
_CONVERSION = """
## Without the folder's code

`AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)` gives a stock processor of transformers. It has
the right pixels only for RGB images that are upright: it ignores EXIF rotation, shows the colours behind transparency,
and turns 16-bit greys white. Convert such images first, as in training:

```python
import numpy as np
from PIL import Image, ImageOps


def to_rgb(image):
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys keep their high byte
        image = Image.fromarray((np.asarray(image).astype("uint32") >> 8).astype("uint8"))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
```
"""
_CAPTIONS = """
## Captions

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder or its name on the Hub
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=["image.jpg"]).to(model.device, model.dtype)
tokens = model.generate(**inputs)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]))
```

`AutoModelForCausalLM` loads the same model. In a pipeline the prompt is given with the image:

```python
from transformers import pipeline

folder = "."  # this folder or its name on the Hub
caption = pipeline("image-text-to-text", folder, trust_remote_code=True)
print(caption(images="image.jpg", text="{prompt}", return_full_text=False))
```

## Limits

The model repeats what its captions say, errors and biases included, and knows no instructions beyond its prompt. No
benchmark was run on these weights unless the table above says so.
"""
_NO_CAPTIONS = """
## Limits

This folder holds only the vision encoder, without the parts that read and write text. No benchmark was run on these
weights unless the table above says so.
"""


def model_card(
    model: ModelConfig,
    data: DataConfig,
    license_id: str,
    facts: Mapping[str, str],
    encoder_only: bool = False,
    llava_next: bool = False,
) -> str:
    """``README.md`` of the folder.

    Args:
        model, data: of the run.
        license_id: of the weights, by Hugging Face's names; "unknown" if not given.
        facts: more lines of the table, by name, for example the step.
        encoder_only: the folder has no captions.
        llava_next: the stock processor is CLIP's.
    """
    if data.image_mode == "native":
        images = f"native aspect ratio, {data.min_pixels} to {data.max_pixels} pixels"
    else:
        images = f"{data.image_size} x {data.image_size} pixels ({data.fixed_resize})"
    sizes = {
        "Layers": str(model.num_layers),
        "Hidden size": str(model.hidden_size),
        "Attention heads": str(model.num_attention_heads),
        "Inner size of the SwiGLU": str(model.ffn_hidden_size),
        "Text width": str(model.text_hidden_size),
        "Vocabulary": str(model.vocab_size),
        "Output gate": model.attention_output_gate,
        "Positions": model.positions,
        "Images": images,
        "Prompt": f"`{data.prompt}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in (sizes | dict(facts)).items())
    native = data.image_mode == "native"
    tag = "" if encoder_only else "- image-text-to-text\n"
    conversion = _CONVERSION if llava_next or _has_stock_processor(data) else ""
    if llava_next:
        conversion = conversion.replace(_UPRIGHT, _SQUARE)
    captions = _NO_CAPTIONS if encoder_only else _CAPTIONS.replace("{prompt}", json.dumps(data.prompt)[1:-1])
    return f"""---
license: {license_id}
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- vision
{tag}- custom_code
---

# GenLIP

A vision encoder pretrained only by captioning, after *Let ViT Speak*
([arXiv 2605.00809](https://arxiv.org/abs/2605.00809)): one Transformer reads image patches and text and predicts the
next text token. Trained with GenLIP-Megatron. The Python files of this folder are under the Apache License 2.0; the
licence of the weights is named above.

| | |
|---|---|
{table}

## Features

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder or its name on the Hub
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(Image.open("image.jpg"), return_tensors="pt").to(model.device, model.dtype)
features = model(**inputs).last_hidden_state
```
{_NATIVE_FEATURES if native else ""}
The same in a pipeline:

```python
from PIL import Image
from transformers import pipeline

folder = "."  # this folder or its name on the Hub
extract = pipeline("image-feature-extraction", folder, trust_remote_code=True)
image = extract.image_processor.to_rgb(Image.open("image.jpg"))
features = extract(image, return_tensors=True)
```

Pipelines convert images to RGB before the image processor sees them: colours behind transparency appear, and 16-bit
greys turn white. `to_rgb` converts as in training; other images do not need it.
{_PIPELINE_NATIVE if native else ""}{conversion}{captions}"""


def write_side_files(
    folder: str | Path,
    model: ModelConfig,
    data: DataConfig,
    end_token_id: int | None,
    dtype: str = "bfloat16",
    license_id: str = "unknown",
    facts: Mapping[str, str] | None = None,
    encoder_only: bool = False,
    llava_next: bool = False,
) -> None:
    """Write all files of an exported folder except the weights and the tokenizer (``export_tokenizer``).

    Args:
        folder: where to write; created if missing.
        model, data: of the run.
        end_token_id: token that closes captions, from ``export_tokenizer``; None for an encoder without a tokenizer,
            which gets no text processor either.
        dtype: of the stored weights: "float32", "bfloat16" or "float16".
        license_id, facts: see ``model_card``.
        encoder_only: only the vision encoder's weights are stored.
        llava_next: add what LLaVA-NeXT reads; the images are of a fixed size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # LLaVA-NeXT takes the grid of patches from image_size.
    square = {"image_size": data.image_size} if llava_next else {}
    files = {
        "config.json": hf_config(model, dtype, encoder_only) | square,
        "preprocessor_config.json": preprocessor_config(data, llava_next),
    }
    code = set(SOURCES)
    if end_token_id is None:
        code.remove("processing_genlip.py")
    else:
        files["processor_config.json"] = {
            "processor_class": "GenLIPProcessor",
            "auto_map": {"AutoProcessor": "processing_genlip.GenLIPProcessor"},
            "prompt": data.prompt,
        }
        if not encoder_only:
            files["generation_config.json"] = {
                "do_sample": False,  # equivalent to the paper's temperature of 1e-6
                "max_new_tokens": MAX_NEW_TOKENS,
                "eos_token_id": end_token_id,
                "pad_token_id": end_token_id,
            }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    card = model_card(model, data, license_id, facts or {}, encoder_only, llava_next)
    (folder / "README.md").write_text(card, encoding="utf-8")
    sources = importlib.resources.files("genlip_megatron.hf")
    for name in code:
        (folder / name).write_text((sources / name).read_text(encoding="utf-8"), encoding="utf-8")


def foreign(folder: Path) -> str:
    """A file of the folder that no export writes, or why it is not an export; "" for an export."""
    try:
        is_model = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "genlip"
    except (OSError, ValueError, TypeError, KeyError):
        is_model = False
    if not is_model:
        return "no config.json of a GenLIP model"
    return first_other(folder, lambda path: path in SIDE_FILES or bool(_WEIGHT_FILE.fullmatch(path)))
