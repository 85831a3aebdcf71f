"""Which settings may differ from the checkpoint's when a run resumes. ``config/schema.py`` holds the rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from genlip_megatron.config import SETTINGS, OnResume, RunConfig

RULES: dict[str, OnResume] = {name: setting.metadata["on_resume"] for name, setting in SETTINGS.items()}
_HINTS = {
    OnResume.MODEL: "",
    OnResume.RUN: " (--finetune starts a new run from the weights)",
    OnResume.DATA: " (--change-data accepts it)",
}
# Compared elsewhere: the tokenizer by its fingerprint, the others by the data plan.
_NOT_BY_VALUE = {
    "data.tokenizer",
    "data.seq_length",
    "data.pack_buffer",
    "data.shuffle_window",
    "data.chunk_size",
    "train.seed",
    "train.global_batch_size",
}


def _differing(saved: RunConfig, config: RunConfig, *rules: OnResume) -> Iterator[tuple[str, Any, Any]]:
    """(name, the checkpoint's value, this run's value) of the settings under ``rules`` that differ."""
    theirs, ours = saved.to_dict(), config.to_dict()
    for name, rule in RULES.items():
        section, key = name.split(".")
        if rule in rules and theirs[section][key] != ours[section][key]:
            yield name, theirs[section][key], ours[section][key]


def _refused(name: str, theirs: Any, ours: Any) -> str:
    hint = " (--change-drop-path accepts it)" if name == "model.drop_path_rate" else _HINTS[RULES[name]]
    return f"{name}: {theirs!r} in the checkpoint, {ours!r} here{hint}"


def model_differences(saved: RunConfig, config: RunConfig, same_run: bool) -> list[str]:
    """Settings by which the saved model differs from the configured one, a line each.

    Args:
        same_run: the run resumes, so the frozen and trained parameters must also be the same.
    """
    accepted = {"model.drop_path_rate"} if config.checkpoint.change_drop_path else set()
    rules = (OnResume.MODEL, OnResume.RUN) if same_run else (OnResume.MODEL,)
    return [
        _refused(name, theirs, ours)
        for name, theirs, ours in _differing(saved, config, *rules)
        if name not in accepted | _NOT_BY_VALUE
    ]


def data_differences(saved: RunConfig, config: RunConfig, other_data: bool) -> list[str]:
    """Settings by which the saved run's data differ from the configured ones, a line each.

    Args:
        other_data: the samples or their order differ; then all settings that may be the cause are listed.
    """
    always = {"data.prompt"}
    if saved.data.image_mode == config.data.image_mode == "fixed":
        always.add("data.fixed_resize")
    return [
        _refused(name, theirs, ours)
        for name, theirs, ours in _differing(saved, config, OnResume.DATA)
        if name not in _NOT_BY_VALUE and (other_data or name in always)
    ]


def accepted_changes(saved: RunConfig, config: RunConfig) -> list[str]:
    """All settings of a resumed run that differ from the checkpoint's, a line each."""
    rules = [rule for rule in OnResume if rule is not OnResume.START]
    return [f"{name} was {theirs!r}, is {ours!r}" for name, theirs, ours in _differing(saved, config, *rules)]
