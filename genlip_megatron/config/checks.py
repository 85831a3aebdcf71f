"""Settings that contradict each other, a layout that does not fit: found before any file or process group is opened."""

from __future__ import annotations

import math
import re
from dataclasses import fields

from genlip_megatron.config import LINEAR_INPUTS, ParallelConfig, RunConfig, nearest, source_epochs, source_weights
from genlip_megatron.config.fp8_checks import check_engine
from genlip_megatron.faults.inject import parse_faults


def _positive(config: RunConfig) -> None:
    for section, names in {
        "model": (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "text_hidden_size",
            "vocab_size",
        ),
        "data": ("image_size", "seq_length", "pack_buffer", "shuffle_window", "chunk_size", "prefetch"),
        "parallel": tuple(f.name for f in fields(ParallelConfig) if f.name.endswith("_parallel_size")),
        "train": ("micro_batch_size", "global_batch_size", "train_iters"),
        "checkpoint": ("save_interval",),
        "faults": ("spike_window", "max_bad_steps"),
        "log": ("log_interval", "eval_iters"),
    }.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                raise ValueError(f"{section}.{name} = {value}: must be at least 1")


def _folders(config: RunConfig) -> None:
    places = {
        "checkpoint.save": config.checkpoint.save,
        "checkpoint.load": config.checkpoint.load,
        "log.tensorboard_dir": config.log.tensorboard_dir,
        "faults.stop_file": config.faults.stop_file,
        "data.cache_dir": config.data.cache_dir,
    }
    for name, place in places.items():
        if "://" in place:
            raise ValueError(
                f"{name} = {place}: a URL; name a place on a disk: only shards and manifests are read from stores"
            )


def _checkpoint(config: RunConfig) -> None:
    options = config.checkpoint
    if options.finetune and not options.load:
        raise ValueError("checkpoint.finetune: takes weights from a checkpoint: name it with --load")
    if options.finetune and options.load == options.save:
        raise ValueError(
            f"checkpoint.load = {options.load}: with --finetune it must be another run's folder than checkpoint.save"
        )


def _ranges(config: RunConfig) -> None:
    model, data, train, log = config.model, config.data, config.train, config.log
    checkpoint, faults = config.checkpoint, config.faults
    share, at_least_0 = "must be in [0, 1)", "must be at least 0"
    rules = (
        ("model.drop_path_rate", model.drop_path_rate, 0 <= model.drop_path_rate < 1, share),
        ("model.layer_scale_init", model.layer_scale_init, model.layer_scale_init >= 0, at_least_0),
        ("model.init_method_std", model.init_method_std, model.init_method_std >= 0, at_least_0),
        ("model.rope_theta", model.rope_theta, model.rope_theta > 1, "must be above 1"),
        ("data.image_size", data.image_size, data.image_size % 16 == 0, "must be a multiple of the patch size 16"),
        ("data.min_pixels", data.min_pixels, data.min_pixels >= 256, "must be at least 256, one patch"),
        (
            "data.max_pixels",
            data.max_pixels,
            data.max_pixels >= data.min_pixels,
            f"must be at least data.min_pixels = {data.min_pixels}",
        ),
        ("data.num_workers", data.num_workers, data.num_workers >= 0, at_least_0),
        ("data.cache_gb", data.cache_gb, data.cache_gb > 0, "must be above 0"),
        ("data.read_timeout", data.read_timeout, data.read_timeout > 0, "must be above 0"),
        ("data.read_retries", data.read_retries, data.read_retries >= 0, at_least_0),
        (
            "data.max_consecutive_failures",
            data.max_consecutive_failures,
            data.max_consecutive_failures >= 0,
            at_least_0,
        ),
        ("data.max_bad_share", data.max_bad_share, 0 <= data.max_bad_share <= 1, "must be from 0 to 1 (never stop)"),
        ("train.lr", train.lr, train.lr > 0, "must be above 0"),
        ("train.min_lr", train.min_lr, 0 <= train.min_lr <= train.lr, f"must be from 0 to train.lr = {train.lr}"),
        (
            "train.lr_warmup_iters",
            train.lr_warmup_iters,
            0 <= train.lr_warmup_iters < train.train_iters,
            f"must be from 0 to below train.train_iters = {train.train_iters}",
        ),
        ("train.weight_decay", train.weight_decay, train.weight_decay >= 0, at_least_0),
        ("train.adam_beta1", train.adam_beta1, 0 <= train.adam_beta1 < 1, share),
        ("train.adam_beta2", train.adam_beta2, 0 <= train.adam_beta2 < 1, share),
        ("train.adam_eps", train.adam_eps, train.adam_eps > 0, "must be above 0"),
        ("train.clip_grad", train.clip_grad, train.clip_grad >= 0, at_least_0),
        ("train.seed", train.seed, train.seed >= 0, at_least_0),
        ("train.exit_interval", train.exit_interval, train.exit_interval >= 0, at_least_0),
        ("train.exit_duration_in_mins", train.exit_duration_in_mins, train.exit_duration_in_mins >= 0, at_least_0),
        (
            "checkpoint.fully_reshardable_every",
            checkpoint.fully_reshardable_every,
            checkpoint.fully_reshardable_every >= 0,
            at_least_0,
        ),
        ("checkpoint.keep_last", checkpoint.keep_last, checkpoint.keep_last >= 0, at_least_0),
        ("checkpoint.keep_every", checkpoint.keep_every, checkpoint.keep_every >= 0, at_least_0),
        ("checkpoint.keep_best", checkpoint.keep_best, checkpoint.keep_best >= 0, at_least_0),
        ("faults.spike_threshold", faults.spike_threshold, faults.spike_threshold > 0, "must be above 0"),
        ("faults.max_rollbacks", faults.max_rollbacks, faults.max_rollbacks >= 0, at_least_0),
        ("faults.step_timeout", faults.step_timeout, faults.step_timeout >= 0, "must be at least 0; 0: no limit"),
        (
            "faults.check_replicas_interval",
            faults.check_replicas_interval,
            faults.check_replicas_interval >= 0,
            at_least_0,
        ),
        ("log.eval_interval", log.eval_interval, log.eval_interval >= 0, at_least_0),
        ("log.timing_log_level", log.timing_log_level, log.timing_log_level in (0, 1, 2), "must be 0, 1 or 2"),
        ("log.caption_samples", log.caption_samples, log.caption_samples >= 0, at_least_0),
    )
    for name, value, holds, allowed in rules:
        if not holds:
            raise ValueError(f"{name} = {value}: {allowed}")


def _divides(what: str, value: int, setting: str, divisor: int) -> None:
    if value % divisor:
        allowed = [str(d) for d in range(1, min(value, 64) + 1) if value % d == 0]
        raise ValueError(f"{what} = {value} is not a multiple of {setting} = {divisor}; allowed: {', '.join(allowed)}")


def profiled_steps(text: str) -> tuple[int, int]:
    """(first, last) step of ``log.profile_steps``; both are recorded.

    Raises:
        ValueError: not FIRST:LAST, or no step.

    >>> profiled_steps("10:12")
    (10, 12)
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"log.profile_steps = {text!r}: expected FIRST:LAST, two steps that are both recorded and count from 1, as "
            "in 10:12"
        )
    return first, last


def profile_folder(config: RunConfig) -> str:
    """Where traces go: beside the run's checkpoints or its TensorBoard log; empty when it has neither."""
    beside = config.checkpoint.save or config.log.tensorboard_dir
    return f"{beside}/profile" if beside else ""


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ValueError for settings that contradict each other; with ``world_size``, also for layouts that do not fit.

    Checked before any file is opened or process group made, so that a mistake costs nothing.
    """
    _positive(config)
    _ranges(config)
    _folders(config)
    _checkpoint(config)
    model, data = config.model, config.data
    _divides("model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads)
    if model.head_dim % 2:
        raise ValueError(
            f"model.hidden_size / model.num_attention_heads = {model.head_dim}: must be even, for rotary positions"
        )
    if len(model.rope_sections) != 3:
        raise ValueError(f"model.rope_sections = {model.rope_sections}: expected three numbers (T, H, W)")
    _check_layout(config)
    check_engine(config)
    if data.train_weights and data.train_epochs:
        raise ValueError("data.train_weights and data.train_epochs: give one of them")
    source_weights(data)
    source_epochs(data)
    _check_faults(config)
    if config.log.profile:
        _check_profile(config)
    if config.log.eval_only and not config.checkpoint.load:
        raise ValueError("log.eval_only needs checkpoint.load: name the checkpoint folder with --load")
    if world_size is not None:
        _check_world_size(config, world_size)


def _check_faults(config: RunConfig) -> None:
    save = config.checkpoint.save
    if config.faults.on_spike == "rollback" and not save and not config.log.eval_only:
        raise ValueError(
            "faults.on_spike = rollback: goes back to a checkpoint, and checkpoint.save names no folder for them; add "
            "--save, or allowed without: warn, skip"
        )
    for fault in parse_faults(config.faults):
        what = f"faults.inject_fault: {fault.kind} in step {fault.step} on rank {fault.rank} can never happen"
        if fault.step > config.train.train_iters:
            raise ValueError(f"{what}: allowed are steps 1 to train.train_iters = {config.train.train_iters}")
        if not save and (fault.place == "save" or fault.kind == "full-disk"):
            raise ValueError(f"{what}: without checkpoint.save nothing is saved; add --save")


def _check_profile(config: RunConfig) -> None:
    log = config.log
    _, last = profiled_steps(log.profile_steps)
    if last > config.train.train_iters:
        raise ValueError(
            f"log.profile_steps = {log.profile_steps}: allowed are steps 1 to train.train_iters = "
            f"{config.train.train_iters}"
        )
    if not log.profile_ranks or min(log.profile_ranks) < 0:
        ranks = ",".join(map(str, log.profile_ranks))
        raise ValueError(f"log.profile_ranks = {ranks!r}: expected ranks from 0, as in 0,7")
    if log.eval_only:
        raise ValueError("log.profile with log.eval_only: no step is trained that could be recorded; leave one out")
    if not profile_folder(config):
        raise ValueError(
            "log.profile: checkpoint.save and log.tensorboard_dir name no folder to write traces to; add --save or "
            "--tensorboard-dir"
        )


def _check_layout(config: RunConfig) -> None:
    model, parallel, train = config.model, config.parallel, config.train
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    _divides("model.num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tp)
    _divides("model.ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp)
    heads = model.num_attention_heads // tp
    if cp > 1 and parallel.cp_comm_type == "a2a" and heads % cp:
        allowed = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise ValueError(
            f"context_parallel_size = {cp}: a2a exchanges the {heads} heads of a rank (num_attention_heads / "
            f"tensor_model_parallel_size = {model.num_attention_heads} / {tp}) for sequence; allowed: {allowed}; or "
            "--cp-comm-type all_gather, which takes any number"
        )
    shares = {"context_parallel_size": cp}
    if parallel.sequence_parallel:
        shares = {"tensor_model_parallel_size": tp, **shares}
    parts = math.prod(shares.values())
    tokens = config.data.seq_length * train.micro_batch_size
    if tokens % parts:
        raise ValueError(
            f"data.seq_length * micro_batch_size = {tokens} is not a multiple of {' * '.join(shares)} = {parts}; "
            f"nearest allowed: {max(round(tokens / parts), 1) * parts}"
        )
    _check_stages(config)
    _check_recomputation(config)
    if parallel.fsdp:
        _check_fsdp(parallel)
    if train.fusion == "norms" and train.transformer_impl != "local":
        raise ValueError(
            f"train.fusion = norms with train.transformer_impl = {train.transformer_impl}: its linears make their "
            "norms themselves; allowed: auto, compile, none"
        )
    if train.cuda_graph:
        _check_cuda_graph(config)


def _check_cuda_graph(config: RunConfig) -> None:
    """Refuse what a captured micro-batch cannot hold: exchanges that the host orders, and scales that it keeps."""
    parallel, train = config.parallel, config.train
    for name, allowed, flag in (
        ("tensor_model_parallel_size", 1, "--tp 1"),
        ("pipeline_model_parallel_size", 1, "--pp 1"),
        ("context_parallel_size", 1, "--cp 1"),
        ("fsdp", False, "--no-fsdp"),
        ("overlap_grad_reduce", False, "--no-overlap-grad-reduce"),
        ("overlap_param_gather", False, "--no-overlap-param-gather"),
        ("recompute", "none", "--recompute none"),
        ("offload_modules", (), "no --offload-modules"),
    ):
        if (value := getattr(parallel, name)) != allowed:
            raise ValueError(
                f"train.cuda_graph with parallel.{name} = {value}: a graph holds the passes of one whole model, "
                f"without exchanges between ranks or recomputation; allowed: {flag}"
            )
    if train.fp8 != "none" or train.fp8_attention:
        raise ValueError("train.cuda_graph with FP8: its scales are kept by the host between passes; leave one out")
    if train.attention_backend not in ("auto", "varlen", "te"):
        raise ValueError(
            f"train.cuda_graph with train.attention_backend = {train.attention_backend}: its shapes follow the "
            "samples; allowed: auto, varlen, te"
        )


def _check_stages(config: RunConfig) -> None:
    layers, parallel = config.model.num_layers, config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if vpp > 1 and pp == 1:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size = {vpp} needs pipeline_model_parallel_size > 1, here is 1; "
            "allowed: --vpp 1, or --pp 2 and more"
        )
    if pp * vpp > layers:
        what = f"pipeline_model_parallel_size = {pp}: more stages"
        if vpp > 1:
            what = f"pipeline_model_parallel_size * virtual_pipeline_model_parallel_size = {pp} * {vpp}: more chunks"
        raise ValueError(
            f"{what} than model.num_layers = {layers}; with --vpp {vpp} allowed: --pp 1 to {layers // vpp}"
        )
    if not first and not last:
        return
    setting = f"num_layers_in_first_pipeline_stage = {first}, num_layers_in_last_pipeline_stage = {last}"
    if pp == 1 or vpp > 1 or min(first, last) < 0:
        raise ValueError(
            f"{setting}: they are numbers of layers, 0 for computed, and need pipeline_model_parallel_size > 1 (it is "
            f"{pp}) without interleaving (vpp is {vpp})"
        )
    others, rest = pp - bool(first) - bool(last), layers - first - last
    if rest < others or (rest and not others):
        raise ValueError(
            f"{setting}: leave {rest} of {layers} layers for the other {others} stages; each needs at least one, and "
            "none may be left over"
        )


_RECOMPUTE_MODULES = ("core_attn", "mlp", *LINEAR_INPUTS)
_OFFLOAD_MODULES = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm")


def _check_recomputation(config: RunConfig) -> None:
    parallel = config.parallel
    for name, allowed in (("recompute_modules", _RECOMPUTE_MODULES), ("offload_modules", _OFFLOAD_MODULES)):
        for module in getattr(parallel, name):
            if module not in allowed:
                raise ValueError(
                    f"parallel.{name}: unknown module {module!r}{nearest(module, allowed)} Allowed: "
                    f"{', '.join(allowed)}."
                )
    if parallel.recompute == "selective" and not parallel.recompute_modules:
        raise ValueError("parallel.recompute = selective: parallel.recompute_modules names no module")
    if "layernorm" in parallel.recomputed and config.train.fusion == "norms":
        raise ValueError(
            "parallel.recompute_modules: not layernorm with train.fusion = norms, which makes norms within other "
            "kernels; allowed: --fusion auto, compile, none"
        )
    if "output_gate" in parallel.recomputed and not config.model.attention_output_gate:
        raise ValueError("parallel.recompute_modules: output_gate needs model.attention_output_gate; leave it out")
    if {"mlp", "mlp_act"} <= set(parallel.recomputed):
        raise ValueError("parallel.recompute_modules: mlp makes mlp_act again as well; leave mlp_act out")
    if len(set(parallel.recompute_modules)) < len(parallel.recompute_modules):
        raise ValueError(
            f"parallel.recompute_modules = {','.join(parallel.recompute_modules)}: names a module twice; leave one out"
        )
    # Offloading would move what is made again, or what it is made of.
    for name, moved in (("layernorm", ("attn_norm", "qkv_linear", "mlp_norm")), ("output_gate", ("attn_proj",))):
        both = [module for module in parallel.offload_modules if module in moved]
        if name in parallel.recomputed and both:
            raise ValueError(
                f"parallel.recompute_modules: not {name} with {', '.join(both)} in parallel.offload_modules, which "
                "would move what is made again; leave one out"
            )
    if not 0 <= parallel.recompute_num_layers <= config.model.num_layers:
        raise ValueError(
            f"parallel.recompute_num_layers = {parallel.recompute_num_layers}: must be from 0 (all) to "
            f"model.num_layers = {config.model.num_layers}"
        )
    if "attn_proj" in parallel.offload_modules and "core_attn" not in parallel.offload_modules:
        raise ValueError("parallel.offload_modules: attn_proj needs core_attn as well, whose output is its input")


def _check_fsdp(parallel: ParallelConfig) -> None:
    if parallel.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"parallel.fsdp with pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size}: every "
            "micro-batch would gather all weights anew; allowed: 1"
        )
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            raise ValueError(
                f"parallel.{name} with parallel.fsdp: sharding overlaps by itself; leave {name} out, or where a recipe "
                "sets it: --no-overlap-grad-reduce --no-overlap-param-gather"
            )


def _check_world_size(config: RunConfig, world_size: int) -> None:
    for fault in parse_faults(config.faults):
        if fault.rank >= world_size:
            raise ValueError(
                f"faults.inject_fault: {fault.kind} in step {fault.step} on rank {fault.rank} can never happen: "
                f"allowed are ranks 0 to {world_size - 1} of {world_size} processes"
            )
    if config.log.profile and max(config.log.profile_ranks) >= world_size:
        raise ValueError(
            f"log.profile_ranks = {','.join(map(str, config.log.profile_ranks))}: allowed are ranks 0 to "
            f"{world_size - 1} of {world_size} processes"
        )
    parallel, train = config.parallel, config.train
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if world_size % ranks:
        lower, upper = world_size // ranks * ranks, -(-world_size // ranks) * ranks
        raise ValueError(
            f"world size {world_size} is not a multiple of tp * pp * cp = {ranks}; start "
            f"{f'{lower} or ' if lower else ''}{upper} processes (torchrun --nproc-per-node), or change the layout"
        )
    share = train.micro_batch_size * (world_size // ranks)
    if train.global_batch_size % share:
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size} packs is not a multiple of micro_batch_size * "
            f"data parallel size = {train.micro_batch_size} * {world_size // ranks}; "
            f"nearest allowed: {max(share, round(train.global_batch_size / share) * share)}"
        )
    pp, micro_batches = parallel.pipeline_model_parallel_size, train.global_batch_size // share
    if parallel.virtual_pipeline_model_parallel_size > 1 and micro_batches % pp:
        nearest = max(round(micro_batches / pp), 1) * pp * share
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size} packs are {micro_batches} micro-batches a pipeline; "
            f"with interleaving they must be a multiple of pipeline_model_parallel_size = {pp}; "
            f"nearest allowed: global_batch_size {nearest}"
        )
