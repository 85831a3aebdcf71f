"""Settings of FP8 and Transformer Engine that contradict each other or do not fit the model; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Iterator

from genlip_megatron.config.error_text import nearest_multiple
from genlip_megatron.config.schema import LINEAR_INPUTS, RunConfig

_ALIGNMENT = 16  # of every dimension of an FP8 matrix product


def fp8_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong, as in ``checks.py``."""
    train, parallel = config.train, config.parallel
    local = train.transformer_impl != "transformer_engine"
    if parallel.tp_comm_overlap:
        if local or parallel.tensor_model_parallel_size == 1 or not parallel.sequence_parallel:
            yield (
                "parallel.tp_comm_overlap, train.transformer_impl, parallel.tensor_model_parallel_size, "
                "parallel.sequence_parallel: overlap needs Transformer Engine, tensor parallelism and sequence "
                "parallelism. Use --transformer-impl transformer_engine --tp 2 (or more) --sequence-parallel."
            )
        if config.log.caption_samples and config.data.valid_data:
            yield (
                "parallel.tp_comm_overlap, log.caption_samples: the overlap buffers have the size of a micro-batch, "
                "and captions have other sizes. Add --caption-samples 0."
            )
    if train.fp8 == "none":
        for name in ("fp8_primary_weights", "fp8_attention", "first_last_layers_bf16"):
            if getattr(train, name):
                yield f"train.{name}: it needs FP8 linears. Add --fp8 hybrid."
        return
    if local:
        yield (
            "train.fp8, train.transformer_impl: FP8 needs Transformer Engine. Use --transformer-impl "
            "transformer_engine."
        )
    if train.precision == "fp32":
        yield "train.fp8, train.precision: FP8 needs bf16. Use --precision bf16 or auto."
    if parallel.fsdp:
        yield (
            "train.fp8, parallel.fsdp: FSDP's float32 shards would be quantized again in every pass. Use --fp8 none "
            "or --no-fsdp."
        )
    if train.fp8_attention:
        if train.attention_backend not in ("auto", "te"):
            yield (
                "train.fp8_attention, train.attention_backend: only Transformer Engine has FP8 attention. Use "
                "--attention-backend auto or te."
            )
        if "core_attn" in parallel.recomputed:
            yield (
                "train.fp8_attention, parallel.recompute_modules: core_attn would be recomputed outside FP8. Use "
                "--recompute-modules mlp or --recompute full."
            )
    yield from _layers(config)
    yield from _shapes(config)


def _layers(config: RunConfig) -> Iterator[str]:
    train, parallel = config.train, config.parallel
    delayed = train.fp8_recipe == "delayed"
    # A linear whose input is recomputed keeps no FP8 copy of it. Only current scaling can make that copy again.
    inputs = [name for name in parallel.recomputed if name in LINEAR_INPUTS]
    if delayed and inputs:
        yield (
            f"parallel.recompute_modules, train.fp8_recipe: delayed FP8 scaling cannot recompute {', '.join(inputs)}. "
            f"Use --recompute-modules {'mlp' if train.fp8_attention else 'core_attn,mlp'} or --fp8-recipe current."
        )
    if not train.first_last_layers_bf16:
        return
    if delayed:
        yield (
            "train.first_last_layers_bf16, train.fp8_recipe: delayed scaling needs all layers in FP8. Use "
            "--fp8-recipe current."
        )
    most = config.model.num_layers // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= getattr(train, name) <= most:
            yield (f"train.{name}: must be from 0 to num_layers / pipeline_model_parallel_size = {most}.")


def _shapes(config: RunConfig) -> Iterator[str]:
    """Every dimension of a layer's matrix products on one rank must be a multiple of 16."""
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sequence_ranks = cp * tp if parallel.sequence_parallel else cp
    tokens = config.data.seq_length * config.train.micro_batch_size
    headwise = []
    if model.attention_output_gate == "headwise":
        headwise = [
            ("model.attention_output_gate = headwise, model.num_attention_heads", model.num_attention_heads, tp)
        ]
    for settings, size, ranks in (
        ("data.seq_length, train.micro_batch_size", tokens, sequence_ranks),
        ("model.hidden_size", model.hidden_size, tp),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tp),
        *headwise,
    ):
        if size % (ranks * _ALIGNMENT):
            yield (
                f"train.fp8, {settings}: FP8 needs a multiple of {_ALIGNMENT} on each rank, and {size} / {ranks} = "
                f"{size / ranks:g}. The nearest allowed size is {nearest_multiple(size, ranks * _ALIGNMENT)}."
            )
