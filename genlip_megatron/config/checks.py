"""Settings that contradict each other, and layouts that do not fit; checked before any file is opened."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from genlip_megatron.config.error_text import divisors, nearest_multiple, with_values
from genlip_megatron.config.fp8_checks import fp8_problems
from genlip_megatron.config.mixture import source_epochs, source_weights
from genlip_megatron.config.schema import RunConfig
from genlip_megatron.config.suggest import nearest
from genlip_megatron.config.values import check_ranges
from genlip_megatron.faults.inject import KINDS, PLACES, SENT, parse_faults


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Check all settings.

    Args:
        world_size: number of processes; None does not check whether the layout fits it.

    Raises:
        ValueError: a setting is out of range, settings contradict each other, or the layout does not fit.
    """
    check_ranges(config)
    layout = (_layout, _stages, _positions, _recompute, _fsdp, _cuda_graph, fp8_problems)
    parts = (_model, _local_paths, _schedule, _data, _checkpoint, *layout, _faults, _profile)
    problems = [part(config) for part in parts]
    if world_size is not None:
        problems.append(_world_size(config, world_size))
    for problem in itertools.chain(*problems):
        raise ValueError(with_values(config, problem))


# Each function below yields problems as "settings: what is wrong. What to do."; the values are filled in later.


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads: must divide model.hidden_size = {model.hidden_size}. Use one of "
            f"{divisors(model.hidden_size)}."
        )
    if model.head_dim % 2:
        yield (
            f"model.hidden_size, model.num_attention_heads: a head has {model.head_dim} channels, and the rotary "
            "embedding needs an even number. Change one of them."
        )


def _local_paths(config: RunConfig) -> Iterator[str]:
    for name in ("checkpoint.save", "checkpoint.load", "log.tensorboard_dir", "faults.stop_file", "data.cache_dir"):
        if "://" in config.value(name):
            yield f"{name}: is a URL; only shards and manifests are read from stores. Name a local path."


def _schedule(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.min_lr > train.lr:
        yield f"train.min_lr: is above train.lr = {train.lr}. Lower --min-lr or raise --lr."
    if train.lr_warmup_iters >= train.train_iters:
        yield (
            f"train.lr_warmup_iters: must be below train.train_iters = {train.train_iters}. Lower --lr-warmup-iters."
        )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.max_pixels < data.min_pixels:
        yield f"data.max_pixels: is below data.min_pixels = {data.min_pixels}. Raise --max-pixels."
    if data.train_weights and data.train_epochs:
        yield "data.train_weights, data.train_epochs: only one of them can set the mixture. Leave one out."
    source_weights(data)
    source_epochs(data)


def _checkpoint(config: RunConfig) -> Iterator[str]:
    options, eval_only = config.checkpoint, config.log.eval_only
    if options.finetune and not options.load:
        yield "checkpoint.finetune: there is no checkpoint to take weights from. Name one with --load."
    if options.finetune and options.load == options.save:
        yield (
            "checkpoint.load, checkpoint.save: --finetune starts a new run, which needs its own folder. Name another "
            "folder with --save."
        )
    if eval_only and not (options.load or options.save):
        yield "log.eval_only: there is no checkpoint to validate. Name one with --load."
    if eval_only and not config.data.valid_data:
        yield "log.eval_only: there is no validation data. Name it with --valid-data."


def _layout(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    for name in ("num_attention_heads", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % tp:
            yield (
                f"parallel.tensor_model_parallel_size: must divide model.{name} = {size}. Use --tp with one of "
                f"{divisors(size)}."
            )
    heads = model.num_attention_heads // tp
    if cp > 1 and parallel.cp_comm_type == "a2a" and heads % cp:
        yield (
            f"parallel.context_parallel_size: with a2a it must divide the {heads} attention heads of a "
            f"tensor-parallel rank ({model.num_attention_heads} / {tp}). Use --cp with one of {divisors(heads)}, or "
            "--cp-comm-type all_gather, which takes any number."
        )
    parts, factors = cp, f"context_parallel_size = {cp}"
    if parallel.sequence_parallel:
        parts, factors = tp * cp, f"tensor_model_parallel_size * context_parallel_size = {tp * cp}"
    tokens = config.data.seq_length * config.train.micro_batch_size
    if tokens % parts:
        yield (
            f"data.seq_length, train.micro_batch_size: their product {tokens} is not a multiple of {factors}. The "
            f"nearest multiple is {nearest_multiple(tokens, parts)}."
        )
    if config.train.fusion == "norms" and config.train.transformer_impl != "local":
        yield (
            "train.fusion: Transformer Engine's linears contain the LayerNorms already. Use --fusion auto, compile "
            "or none."
        )


def _stages(config: RunConfig) -> Iterator[str]:
    layers, parallel = config.model.num_layers, config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if vpp > 1 and pp == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size: interleaving needs more than one pipeline stage. Use "
            "--vpp 1, or --pp 2 or more."
        )
    if pp * vpp > layers:
        yield (
            f"parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size: {pp * vpp} stages "
            f"or chunks are more than model.num_layers = {layers}. With --vpp {vpp} use --pp 1 to {layers // vpp}."
        )
    if not first and not last:
        return
    if pp == 1 or vpp > 1:
        yield (
            "parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage: they need more "
            f"than one pipeline stage (pp is {pp}) and no interleaving (vpp is {vpp}). Leave them out."
        )
    others, rest = pp - bool(first) - bool(last), layers - first - last
    if rest < others or (rest and not others):
        yield (
            "parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage: they leave "
            f"{rest} of {layers} layers for the other {others} stages. Leave at least one layer for each other stage, "
            "and none if there is no other stage."
        )


def _positions(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.positions == "chunked" and sum(model.rope_sections) != model.head_dim // 2:
        yield (
            f"model.positions = chunked: the sum of model.rope_sections = {list(model.rope_sections)} must be half a "
            f"head, {model.head_dim // 2}. Change the sections."
        )


def _recompute(config: RunConfig) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    names, recomputed, offloaded = parallel.recompute_modules, parallel.recomputed, parallel.offload_modules
    if parallel.recompute == "selective" and not names:
        yield "parallel.recompute: parallel.recompute_modules names no module. Add --recompute-modules core_attn."
    if len(set(names)) < len(names):
        yield "parallel.recompute_modules: a module is named twice. Name it once."
    if "layernorm" in recomputed and train.fusion == "norms":
        yield (
            "parallel.recompute_modules: train.fusion = norms computes the LayerNorms inside other kernels, where "
            "layernorm cannot be recomputed. Use --fusion auto, compile or none."
        )
    if "output_gate" in recomputed and config.model.attention_output_gate == "none":
        yield (
            "parallel.recompute_modules: the model has no output gate (model.attention_output_gate = none). Leave "
            "output_gate out."
        )
    if {"mlp", "mlp_act"} <= set(recomputed):
        yield "parallel.recompute_modules: mlp recomputes mlp_act as well. Leave mlp_act out."
    # Offloading would move what is recomputed, or what it is recomputed from.
    for name, moved in (("layernorm", {"attn_norm", "qkv_linear", "mlp_norm"}), ("output_gate", {"attn_proj"})):
        if name in recomputed and moved.intersection(offloaded):
            yield (
                f"parallel.recompute_modules, parallel.offload_modules: {name} cannot be recomputed while "
                f"{', '.join(sorted(moved.intersection(offloaded)))} is offloaded. Leave one of them out."
            )
    if parallel.recompute_num_layers > config.model.num_layers:
        yield (
            f"parallel.recompute_num_layers: is above model.num_layers = {config.model.num_layers}. Use 0 for all "
            "layers."
        )
    if "attn_proj" in offloaded and "core_attn" not in offloaded:
        yield (
            "parallel.offload_modules: the input of attn_proj is the output of core_attn, which must be offloaded "
            "too. Add core_attn."
        )


def _fsdp(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.fsdp:
        return
    if parallel.pipeline_model_parallel_size > 1:
        yield (
            "parallel.fsdp, parallel.pipeline_model_parallel_size: every micro-batch would gather all weights again. "
            "Use --pp 1 or --no-fsdp."
        )
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            yield (
                f"parallel.fsdp, parallel.{name}: FSDP always overlaps its communication. Add "
                "--no-overlap-grad-reduce --no-overlap-param-gather."
            )


def _cuda_graph(config: RunConfig) -> Iterator[str]:
    train = config.train
    if not train.cuda_graph:
        return
    for name, allowed, flag in (
        ("tensor_model_parallel_size", 1, "--tp 1"),
        ("pipeline_model_parallel_size", 1, "--pp 1"),
        ("context_parallel_size", 1, "--cp 1"),
        ("fsdp", False, "--no-fsdp"),
        ("overlap_grad_reduce", False, "--no-overlap-grad-reduce"),
        ("overlap_param_gather", False, "--no-overlap-param-gather"),
        ("recompute", "none", "--recompute none"),
        ("offload_modules", (), "--offload-modules ''"),
    ):
        if getattr(config.parallel, name) != allowed:
            yield (
                f"train.cuda_graph, parallel.{name}: a graph holds a whole model's passes, without communication, "
                f"recomputation or offloading. Use {flag} or --no-cuda-graph."
            )
    if train.fp8 != "none" or train.fp8_attention:
        yield (
            "train.cuda_graph, train.fp8: the host updates FP8 scales between passes, which a graph cannot hold. Use "
            "--fp8 none or --no-cuda-graph."
        )
    if train.attention_backend not in ("auto", "varlen", "te"):
        yield (
            "train.cuda_graph, train.attention_backend: the shapes of this backend differ between micro-batches. Use "
            "--attention-backend auto, varlen or te."
        )


def _faults(config: RunConfig) -> Iterator[str]:
    save = config.checkpoint.save
    if config.faults.on_spike == "rollback" and not save and not config.log.eval_only:
        yield "faults.on_spike: there are no checkpoints to roll back to. Add --save, or use --on-spike warn or skip."
    faults = parse_faults(config.faults.inject_fault)
    for fault in faults:
        if fault.kind not in KINDS:
            near = nearest(fault.kind, KINDS)
            yield f"faults.inject_fault: unknown kind {fault.kind!r}{near} Allowed: {', '.join(KINDS)}."
        if fault.place != "step" and (fault.kind not in SENT or fault.place not in PLACES):
            yield (
                f"faults.inject_fault: a place ({', '.join(PLACES)}) may follow one of {', '.join(SENT)}. Use for "
                "example kill.save@4:1."
            )
    if faults and not config.faults.allow_fault_injection:
        yield (
            "faults.inject_fault: breaks the run on purpose and needs faults.allow_fault_injection. Add "
            f"--allow-fault-injection. Allowed kinds: {', '.join(KINDS)}."
        )
    for fault in faults:
        what = f"{fault.kind} in step {fault.step} on rank {fault.rank} can never happen"
        if fault.step > config.train.train_iters:
            yield (f"faults.inject_fault: {what}. Use steps 1 to train.train_iters = {config.train.train_iters}.")
        if not save and (fault.place == "save" or fault.kind == "full-disk"):
            yield f"faults.inject_fault: {what} without checkpoint.save. Add --save."


def _profile(config: RunConfig) -> Iterator[str]:
    log, train_iters = config.log, config.train.train_iters
    if not log.profile:
        return
    if log.profiled_steps[1] > train_iters:
        yield (
            f"log.profile_steps: the run has only {train_iters} steps (train.train_iters). Use steps 1 to "
            f"{train_iters}."
        )
    if min(log.profile_ranks, default=-1) < 0:
        yield "log.profile_ranks: expected ranks from 0. Use for example --profile-ranks 0,7."
    if log.eval_only:
        yield "log.profile, log.eval_only: no step is trained. Leave one of them out."
    if not config.profile_folder:
        yield (
            "log.profile: neither checkpoint.save nor log.tensorboard_dir names a folder for traces. Add --save or "
            "--tensorboard-dir."
        )


def _world_size(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, train, processes = config.parallel, config.train, f"0 to {world_size - 1} of {world_size} processes"
    for fault in parse_faults(config.faults.inject_fault):
        if fault.rank >= world_size:
            yield (
                f"faults.inject_fault: {fault.kind} in step {fault.step} on rank {fault.rank} can never happen. Use "
                f"ranks {processes}."
            )
    if config.log.profile and max(config.log.profile_ranks) >= world_size:
        yield f"log.profile_ranks: there is no such rank. Use ranks {processes}."
    pp = parallel.pipeline_model_parallel_size
    ranks = parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size
    if world_size % ranks:
        lower, upper = world_size // ranks * ranks, -(-world_size // ranks) * ranks
        yield (
            f"world size = {world_size}: not a multiple of tp * pp * cp = {ranks}. Start "
            f"{f'{lower} or ' if lower else ''}{upper} processes (torchrun --nproc-per-node), or change the layout."
        )
    data_parallel = world_size // ranks
    packs = train.micro_batch_size * data_parallel
    if train.global_batch_size % packs:
        yield (
            "train.global_batch_size: not a multiple of micro_batch_size * data parallel size = "
            f"{train.micro_batch_size} * {data_parallel}. The nearest multiple is "
            f"{nearest_multiple(train.global_batch_size, packs)}."
        )
    if parallel.virtual_pipeline_model_parallel_size > 1 and train.global_batch_size // packs % pp:
        yield (
            f"train.global_batch_size: gives a pipeline {train.global_batch_size // packs} micro-batches; with "
            f"interleaving they must be a multiple of pipeline_model_parallel_size = {pp}. The nearest allowed size "
            f"is {nearest_multiple(train.global_batch_size, pp * packs)}."
        )
