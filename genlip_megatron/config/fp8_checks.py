"""Settings of FP8 and Transformer Engine that contradict each other or do not fit the model; see ``checks.py``."""

from __future__ import annotations

from genlip_megatron.config import LINEAR_INPUTS, RunConfig

_ALIGNMENT = 16  # of every dimension of an FP8 product


def check_engine(config: RunConfig) -> None:
    """Raise ValueError for settings that need others."""
    train, parallel = config.train, config.parallel
    local = train.transformer_impl != "transformer_engine"
    if parallel.tp_comm_overlap:
        tp = parallel.tensor_model_parallel_size
        if local or tp == 1 or not parallel.sequence_parallel:
            raise ValueError(
                "parallel.tp_comm_overlap: needs --transformer-impl transformer_engine, --tp 2 or more, and "
                f"--sequence-parallel; here are {train.transformer_impl}, {tp} and {parallel.sequence_parallel}"
            )
        if config.log.caption_samples and config.data.valid_data:
            raise ValueError(
                f"parallel.tp_comm_overlap: not with log.caption_samples = {config.log.caption_samples} and "
                "data.valid_data, since its buffers hold the tokens of a micro-batch and captions run on others; add "
                "--caption-samples 0"
            )
    if train.fp8 == "none":
        for name in ("fp8_primary_weights", "fp8_attention", "first_last_layers_bf16"):
            if getattr(train, name):
                raise ValueError(f"train.{name}: needs --fp8 hybrid")
        return
    if local:
        raise ValueError(f"train.fp8 = {train.fp8}: needs --transformer-impl transformer_engine, here is local")
    if train.precision == "fp32":
        raise ValueError(f"train.fp8 = {train.fp8}: needs train.precision = bf16, here is fp32")
    if parallel.fsdp:
        raise ValueError(f"train.fp8 = {train.fp8}: not with parallel.fsdp, whose float32 shards it would requantise")
    if train.fp8_attention and train.attention_backend not in ("auto", "te"):
        raise ValueError(
            f"train.fp8_attention: needs train.attention_backend = auto or te, here is {train.attention_backend}"
        )
    if train.fp8_attention and "core_attn" in parallel.recomputed:
        raise ValueError(
            "train.fp8_attention: not with core_attn in parallel.recompute_modules, which computes it again outside of "
            "FP8; take other modules, such as --recompute-modules mlp, or --recompute full, or leave out one of them"
        )
    _check_layers(config)
    _check_shapes(config)


def _check_layers(config: RunConfig) -> None:
    """Which layers are in BF16, and whether the recipe allows it."""
    train, parallel = config.train, config.parallel
    delayed = train.fp8_recipe == "delayed"
    # A linear whose input is made again keeps no FP8 copy of it, which only current scaling can make again.
    if delayed and (again := [name for name in parallel.recomputed if name in LINEAR_INPUTS]):
        others = "mlp" if train.fp8_attention else "core_attn,mlp"
        raise ValueError(
            f"parallel.recompute_modules: not {', '.join(again)} with delayed FP8 scaling; take "
            f"--recompute-modules {others}, or --fp8-recipe current"
        )
    if not train.first_last_layers_bf16:
        return
    if delayed:
        raise ValueError(
            "train.first_last_layers_bf16: not with delayed scaling, which takes all layers or none; use --fp8-recipe "
            "current"
        )
    most = config.model.num_layers // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= getattr(train, name) <= most:
            raise ValueError(
                f"train.{name} = {getattr(train, name)}: must be from 0 to model.num_layers / "
                f"pipeline_model_parallel_size = {most}"
            )


def _check_shapes(config: RunConfig) -> None:
    """Every dimension of a layer's products on one rank is a multiple of 16."""
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    ranks = f"tensor_model_parallel_size = {tp}"
    tokens, share = config.data.seq_length * config.train.micro_batch_size, cp
    if parallel.sequence_parallel:
        share *= tp
        ranks_of_tokens = f"(context_parallel_size * tensor_model_parallel_size = {share})"
    else:
        ranks_of_tokens = f"(context_parallel_size = {share})"
    sizes = (
        ("data.seq_length * train.micro_batch_size", tokens, share, ranks_of_tokens),
        ("model.hidden_size", model.hidden_size, tp, ranks),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tp, ranks),
    )
    for name, size, divisor, among in sizes:
        step = divisor * _ALIGNMENT
        if size % step:
            raise ValueError(
                f"train.fp8 = {config.train.fp8}: a rank's share of {name} = {size} over {among} must be a multiple of "
                f"{_ALIGNMENT}, is {size / divisor:g}; nearest allowed: {max(round(size / step), 1) * step}"
            )
