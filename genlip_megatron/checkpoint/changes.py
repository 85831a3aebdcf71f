"""What may change when a run goes on from a checkpoint: a rule for every field of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from genlip_megatron.config import RunConfig


class Rule(Enum):
    """What a value other than the checkpoint's means."""

    MODEL = "refused: the weights belong to it, with --finetune and --eval-only too"
    RUN = "refused when a run goes on; --finetune and --eval-only take it"
    DATA = "refused when a run goes on, unless --change-data accepts it"
    FREE = "takes effect from the first step, and is printed"
    START = "says how this one start begins; it is not compared"


def _fields(rule: Rule, section: str, names: str) -> dict[str, Rule]:
    return {f"{section}.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **_fields(
        Rule.MODEL,
        "model",
        "num_layers hidden_size num_attention_heads ffn_hidden_size text_hidden_size vocab_size rope_sections "
        "rope_theta layernorm_epsilon layer_scale_init attention_output_gate",
    ),
    **_fields(Rule.RUN, "model", "drop_path_rate init_method_std freeze_embeddings freeze_head"),
    # Compared by content, so that a folder may move: the tokenizer by its fingerprint, the data by the plan's.
    **_fields(Rule.MODEL, "data", "tokenizer"),
    **_fields(Rule.DATA, "data", "train_data"),
    **_fields(
        Rule.DATA,
        "data",
        "prompt image_mode image_size fixed_resize min_pixels max_pixels seq_length pack_buffer shuffle_window "
        "chunk_size",
    ),
    # Of the steps that are done; later ones may change. The plan compares both.
    **_fields(Rule.DATA, "data", "train_weights train_epochs"),
    **_fields(
        Rule.FREE,
        "data",
        "valid_data decoder num_workers prefetch cache_dir cache_gb read_timeout read_retries "
        "max_consecutive_failures max_bad_share",
    ),
    **_fields(Rule.START, "data", "change_lanes change_data"),
    # No layout changes what is trained. Which layouts can read the optimizer's state: ``loading.check_layout``.
    **_fields(
        Rule.FREE,
        "parallel",
        "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "context_parallel_size cp_comm_type num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
        "sequence_parallel overlap_grad_reduce overlap_param_gather tp_comm_overlap tp_comm_overlap_ag "
        "tp_comm_overlap_rs tp_comm_overlap_rs_dgrad fsdp recompute recompute_modules recompute_num_layers "
        "offload_modules",
    ),
    **_fields(Rule.RUN, "train", "global_batch_size"),
    **_fields(Rule.DATA, "train", "seed"),
    **_fields(
        Rule.FREE,
        "train",
        "micro_batch_size train_iters lr min_lr lr_warmup_iters weight_decay adam_beta1 adam_beta2 adam_eps clip_grad "
        "precision attention_backend transformer_impl fp8 fp8_recipe fp8_primary_weights fp8_attention fp8_fallback "
        "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fusion cuda_graph check_memory "
        "exit_interval exit_duration_in_mins",
    ),
    **_fields(Rule.START, "checkpoint", "save load finetune verify change_drop_path"),
    **_fields(
        Rule.FREE,
        "checkpoint",
        "save_interval async_save fully_reshardable_every keep_last keep_every keep_best",
    ),
    **_fields(
        Rule.FREE,
        "faults",
        "on_spike spike_threshold spike_window max_bad_steps max_rollbacks rerun_bad_steps step_timeout "
        "check_replicas_interval stop_file inject_fault allow_fault_injection",
    ),
    **_fields(
        Rule.FREE,
        "log",
        "log_interval timing_log_level profile profile_steps profile_ranks eval_interval eval_iters tensorboard_dir "
        "wandb_project caption_samples",
    ),
    **_fields(Rule.START, "log", "eval_only"),
}
_FINETUNE = " (--finetune starts a new run from the weights)"
_CHANGE_DATA = " (--change-data accepts it)"
_HINTS = {
    "model.drop_path_rate": " (--change-drop-path accepts it)",
    "model.init_method_std": _FINETUNE,
    "model.freeze_embeddings": _FINETUNE,
    "model.freeze_head": _FINETUNE,
}
# Compared elsewhere: the tokenizer by its fingerprint, and by the plan what a cursor's numbers depend on.
_NOT_BY_VALUE = {
    "data.tokenizer",
    "data.seq_length",
    "data.pack_buffer",
    "data.shuffle_window",
    "data.chunk_size",
    "train.seed",
    "train.global_batch_size",
}


def _differing(saved: RunConfig, config: RunConfig, *rules: Rule) -> Iterator[tuple[str, Any, Any]]:
    """(field, the checkpoint's value, this run's) of the fields under ``rules`` whose values differ."""
    theirs, ours = saved.to_dict(), config.to_dict()
    for name, rule in RULES.items():
        section, key = name.split(".")
        if rule in rules and theirs[section][key] != ours[section][key]:
            yield name, theirs[section][key], ours[section][key]


def _refused(name: str, theirs: Any, ours: Any, hint: str) -> str:
    return f"{name}: {theirs!r} in the checkpoint, {ours!r} here{hint}"


def model_differences(saved: RunConfig, config: RunConfig, same_run: bool) -> list[str]:
    """Fields by which the saved model differs from the configured one, a line each.

    Args:
        same_run: the run goes on, so what is trained must stay the same as well.
    """
    accepted = {"model.drop_path_rate"} if config.checkpoint.change_drop_path else set()
    rules = (Rule.MODEL, Rule.RUN) if same_run else (Rule.MODEL,)
    return [
        _refused(name, theirs, ours, _HINTS.get(name, ""))
        for name, theirs, ours in _differing(saved, config, *rules)
        if name not in accepted | _NOT_BY_VALUE
    ]


def data_differences(saved: RunConfig, config: RunConfig, other_data: bool) -> list[str]:
    """Fields by which the saved run's data differ from the configured ones, a line each.

    Args:
        other_data: samples or their order are known to differ; what may be why is listed too.
    """
    modes = {saved.data.image_mode, config.data.image_mode}
    by_value = {"data.prompt"} | ({"data.fixed_resize"} if modes == {"fixed"} else set())
    return [
        _refused(name, theirs, ours, _CHANGE_DATA)
        for name, theirs, ours in _differing(saved, config, Rule.DATA)
        if name not in _NOT_BY_VALUE and (other_data or name in by_value)
    ]


def accepted_changes(saved: RunConfig, config: RunConfig) -> list[str]:
    """What a run that goes on does otherwise than the one that saved, a line for each field; nothing is refused."""
    rules = [rule for rule in Rule if rule is not Rule.START]
    return [f"{name} was {theirs!r}, is {ours!r}" for name, theirs, ours in _differing(saved, config, *rules)]
