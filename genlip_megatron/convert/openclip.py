"""GenLIP models of OpenCLIP: read their checkpoints and folders, and write folders.

The computation is the same; these differ: names of tensors, the patch embedding (a matrix over (row, column, channel)
instead of a convolution over (channel, row, column)), and biases that OpenCLIP may leave out. OpenCLIP's vision encoder
shares its tensors with the language model, and its state dictionary lists them twice, as ``visual.*`` too.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlip_megatron.config import PATCH_VALUES, DataConfig, ModelConfig
from genlip_megatron.convert.hf_folder import check_model, check_sections, preprocessor_config, release_of
from genlip_megatron.convert.safetensors_file import SINGLE, Planned, SafetensorsWriter, opened
from genlip_megatron.convert.source import DTYPES, Source, compare, listed
from genlip_megatron.hf.shared_genlip import image_settings
from genlip_megatron.model.state_dict import ModelParameter, canonical_shapes, model_parameters
from genlip_megatron.outputs import first_other

CONFIG = "open_clip_config.json"
# The files that OpenCLIP looks for in a folder, in its order.
_WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    SINGLE,
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_WRITTEN = {
    CONFIG,
    SINGLE,
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
# OpenCLIP's default, which applies where a configuration has no preprocess_cfg.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PATCHES, _OUR_PATCHES = "patch_embed.proj.", "vision_embeddings.patch_embedding."
# Start of our name -> start of OpenCLIP's.
_PREFIXES = {
    _OUR_PATCHES: _PATCHES,
    "embeddings.": "text_embed.",
    "visual.layers.": "trunk.layers.",
    "ln_post.": "trunk.ln_post.",
    "proj.": "out_proj.",
}
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "gate_fc", "fc2")

# Field of genlip_cfg -> (our setting, OpenCLIP's default).
_SIZES: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 1152),
    "depth": ("num_layers", 27),
    "num_heads": ("num_attention_heads", 16),
    "intermediate_size": ("ffn_hidden_size", 3072),
    "text_embed_dim": ("text_hidden_size", 1024),
    "rope_theta": ("rope_theta", 10000.0),
    "ls_init_value": ("layer_scale_init", 0.1),
    "drop_path_rate": ("drop_path_rate", 0.0),
    "gated_attention": ("attention_output_gate", True),
    "layer_norm_eps": ("layernorm_epsilon", 1e-6),
}
# Fields with one supported value, which is OpenCLIP's default too; and fields that change no output.
_FIXED: dict[str, dict[str, Any]] = {
    "genlip_cfg": {
        "use_swiglu_ffn": True,
        "mrope_interleaved": True,
        "hidden_act": "silu",
        "norm_type": "layernorm",
        "qk_norm": False,
    },
    "vision_cfg": {"patch_size": 16, "in_chans": 3, "input_norm": False, "pre_norm": False},
    "text_cfg": {"pre_norm": False},
}
_FREE = {
    "genlip_cfg": {*_SIZES, "mrope_section", "attention_bias", "mlp_bias", "max_position_embeddings", "pack_prefix"},
    "vision_cfg": {"image_size", "proj_bias", "pool_type"},
    "text_cfg": {"vocab_size", "context_length", "pad_id", "bos_id", "eos_id", "tokenizer_type", "tiktoken_name"},
}
_NO_LAYER_SCALE = 1e-6  # OpenCLIP has LayerScale above this initial value


def is_openclip(place: Path) -> bool:
    """Whether it is a file of a checkpoint, or a folder with OpenCLIP's configuration."""
    return place.is_file() or (place / CONFIG).is_file()


def names_of(canonical: str) -> list[str]:
    """OpenCLIP's names of one of our tensors.

    >>> names_of("visual.layers.0.mlp.fc1.bias")
    ['trunk.layers.0.mlp.fc1.bias', 'visual.trunk.layers.0.mlp.fc1.bias']
    >>> names_of("proj.weight"), names_of("lm_head.weight")
    (['out_proj.weight'], ['lm_head.weight'])
    """
    name = canonical
    for ours, theirs in _PREFIXES.items():
        if canonical.startswith(ours):
            name = theirs + canonical.removeprefix(ours)
    return [name, f"visual.{name}"] if name.startswith(("trunk.", _PATCHES)) else [name]


@dataclass(frozen=True)
class Description:
    """What a configuration of OpenCLIP says.

    Attributes:
        model: the model.
        model_cfg: arguments of OpenCLIP's class.
        without_bias: ends of the names of our biases that OpenCLIP leaves out.
        mean, std: of the input, for values in [0, 1], by channel.
        interpolation: of its resizing.
        images: ``image_settings`` that come nearest to its preprocessing.
    """

    model: ModelConfig
    model_cfg: dict[str, Any]
    without_bias: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    images: dict[str, Any]

    @property
    def folds(self) -> bool:
        """Whether the mean or standard deviation differs from this project's."""
        return {*self.mean, *self.std} != {0.5}


def read_description(file: Path) -> Description:
    """The model of ``open_clip_config.json``, or of one of OpenCLIP's own files in ``model_configs``.

    Raises:
        ValueError: not a GenLIP, or one that this project cannot compute; names file and field.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_cfg = fields.get("model_cfg", fields)
        sections = {name: dict(model_cfg[name]) for name in _FIXED}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{file}: not the configuration of a GenLIP of OpenCLIP ({type(error).__name__}: {error}). It needs "
            f"{', '.join(_FIXED)}"
        ) from None
    for section, fixed in _FIXED.items():
        for name, value in sections[section].items():
            if name in fixed and value != fixed[name]:
                raise ValueError(f"{file}: {section}.{name} = {value!r}: this project has only {fixed[name]!r}")
            if name not in fixed and name not in _FREE[section]:
                raise ValueError(f"{file}: {section}.{name} = {value!r}: unknown, so the model may differ. Remove it")
    trunk, vision = sections["genlip_cfg"], sections["vision_cfg"]
    values = {ours: trunk.get(name, default) for name, (ours, default) in _SIZES.items()}
    values["vocab_size"] = sections["text_cfg"].get("vocab_size", 100280)
    if not isinstance(values["attention_output_gate"], bool):
        raise ValueError(f"{file}: genlip_cfg.gated_attention = {trunk['gated_attention']!r}: must be true or false")
    values["attention_output_gate"] = "elementwise" if values["attention_output_gate"] else "none"
    scale = values["layer_scale_init"] or 0.0
    if not isinstance(scale, (int, float)):
        raise ValueError(f"{file}: genlip_cfg.ls_init_value = {scale!r}: must be a number")
    values["layer_scale_init"] = float(scale) if scale > _NO_LAYER_SCALE else 0.0
    rotary = trunk.get("mrope_section", (12, 12, 12))
    if not isinstance(rotary, (list, tuple)) or len(rotary) != 3 or not all(type(x) is int and x >= 0 for x in rotary):
        raise ValueError(f"{file}: genlip_cfg.mrope_section = {rotary!r}: must be three whole numbers, for T, H and W")
    values["rope_sections"] = tuple(rotary)
    names = {f"genlip_cfg.{name}": ours for name, (ours, _) in _SIZES.items()}
    try:
        check_model(values, {**names, "text_cfg.vocab_size": "vocab_size"}, str(file))
        release = release_of(values)
        if release and release.rope_sections[1:] == values["rope_sections"][1:]:
            values["rope_sections"] = release.rope_sections  # OpenCLIP has another T, which is not read
        check_sections(values, release)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    missing = [] if vision.get("proj_bias", True) else [f"{_OUR_PATCHES}bias"]
    for flag, parts in (("attention_bias", _ATTENTION), ("mlp_bias", _MLP)):
        missing += [] if trunk.get(flag, False) else [f".{part}.bias" for part in parts]
    preprocess = fields.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ValueError(f"{file}: preprocess_cfg = {preprocess!r}: expected an object")
    mean, std, images = _preprocessing(file, preprocess, vision.get("image_size", 256))
    interpolation = preprocess.get("interpolation", "bicubic")
    return Description(ModelConfig(**values), model_cfg, tuple(missing), mean, std, interpolation, images)


def _preprocessing(
    file: Path, fields: Mapping[str, Any], side: Any
) -> tuple[tuple[float, ...], tuple[float, ...], dict[str, Any]]:
    """(mean, standard deviation, ``image_settings``) of a ``preprocess_cfg`` for images of ``side``."""
    found = []
    for name, default in (("mean", _MEAN), ("std", _STD)):
        value = fields.get(name, default)
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
        good = len(value) == 3 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
        if not good or (name == "std" and min(value) <= 0):
            raise ValueError(f"{file}: preprocess_cfg.{name} = {fields.get(name)!r}: expected three finite numbers")
        found.append(value)
    try:
        if fields.get("resize_mode") == "squash":
            return found[0], found[1], image_settings(size=side)
        return found[0], found[1], image_settings("native", max_pixels=side * side)
    except (ValueError, TypeError):
        raise ValueError(f"{file}: vision_cfg.image_size = {side!r}: expected a multiple of 16") from None


def description_file(place: Path) -> Path:
    """``open_clip_config.json`` in a folder or beside a file.

    Raises:
        ValueError: it does not exist.
    """
    file = (place.parent if place.is_file() else place) / CONFIG
    if not file.is_file():
        raise ValueError(f"{file}: no such file. Name OpenCLIP's JSON file of the model with --openclip-config")
    return file


def open_weights(place: Path, description: Path | None, log: Callable[[str], None]) -> OpenClipSource:
    """The weights of a folder or file of OpenCLIP.

    Args:
        place: the folder or file.
        description: JSON file of the model; None: the one in the folder or beside the file.
        log: gets a line about what the conversion changes or leaves out.

    Raises:
        ValueError: not a GenLIP of OpenCLIP, or one that this project cannot compute.
    """
    described = read_description(description or description_file(place))
    if described.folds:
        log(f"pixels with mean {list(described.mean)}, std {list(described.std)}: folded into the patch embedding")
    if described.interpolation != "bilinear":
        log(
            f"OpenCLIP resizes images with {described.interpolation}, this project with bilinear: features differ a bit"
        )
    return OpenClipSource(weights_file(place), described, log)


def weights_file(place: Path) -> Path:
    """The file of weights that OpenCLIP would load from a folder; a file itself.

    Raises:
        ValueError: the folder has none.
    """
    if place.is_file():
        return place
    for name in _WEIGHT_FILES:
        if (place / name).is_file():
            return place / name
    raise ValueError(f"{place}: no weights beside {CONFIG}. Expected one of {', '.join(_WEIGHT_FILES)}")


class OpenClipSource:
    """The weights of a checkpoint or folder of OpenCLIP, mapped into memory; see ``Source``.

    Attributes:
        described: the configuration.

    Args:
        file: of the weights: safetensors, or what ``torch.save`` wrote.
        described: the configuration.
        log: gets a line about tensors that are left out.

    Raises:
        ValueError: a tensor is missing, unexpected, or has the wrong shape or dtype; or the file is damaged.
    """

    def __init__(self, file: Path, described: Description, log: Callable[[str], None]) -> None:
        self.model, self.described = described.model, described
        tensors = state_dict(file, log)
        twice = {f"visual.{name}": name for name in tensors if f"visual.{name}" in tensors}
        if unequal := [name for name, other in twice.items() if not torch.equal(tensors[name], tensors[other])]:
            raise ValueError(f"{file}: {listed(unequal)}: not equal to the same tensors without visual. Save it again")
        self._tensors = {name: tensor for name, tensor in tensors.items() if name not in twice}
        if dropped := [name for name in self._tensors if name.startswith("visual.proj.")]:
            log(f"left out: {listed(dropped)}, which project OpenCLIP's pooled features and take no part in captions")
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items() if name not in dropped}
        needed, holders = {}, {}
        for canonical, shape in canonical_shapes(self.model).items():
            name = holders[canonical] = names_of(canonical)[0]
            if self._is_missing(canonical):
                holders[canonical] = name.removesuffix("bias") + "weight"
            else:
                needed[name] = (shape[0], PATCH_VALUES) if canonical == f"{_OUR_PATCHES}weight" else shape
        compare(str(file), shapes, needed, f"Does {CONFIG} belong to these weights?")
        if wrong := [
            f"{name} is {tensors[name].dtype}" for name in needed if tensors[name].dtype not in DTYPES.values()
        ]:
            raise ValueError(f"{file}: {listed(wrong)}: expected one of {', '.join(DTYPES)}")
        self.dtypes = {canonical: tensors[name].dtype for canonical, name in holders.items()}

    def read(self, parameter: ModelParameter) -> list[Tensor]:
        """The canonical tensors of a parameter, views into the mapped file where nothing is computed."""
        return [self._canonical(name, shape) for name, shape in parameter.shapes.items()]

    def _is_missing(self, canonical: str) -> bool:
        return canonical.endswith(self.described.without_bias)

    def _canonical(self, name: str, shape: tuple[int, ...]) -> Tensor:
        missing = self._is_missing(name)
        tensor = torch.zeros(shape, dtype=self.dtypes[name]) if missing else self._tensors[names_of(name)[0]]
        if name == f"{_OUR_PATCHES}weight":
            return _to_convolution(_scaled(tensor, self.described) if self.described.folds else tensor)
        if name == f"{_OUR_PATCHES}bias" and self.described.folds:
            return _shifted(tensor, self._tensors[f"{_PATCHES}weight"], self.described)
        return tensor


def _to_convolution(matrix: Tensor) -> Tensor:
    """[D, 768] over (row, column, channel) -> [D, 3, 16, 16]."""
    return matrix.unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2)


def _scaled(matrix: Tensor, described: Description) -> Tensor:
    """The weights [D, 768] for values (x - 0.5) / 0.5 instead of (x - mean) / std, rounded once."""
    std = torch.tensor(described.std, dtype=torch.float64).repeat(PATCH_VALUES // 3)
    return (matrix.double() * (0.5 / std)).to(matrix.dtype)


def _shifted(bias: Tensor, matrix: Tensor, described: Description) -> Tensor:
    """The bias [D] that belongs to ``_scaled``."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (described.mean, described.std))
    shift = ((0.5 - mean) / std).repeat(PATCH_VALUES // 3)
    return (bias.double() + matrix.double() @ shift).to(bias.dtype)


def state_dict(file: Path, log: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """The tensors of a file of weights, as views into the mapped file.

    Raises:
        ValueError: damaged, or not what OpenCLIP saves.
    """
    if file.suffix == ".safetensors":
        with opened(file) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dictionary)
    try:
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        listed_only = "Weights only" in str(error) or "Unsupported" in str(error)
        reason = "it holds objects besides tensors" if listed_only else "damaged, or not written by torch.save"
        raise ValueError(f"{file}: not readable as weights of OpenCLIP: {reason}. Save its state_dict again") from None
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds no state_dict of tensors. Name a checkpoint of OpenCLIP")
    if "state_dict_ema" in saved:
        log(f"{file}: also holds averaged weights (state_dict_ema), which are not read")
    prefix = re.compile(r"(module\.|_orig_mod\.)*")  # of wrapped and compiled models
    return {prefix.sub("", str(name), count=1): tensor.detach() for name, tensor in state.items()}


def written_sections(model: ModelConfig) -> list[int]:
    """The rotary sections of a model with the sum of half a head, which OpenCLIP demands; the same embedding.

    T is not read, so it gets the channels that H and W leave. H and W lose channels beyond the head if their sum is
    larger.

        >>> written_sections(ModelConfig(hidden_size=1536, num_attention_heads=24, rope_sections=(1, 12, 12)))
        [8, 12, 12]
        >>> written_sections(ModelConfig(hidden_size=64, num_attention_heads=4, rope_sections=(1, 12, 12)))
        [3, 3, 2]
    """
    half, (_, height, width) = model.head_dim // 2, model.rope_sections
    if height + width > half:
        height, width = (len(range(axis, min(3 * size, half), 3)) for axis, size in ((1, height), (2, width)))
    return [half - height - width, height, width]


def described_model(
    model: ModelConfig, data: DataConfig, end_token_id: int, unused_token_id: int | None
) -> dict[str, Any]:
    """``open_clip_config.json`` of a model.

    Args:
        model, data: of the run.
        end_token_id: closes captions.
        unused_token_id: a row of the embedding that no token uses, for padding; None: there is none. OpenCLIP then
            needs ``text_valid`` in each call, because by default it takes the end token for padding.
    """
    trunk = {name: getattr(model, ours) for name, (ours, _) in _SIZES.items()}
    trunk["gated_attention"] = model.attention_output_gate == "elementwise"
    native = data.image_mode == "native"
    side = math.isqrt(data.max_pixels) // 16 * 16 if native else data.image_size  # OpenCLIP counts patches by it
    mode = "longest" if native else {"squash": "squash", "resize-center-crop": "shortest"}[data.fixed_resize]
    return {
        "model_cfg": {
            "embed_dim": model.hidden_size,
            "genlip_cfg": {
                **trunk,
                "mrope_section": written_sections(model),
                "attention_bias": True,
                "mlp_bias": True,
                **_FIXED["genlip_cfg"],
            },
            "vision_cfg": {"image_size": side, "patch_size": 16, "in_chans": 3, "proj_bias": True},
            "text_cfg": {
                "vocab_size": model.vocab_size,
                "context_length": 256,
                "pad_id": end_token_id if unused_token_id is None else unused_token_id,
                "bos_id": end_token_id,
                "eos_id": end_token_id,
                # OpenCLIP's GenLIP knows no other kind. With it, get_tokenizer fails by the id of the padding; without
                # it, it would return CLIP's tokenizer.
                "tokenizer_type": "tiktoken",
            },
        },
        "preprocess_cfg": {
            "size": side,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
            "resize_mode": mode,
        },
    }


def planned(source: Source, dtype: torch.dtype | None) -> dict[str, Planned]:
    """The tensors of the written folder: OpenCLIP's name -> shape and dtype; ``dtype`` None keeps each tensor's.

    Raises:
        ValueError: OpenCLIP has no such model.
    """
    if source.model.attention_output_gate == "headwise":
        raise ValueError("model.attention_output_gate = headwise: OpenCLIP has only elementwise and none")
    if source.model.positions != "mrope":
        raise ValueError(f"model.positions = {source.model.positions}: OpenCLIP has only mrope")
    tensors: dict[str, Planned] = {}
    for canonical, shape in canonical_shapes(source.model).items():
        shape = (shape[0], PATCH_VALUES) if canonical == f"{_OUR_PATCHES}weight" else shape
        tensors |= dict.fromkeys(names_of(canonical), Planned(shape, dtype or source.dtypes[canonical]))
    return tensors


def write_weights(
    source: Source, tensors: dict[str, Planned], folder: Path, progress: Callable[[int], Any] = lambda size: None
) -> None:
    """Write ``tensors``, from ``planned``, into the one file of a folder.

    Raises:
        ValueError: a value overflows its new dtype.
    """
    writer = SafetensorsWriter(folder, tensors, sum(planned.nbytes for planned in tensors.values()))
    for parameter in model_parameters(source.model):
        for canonical, tensor in zip(parameter.shapes, source.read(parameter), strict=True):
            if canonical == f"{_OUR_PATCHES}weight":
                tensor = tensor.permute(0, 2, 3, 1).flatten(1)
            for name in names_of(canonical):
                writer.write(name, tensor)
                progress(tensors[name].nbytes)
    assert not writer.unwritten, "some tensors were not written"


def write_side_files(folder: Path, description: dict[str, Any], data: DataConfig) -> None:
    """Write the configuration, and the image settings and prompt for an import by this project."""
    files = {
        CONFIG: description,
        "preprocessor_config.json": preprocessor_config(data),
        "processor_config.json": {"prompt": data.prompt},
    }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def foreign(folder: Path) -> str:
    """A file of the folder that no export writes, or why it is not an export; "" for an export."""
    try:
        is_model = "genlip_cfg" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, TypeError, KeyError):
        is_model = False
    return first_other(folder, _WRITTEN.__contains__) if is_model else f"no {CONFIG} of a GenLIP model"
