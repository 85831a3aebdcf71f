"""The configuration of a whole run: strict dataclasses, filled from a recipe, a YAML file and flags.

Order of precedence, lowest first: the defaults below, the YAML file or named recipe (``--config``), flags. A
field has the same name in the YAML file, as a flag (with dashes, ``arguments.py``), in the code and in the
documentation. Unknown keys are errors that name the nearest known one; ``checks.py`` finds settings that contradict
each other.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.resources
import itertools
import math
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from genlip_megatron.config import foreign_names

DEFAULT_PROMPT = "Describe the image in detail."
PATCH_SIZE = 16
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE


def _opt(default: Any, text: str, *aliases: str, choices: tuple[str, ...] = (), paths: bool = False) -> Any:
    """A dataclass field with its help text, short flags and allowed values; ``paths``: a list of files and the like."""
    return field(default=default, metadata={"help": text, "aliases": aliases, "choices": choices, "paths": paths})


@dataclass(frozen=True)
class ModelConfig:
    """Model. Sizes and initialisation follow the paper's Table 1; see the recipes for the named sizes."""

    num_layers: int = _opt(27, "Transformer layers")
    hidden_size: int = _opt(1152, "width D of the Transformer")
    num_attention_heads: int = _opt(16, "attention heads")
    ffn_hidden_size: int = _opt(3072, "inner width F of the SwiGLU")
    text_hidden_size: int = _opt(1152, "width E of the token embedding and LM head; projections are added when E != D")
    vocab_size: int = _opt(151936, "rows of the token embedding and LM head (the tokenizer may be smaller)")
    rope_sections: tuple[int, ...] = _opt((12, 12, 12), "T,H,W sections of the interleaved rotary embedding")
    rope_theta: float = _opt(10000.0, "base of the rotary frequencies")
    layernorm_epsilon: float = _opt(1e-6, "epsilon of every LayerNorm")
    layer_scale_init: float = _opt(0.1, "initial LayerScale value; 0 leaves LayerScale out")
    drop_path_rate: float = _opt(0.1, "share of residual branches dropped, per sample; 0 turns DropPath off")
    attention_output_gate: bool = _opt(True, "multiply attention's output by a sigmoid gate")
    init_method_std: float = _opt(0.02, "standard deviation of normally initialised weights")
    freeze_embeddings: bool = _opt(False, "do not train the token embedding (and in_proj)")
    freeze_head: bool = _opt(False, "do not train the LM head (and proj)")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    """Data. Images, tokens and packs."""

    train_data: tuple[str, ...] = _opt(
        (),
        "training data: manifests (.dataset.json), or files, folders, globs or brace lists of .tar, comma separated",
        paths=True,
    )
    train_weights: tuple[str, ...] = _opt(
        (), "shares of the entries of train_data, as 7:3; from a step on as 5:5@20000; none: all once an epoch"
    )
    train_epochs: str = _opt("", "instead of weights: how often each entry comes in an epoch of all, as 1:4")
    valid_data: tuple[str, ...] = _opt((), "validation data, named like train_data", paths=True)
    tokenizer: str = _opt("", "Hugging Face tokenizer.json or SentencePiece .model file")
    prompt: str = _opt(DEFAULT_PROMPT, "prompt of samples that come with a caption only")
    image_mode: str = _opt("fixed", "how images are resized", choices=("fixed", "native"))
    image_size: int = _opt(224, "side of fixed-size images in pixels, a multiple of 16")
    fixed_resize: str = _opt("squash", "how a fixed size is reached", choices=("squash", "resize-center-crop"))
    min_pixels: int = _opt(4096, "native mode: smallest image area, 16 patches by default")
    max_pixels: int = _opt(262144, "native mode: largest image area, 1024 patches by default")
    seq_length: int = _opt(16384, "tokens of one pack")
    pack_buffer: int = _opt(512, "samples a lane looks ahead to fill a pack")
    shuffle_window: int = _opt(4096, "samples within which a lane shuffles")
    chunk_size: int = _opt(256, "neighbouring samples dealt to a lane together")
    decoder: str = _opt(
        "auto",
        "image decoder; auto is dali on a GPU and cpu without one, pillow the plain reference",
        choices=("auto", "dali", "cpu", "pillow"),
    )
    num_workers: int = _opt(0, "decoder threads per rank; 0: the machine's cores over its ranks, at most 16")
    prefetch: int = _opt(2, "micro-batches prepared ahead of the step")
    cache_dir: str = _opt("~/.cache/genlip_megatron", "folder for blocks of remote shards")
    cache_gb: float = _opt(64.0, "size in GB beyond which the least recently used blocks are dropped")
    read_timeout: float = _opt(60.0, "seconds after which a request to remote storage is given up and tried again")
    read_retries: int = _opt(5, "further tries of a failed request, after growing pauses")
    max_consecutive_failures: int = _opt(100, "stop after so many bad samples in a row on one rank; 0: never")
    max_bad_share: float = _opt(
        0.01, "stop when more than this share of the last samples (1,000 to 200,000) of all ranks were bad; 1: never"
    )
    change_lanes: bool = _opt(
        False, "resume with another global_batch_size: the rest of the epoch is dealt out to the new number of lanes"
    )
    change_data: bool = _opt(False, "resume on other data, or in another order of it: the data starts anew")


# Of ``parallel.recompute_modules``, those whose outputs linears read: making them again takes no product.
LINEAR_INPUTS = ("layernorm", "mlp_act", "output_gate")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism. Data parallel size is world size / (tp * pp * cp)."""

    tensor_model_parallel_size: int = _opt(1, "ranks that share each layer", "tp")
    pipeline_model_parallel_size: int = _opt(1, "pipeline stages", "pp")
    virtual_pipeline_model_parallel_size: int = _opt(1, "model chunks per pipeline stage (interleaved)", "vpp")
    context_parallel_size: int = _opt(1, "ranks that share each sequence", "cp")
    cp_comm_type: str = _opt(
        "a2a",
        "context-parallel attention: a2a exchanges heads for sequence; all_gather gathers keys and values, for more "
        "ranks than heads",
        choices=("a2a", "all_gather"),
    )
    num_layers_in_first_pipeline_stage: int = _opt(0, "layers of the first stage; 0: a balanced split is computed")
    num_layers_in_last_pipeline_stage: int = _opt(0, "layers of the last stage, beside the head; 0: computed")
    sequence_parallel: bool = _opt(True, "shard activations over the tensor-parallel group when tp > 1")
    overlap_grad_reduce: bool = _opt(False, "overlap gradient reduction with the backward pass")
    overlap_param_gather: bool = _opt(False, "overlap the parameter gather with the forward pass")
    tp_comm_overlap: bool = _opt(
        False, "overlap tensor-parallel communication with products by Transformer Engine's user buffers"
    )
    tp_comm_overlap_ag: bool = _opt(True, "with tp_comm_overlap: split the gathers of column-parallel linears")
    tp_comm_overlap_rs: bool = _opt(True, "with tp_comm_overlap: split the reductions of row-parallel linears")
    tp_comm_overlap_rs_dgrad: bool = _opt(False, "with tp_comm_overlap: split the reductions of input gradients")
    fsdp: bool = _opt(False, "shard weights, gradients and optimizer state over the data-parallel ranks")
    recompute: str = _opt(
        "none",
        "recompute activations in the backward pass: whole layers (full) or recompute_modules (selective)",
        choices=("none", "selective", "full"),
    )
    recompute_modules: tuple[str, ...] = _opt(
        ("core_attn",), "selective: any of core_attn, mlp and, without a product, layernorm, mlp_act and output_gate"
    )
    recompute_num_layers: int = _opt(0, "full: so many layers of each model chunk; 0: all")
    offload_modules: tuple[str, ...] = _opt(
        (), "inputs moved to host memory until the backward pass: attn_norm, qkv_linear, core_attn, attn_proj, mlp_norm"
    )

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The modules that each layer recomputes: ``recompute_modules`` where ``recompute`` is selective."""
        return self.recompute_modules if self.recompute == "selective" else ()


@dataclass(frozen=True)
class TrainConfig:
    """Training. Batches are counted in packs; samples and tokens are reported."""

    micro_batch_size: int = _opt(1, "packs of one forward pass on one data-parallel rank", "mbs")
    global_batch_size: int = _opt(512, "packs of one optimizer step", "gbs")
    train_iters: int = _opt(257492, "optimizer steps of the run")
    lr: float = _opt(1e-3, "peak learning rate")
    min_lr: float = _opt(1e-6, "learning rate at the end of the cosine")
    lr_warmup_iters: int = _opt(1802, "steps of linear warmup")
    weight_decay: float = _opt(0.01, "AdamW weight decay, on every parameter")
    adam_beta1: float = _opt(0.9, "AdamW beta 1")
    adam_beta2: float = _opt(0.95, "AdamW beta 2")
    adam_eps: float = _opt(1e-8, "AdamW epsilon")
    clip_grad: float = _opt(1.0, "global gradient norm above which gradients are scaled down; 0: never")
    precision: str = _opt("auto", "auto is bf16 on a GPU, fp32 on a CPU", choices=("auto", "bf16", "fp32"))
    attention_backend: str = _opt(
        "auto",
        "exact prefix-LM attention; auto takes the first of varlen, te, grouped that runs here and says which",
        choices=("auto", "dense", "grouped", "varlen", "flex", "te"),
    )
    transformer_impl: str = _opt("local", "layer implementation", choices=("local", "transformer_engine"))
    fp8: str = _opt("none", "format of the layers' linears, with Transformer Engine", choices=("none", "hybrid"))
    fp8_recipe: str = _opt("delayed", "scales from past steps or from the tensor", choices=("delayed", "current"))
    fp8_primary_weights: bool = _opt(False, "hold the linears' weights in FP8 alone, beside the optimizer's float32")
    fp8_attention: bool = _opt(False, "image queries attend in FP8, in a layout of fixed length (text in BF16)")
    fp8_fallback: bool = _opt(False, "run in BF16, with a warning, what this machine cannot run in FP8")
    first_last_layers_bf16: bool = _opt(False, "with fp8 keep the first and last layers in BF16")
    num_layers_at_start_in_bf16: int = _opt(1, "with first_last_layers_bf16: first layers")
    num_layers_at_end_in_bf16: int = _opt(1, "with first_last_layers_bf16: last layers")
    fusion: str = _opt(
        "auto",
        "compile residual branches and rotary positions into one kernel each; auto does on a GPU; norms: the branches "
        "with the LayerNorms behind them",
        choices=("auto", "none", "compile", "norms"),
    )
    cuda_graph: bool = _opt(
        False, "replay forward and backward passes of micro-batches of one shape from CUDA graphs, on one GPU a model"
    )
    seed: int = _opt(1234, "seed of weights, DropPath and the order of the data")
    check_memory: bool = _opt(True, "refuse a layout that by estimate needs more memory than a rank has")
    exit_interval: int = _opt(0, "save and exit after each step that is a multiple of this; 0: run to train_iters")
    exit_duration_in_mins: float = _opt(0.0, "save and exit with status 17 so many minutes after the launch; 0: never")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str = _opt("", "folder of the run's checkpoints, from the newest of which it goes on; empty: none are saved")
    load: str = _opt("", "where to begin as long as save is empty: a folder of checkpoints, or one of them")
    save_interval: int = _opt(1000, "steps between checkpoints")
    finetune: bool = _opt(False, "take only the weights from load; optimizer, schedule and data start anew")
    async_save: bool = _opt(True, "write checkpoints behind the next steps; an update waits for the host copy alone")
    fully_reshardable_every: int = _opt(
        10,
        "every so many saves, and at the end, the optimizer state is stored for any tp and pp, gathered while training "
        "waits, and the newest such one is kept; 0: at the end alone",
    )
    keep_last: int = _opt(3, "newest good checkpoints that are kept; 0: all")
    keep_every: int = _opt(0, "checkpoints of steps that are a multiple of this are kept as well; 0: none")
    keep_best: int = _opt(1, "checkpoints of the lowest validation loss that are kept as well")
    verify: str = _opt(
        "full", "before loading compare checksums of all files (full) or only their sizes", choices=("full", "sizes")
    )
    change_drop_path: bool = _opt(False, "resume with another drop_path_rate than the checkpoint's")


@dataclass(frozen=True)
class FaultsConfig:
    """Faults. What a run does about bad numbers, hangs, silent corruption and requests to stop."""

    on_spike: str = _opt(
        "warn",
        "loss or gradient norm far above the last steps': say so, leave the update out, or go back to the last good "
        "checkpoint and leave out the data since",
        choices=("warn", "skip", "rollback"),
    )
    spike_threshold: float = _opt(10.0, "robust standard deviations above the median that make a spike")
    spike_window: int = _opt(128, "steps whose median and spread are compared with; half of them must be there")
    max_bad_steps: int = _opt(5, "steps in a row without an update after which the run rolls back, or else stops")
    max_rollbacks: int = _opt(3, "rollbacks without a newer checkpoint in between after which the run stops instead")
    rerun_bad_steps: bool = _opt(
        True, "compute a step of NaN or Inf once more: other numbers tell a faulty device from a fault of data or model"
    )
    step_timeout: float = _opt(20.0, "minutes without a finished step after which stacks are printed and the run ends")
    check_replicas_interval: int = _opt(
        1000, "steps between comparisons of data-parallel ranks' weights, which are made before each save too; 0: never"
    )
    stop_file: str = _opt("", "a file that makes the run save and exit when it appears; empty: <save>/stop")
    inject_fault: tuple[str, ...] = _opt(
        (), "for drills: faults as kind@step:rank, such as kill@7:0; needs allow_fault_injection"
    )
    allow_fault_injection: bool = _opt(False, "accept inject_fault")


@dataclass(frozen=True)
class LogConfig:
    """Logging and validation."""

    log_interval: int = _opt(10, "steps between progress lines")
    timing_log_level: int = _opt(0, "Megatron-Core's timers in the log: 0 none, 1 parts of a step, 2 details")
    profile: bool = _opt(False, "record traces of some steps into <save>/profile, else <tensorboard_dir>/profile")
    profile_steps: str = _opt("10:12", "first and last step that are recorded")
    profile_ranks: tuple[int, ...] = _opt((0,), "ranks that record")
    eval_interval: int = _opt(1000, "steps between validations; 0: only at the end")
    eval_iters: int = _opt(10, "global batches of one validation")
    eval_only: bool = _opt(False, "validate the loaded checkpoint and exit")
    tensorboard_dir: str = _opt("", "folder of the TensorBoard log; empty: <save>/tensorboard")
    wandb_project: str = _opt("", "also log to this Weights & Biases project")
    caption_samples: int = _opt(4, "validation captions written to TensorBoard at each validation")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dictionaries and lists, as written to YAML."""
        plain = dataclasses.asdict(self)
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()} for name, part in plain.items()
        }

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; reading it back gives an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "faults": FaultsConfig,
    "log": LogConfig,
}


# Overrides that leave out Transformer Engine.
LOCAL_LAYERS = {
    "train.transformer_impl": "local",
    "train.fp8": "none",
    "train.fp8_primary_weights": False,
    "train.fp8_attention": False,
    "train.first_last_layers_bf16": False,
    "parallel.tp_comm_overlap": False,
}


# Overrides that turn any run's layout into that of one process on any machine.
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


def recipe_names() -> list[str]:
    """Names that ``--config`` accepts besides a path."""
    folder = importlib.resources.files("genlip_megatron") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a sentence that names an unknown ``word``: a full stop, and up to three known words that are near.

    Near are words that differ in dashes, underscores or case, that ``word`` begins, with one slip in each part, or the
    same but for an ending.

    >>> nearest("--train_itres", ["--train-iters", "--lr"]), nearest("--learning-rate", ["--change-data"])
    (". Did you mean '--train-iters'?", '.')
    """
    wanted = foreign_names.plain(word)
    names = {name: foreign_names.plain(name) for name in known}
    most = wanted[: len(wanted) * 4 // 5 + 1]
    for near in (
        lambda name: name.replace("-", "") == wanted.replace("-", ""),
        lambda name: len(wanted) > 3 and name.startswith(wanted),
        lambda name: _one_slip_each(wanted, name),
        lambda name: len(wanted) > 8 and name.startswith(most) and _digits(wanted) == _digits(name),
    ):
        found = [word for word, name in names.items() if near(name)]
        if 0 < len(found) <= 3:
            return f". Did you mean {' or '.join(map(repr, found))}?"
    return "."


def _digits(name: str) -> list[str]:
    return re.findall(r"\d", name)


def _one_slip_each(word: str, name: str) -> bool:
    """Whether two names have the same digits, and each part of one is that of the other but for one letter that is
    missing, added or wrong, or two that changed places."""
    parts = list(zip(word.split("-"), name.split("-"), strict=False))
    same_form = word.count("-") == name.count("-") and _digits(word) == _digits(name)
    return same_form and len(word) > 2 and min(len(word), len(name)) > 2 and all(_one_slip(*part) for part in parts)


def _one_slip(a: str, b: str) -> bool:
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[first:], b[first:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def _unknown_key(section: str, key: str) -> str:
    """The end of a sentence that names an unknown key: what is meant instead, if it can be told."""
    places = {f.name: name for name, cls in SECTIONS.items() for f in fields(cls)}
    name = foreign_names.plain(key)
    for dotted in (f"{section}.{name}".replace("_", "-").lstrip("."), name):
        target = foreign_names.EQUAL.get(dotted, name.replace("-", "_"))
        if not section and target in SECTIONS:
            return f". Use section {target!r}."
        if target in places:
            return f". Use {places[target]}.{target}."
        if dotted in foreign_names.INSTEAD:
            return f": {foreign_names.INSTEAD[dotted]}."
    return nearest(key, [f.name for f in fields(SECTIONS[section])] if section in SECTIONS else [])


def _convert(value: Any, kind: Any, where: str, choices: tuple[str, ...]) -> Any:
    """``value`` (from YAML or a flag) as ``kind``; ValueError names the setting, the value and what is allowed."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} = {value!r}: expected a list of {item.__name__}")
        return tuple(_convert(part, item, where, ()) for part in value)
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError(f"{where} = {value!r}: expected true or false")
    if isinstance(value, bool) or value is None or isinstance(value, (list, dict)):
        raise ValueError(f"{where} = {value!r}: expected {kind.__name__}")
    try:
        converted = int(str(value)) if kind is int else kind(value)
    except (ValueError, TypeError):  # the latter of a date
        raise ValueError(f"{where} = {value!r}: expected {kind.__name__}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"{where} = {value!r}: expected a finite number")
    if choices and converted not in choices:
        raise ValueError(f"{where} = {value!r}: expected one of {', '.join(choices)}{nearest(str(value), choices)}")
    return converted


_URL = re.compile(r"[a-z0-9+.-]+://")
_LONGEST_PATH = 4096


def split_paths(text: str) -> list[str]:
    """The entries of a comma-separated list of paths, URLs, globs and brace lists, which may have commas in them.

    A comma is part of an entry within braces, where what it joins exists or matches, and in a URL where what follows
    is nothing on this machine. So a missing file of such a name counts as two entries.

    >>> split_paths("a.tar,x-{000,007}.tar,s3://bucket/b.tar")
    ['a.tar', 'x-{000,007}.tar', 's3://bucket/b.tar']
    """
    entries, pieces = [], text.split(",")
    while pieces:
        count = _pieces_of_first(pieces)
        entries.append(",".join(pieces[:count]))
        del pieces[:count]
    return [entry for entry in entries if entry]


def _pieces_of_first(pieces: list[str]) -> int:
    """How many of the pieces between commas make up the first entry."""
    # Up to where every brace is closed.
    opened = itertools.accumulate(piece.count("{") - piece.count("}") for piece in pieces)
    first = next((count for count, braces in enumerate(opened, 1) if not braces), 1)
    runs = {first: ",".join(pieces[:first])}
    for count in range(first + 1, len(pieces) + 1):
        if len(runs[count - 1]) > _LONGEST_PATH:
            break
        runs[count] = f"{runs[count - 1]},{pieces[count - 1]}"
    if _URL.match(pieces[0]):
        for count in list(runs)[:-1]:
            piece = pieces[count]
            whole = runs[count].endswith((".tar", ".json")) or piece.startswith("/") or _URL.match(piece)
            if whole or not piece or _matches(piece):
                return count
        return max(runs)
    exists = (count for count in sorted(runs, reverse=True) if os.path.lexists(runs[count]))
    matches = (count for count, run in runs.items() if len(runs) > 1 and _matches(run))
    return next(itertools.chain(exists, matches), first)


def _matches(path: str) -> bool:
    """Whether a path exists, or what a glob or brace list names."""
    try:
        parts = list(braceexpand(path)) if "{" in path else [path]
    except ValueError:
        parts = [path]
    return any(os.path.lexists(part) or next(glob.iglob(part, recursive=True), None) for part in parts)


def from_dict(tree: dict[str, Any], source: str) -> RunConfig:
    """A configuration from nested dictionaries.

    Raises:
        ValueError: an unknown section or key (the nearest known one is named), or a value of the wrong type.
    """
    sections: dict[str, Any] = {}
    for name, part in tree.items():
        if name not in SECTIONS:
            near = nearest(str(name), list(SECTIONS))
            if near == ".":
                near = _unknown_key("", str(name))
            raise ValueError(f"{source}: unknown section {name!r}{near} Sections: {', '.join(SECTIONS)}.")
        if not isinstance(part, dict):
            raise ValueError(f"{source}: section {name!r} must be a mapping, got {part!r}")
        kinds = typing.get_type_hints(SECTIONS[name])
        known = {f.name: f for f in fields(SECTIONS[name])}
        values = {}
        for key, value in part.items():
            if key not in known:
                raise ValueError(f"{source}: unknown key {name}.{key}{_unknown_key(name, str(key))}")
            if known[key].metadata["paths"] and isinstance(value, str):
                value = split_paths(value)
            values[key] = _convert(value, kinds[key], f"{source}: {name}.{key}", known[key].metadata["choices"])
        sections[name] = SECTIONS[name](**values)
    return RunConfig(**sections)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(problem="a key is no word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def load_yaml(name_or_path: str) -> dict[str, Any]:
    """The dictionary of a named recipe or a YAML file.

    Raises:
        ValueError: no such recipe or file, one that cannot be read, not YAML, a key given twice, or not a mapping.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        try:
            text = Path(name_or_path).read_text("utf-8-sig")
        except FileNotFoundError:
            raise ValueError(f"--config {name_or_path}: no such file") from None
        except OSError as error:
            raise ValueError(f"--config {name_or_path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"--config {name_or_path}: not UTF-8 text: {error}") from None
    else:
        names = recipe_names()
        if name_or_path not in names:
            raise ValueError(
                f"--config {name_or_path}: no such recipe{nearest(name_or_path, names)} "
                f"Recipes: {', '.join(names)}; or give the path of a YAML file."
            )
        text = (importlib.resources.files("genlip_megatron") / "recipes" / f"{name_or_path}.yaml").read_text()
    try:
        tree = yaml.load(text, _UniqueKeyLoader) or {}
    except RecursionError:
        raise ValueError(f"--config {name_or_path}: lists or mappings are nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that there is not
        raise ValueError(f"--config {name_or_path}: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--config {name_or_path}: expected a mapping of sections")
    return tree


def override(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """``config`` with ``{"section.key": value}`` replaced; values are converted and checked like YAML's."""
    tree = config.to_dict()
    for dotted, value in values.items():
        section, key = dotted.split(".")
        tree[section][key] = value
    return from_dict(tree, "flags")


def source_weights(data: DataConfig) -> list[tuple[int, tuple[float, ...]]]:
    """(first step, weight of each entry of train_data) of every phase in order; empty without ``train_weights``.

    Raises:
        ValueError: a phase that is not W1:W2:...[@STEP] with a weight for each entry, or phases out of order.
    """
    phases: list[tuple[int, tuple[float, ...]]] = []
    for text in data.train_weights:
        weights, _, step = text.partition("@")
        start = int(step) if step.isdigit() else 0 if not step and not phases else -1
        if start < 0 or (phases and start <= phases[-1][0]) or (not phases and start):
            raise ValueError(
                f"data.train_weights = {','.join(data.train_weights)!r}: the first weights count from step 0, each "
                f"later one needs a later step, as in 7:3,5:5@20000; got {text!r}"
            )
        phases.append((start, _numbers("data.train_weights", weights, len(data.train_data))))
    return phases


def source_epochs(data: DataConfig) -> tuple[float, ...]:
    """How often each entry of train_data comes in an epoch of all; empty without ``train_epochs``.

    Raises:
        ValueError: not a number for each entry.
    """
    return _numbers("data.train_epochs", data.train_epochs, len(data.train_data)) if data.train_epochs else ()


def _numbers(setting: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(":"))
    except ValueError:
        numbers = ()
    good = len(numbers) == count and all(0 <= number < math.inf for number in numbers) and any(numbers)
    if not good:
        raise ValueError(
            f"{setting} = {text!r}: expected {count} numbers, one for each entry of data.train_data, separated by "
            "colons (in YAML within quotes: '7:3'), none negative and not all 0"
        )
    return numbers
