"""Reading settings: values from YAML and flags, converted and checked one by one."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

from genlip_megatron.config import suggest
from genlip_megatron.config.paths import split_paths
from genlip_megatron.config.schema import SECTIONS, SETTINGS, Range, RunConfig

# Overrides that use no Transformer Engine.
LOCAL_LAYERS = {
    "train.transformer_impl": "local",
    "train.fp8": "none",
    "train.fp8_primary_weights": False,
    "train.fp8_attention": False,
    "train.first_last_layers_bf16": False,
    "parallel.tp_comm_overlap": False,
}

# Overrides that run any model in one process on any machine.
ONE_RANK = {
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 1,
    "parallel.context_parallel_size": 1,
    "parallel.num_layers_in_first_pipeline_stage": 0,
    "parallel.num_layers_in_last_pipeline_stage": 0,
    "parallel.overlap_grad_reduce": False,
    "parallel.overlap_param_gather": False,
    "parallel.fsdp": False,
    "parallel.offload_modules": (),
    "train.attention_backend": "auto",
    **LOCAL_LAYERS,
    "train.fusion": "auto",
}

_SWITCH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_KINDS = {int: "a whole number", float: "a number", str: "text"}


def from_dict(tree: Mapping[str, Any], source: str) -> RunConfig:
    """A configuration from nested dictionaries. Ranges are left to ``checks.check``.

    Args:
        tree: values by section and key.
        source: where they come from, for errors.

    Raises:
        ValueError: an unknown section or key, or a value of the wrong type.
    """
    sections = {}
    for section, part in tree.items():
        if section not in SECTIONS:
            near = suggest.for_section(str(section))
            raise ValueError(f"{source}: unknown section {section!r}{near} Sections: {', '.join(SECTIONS)}.")
        if not isinstance(part, Mapping):
            raise ValueError(f"{source}: section {section!r} must be a mapping, got {part!r}")
        kinds = typing.get_type_hints(SECTIONS[section])
        values = {}
        for key, value in part.items():
            if key not in kinds:
                raise ValueError(f"{source}: unknown key {section}.{key}{suggest.for_key(section, str(key))}")
            metadata = SETTINGS[f"{section}.{key}"].metadata
            if metadata["paths"] and isinstance(value, str):
                value = split_paths(value)
            if metadata["switch"] and str(value).lower() in _SWITCH:
                value = metadata["switch"][not _SWITCH[str(value).lower()]]
            values[key] = _convert(value, kinds[key], f"{source}: {section}.{key}", metadata["choices"])
        sections[section] = SECTIONS[section](**values)
    return RunConfig(**sections)


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with ``{"section.key": value}`` replaced; values are converted and checked like YAML's."""
    tree = config.to_dict()
    for name, value in values.items():
        section, key = name.split(".")
        tree[section][key] = value
    return from_dict(tree, "flags")


# The search for layouts checks thousands of configurations, so settings without a range are left out.
_RANGES = [(*name.split("."), f.metadata["range"]) for name, f in SETTINGS.items() if f.metadata["range"] != Range()]


def check_ranges(config: RunConfig) -> None:
    """Check every number against its range, and the length of every list of fixed length.

    Raises:
        ValueError: names the first setting that is out of range.
    """
    for section, key, allowed in _RANGES:
        value = getattr(getattr(config, section), key)
        if (len(value) if isinstance(value, tuple) else value) not in allowed:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{section}.{key} = {shown}: {allowed}.")


def _convert(value: Any, kind: Any, where: str, choices: tuple[str, ...]) -> Any:
    """``value``, from YAML or a flag, as ``kind``."""

    def wrong(expected: str) -> ValueError:
        return ValueError(f"{where} = {value!r}: expected {expected}")

    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            raise wrong("a list")
        return tuple(_convert(part, item, where, choices) for part in value)
    if kind is bool:
        if not isinstance(value, (bool, str)) or str(value).lower() not in _SWITCH:
            raise wrong("true or false")
        return _SWITCH[str(value).lower()]
    if value is None or isinstance(value, (bool, list, dict)):
        raise wrong(_KINDS[kind])
    try:
        converted = int(str(value)) if kind is int else kind(value)
    except (ValueError, TypeError):  # TypeError for a date
        raise wrong(_KINDS[kind]) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise wrong("a finite number")
    if choices and converted not in choices:
        raise wrong(f"one of {', '.join(choices)}{suggest.nearest(str(value), choices)}")
    return converted
