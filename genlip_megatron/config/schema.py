"""The settings of a run: one dataclass per section, one entry per setting.

An entry holds everything about its setting: type, default, help text, allowed values, and what a change means when a
run resumes. The command line, the range checks and the resume rules derive from it. A setting has the same name in
YAML, as a flag (with dashes), in the code and in the documentation.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import yaml

DEFAULT_PROMPT = "Describe the image in detail."
PATCH_SIZE = 16
PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE

# Backend NAME is the class ``Name`` of model/attention/NAME.py.
ATTENTION_BACKENDS = ("dense", "grouped", "varlen", "flex", "te")

# The ``parallel.recompute_modules`` whose outputs linears read. Recomputing them needs no matrix product.
LINEAR_INPUTS = ("layernorm", "mlp_act", "output_gate")


class OnResume(Enum):
    """What happens when a setting differs from the checkpoint's."""

    MODEL = "refused: the weights depend on it, also with --finetune and --eval-only"
    RUN = "refused on resume; --finetune and --eval-only accept it"
    DATA = "refused on resume, unless --change-data accepts it"
    FREE = "takes effect from the first step, and is printed"
    START = "only describes this start; never compared"


MODEL, RUN, DATA, FREE, START = OnResume


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, or the allowed length of a list.

    >>> print(Range(min=16, multiple_of=16)), print(Range(min=0, below=1)), 8 in Range(min=0)
    must be at least 16 and a multiple of 16
    must be at least 0 and below 1
    (None, None, True)
    """

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    length: int | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
            and (self.length is None or value == self.length)
        )

    def __str__(self) -> str:
        limits = {
            "at least": self.min,
            "at most": self.max,
            "above": self.above,
            "below": self.below,
            "a multiple of": self.multiple_of,
            "a list of length": self.length,
        }
        return f"must be {' and '.join(f'{text} {limit}' for text, limit in limits.items() if limit is not None)}"


def _opt(
    default: Any,
    text: str,
    on_resume: OnResume,
    *aliases: str,
    choices: tuple[str, ...] = (),
    paths: bool = False,
    switch: tuple[str, str] | None = None,
    **limits: Any,
) -> Any:
    """A setting.

    Args:
        text: for ``--help``.
        on_resume: what a value other than the checkpoint's means.
        aliases: short flags.
        choices: allowed values, of a list those of its entries.
        paths: a list of files, which may have commas in their names.
        switch: what true and false mean, of a choice that was a switch before.
        limits: as in ``Range``.
    """
    metadata = {"help": text, "on_resume": on_resume, "aliases": aliases, "choices": choices, "paths": paths}
    metadata["switch"] = switch
    return field(default=default, metadata={**metadata, "range": Range(**limits)})


@dataclass(frozen=True)
class ModelConfig:
    """Model. Sizes and initialization follow the paper's Table 1; recipes hold the named sizes."""

    num_layers: int = _opt(27, "Transformer layers", MODEL, min=1)
    hidden_size: int = _opt(1152, "Transformer width", MODEL, min=1)
    num_attention_heads: int = _opt(16, "attention heads", MODEL, min=1)
    ffn_hidden_size: int = _opt(3072, "inner width of the SwiGLU", MODEL, min=1)
    text_hidden_size: int = _opt(
        1152,
        "width of the token embedding and LM head; projections are added if it differs from hidden_size",
        MODEL,
        min=1,
    )
    vocab_size: int = _opt(
        151936, "rows of the token embedding and LM head; at least the tokenizer's largest id + 1", MODEL, min=1
    )
    rope_sections: tuple[int, ...] = _opt(
        (12, 12, 12), "T,H,W sections of the interleaved rotary embedding", MODEL, length=3
    )
    positions: str = _opt(
        "mrope",
        "axes of rotary channels: interleaved, 1d (index in the sample on every axis), or chunked (T, H, W in turn)",
        MODEL,
        choices=("mrope", "1d", "chunked"),
    )
    rope_theta: float = _opt(10000.0, "base of the rotary frequencies", MODEL, above=1)
    layernorm_epsilon: float = _opt(1e-6, "LayerNorm epsilon", MODEL, min=0)
    layer_scale_init: float = _opt(0.1, "initial LayerScale; 0: no LayerScale", MODEL, min=0)
    drop_path_rate: float = _opt(0.1, "fraction of residual branches dropped per sample", RUN, min=0, below=1)
    attention_output_gate: str = _opt(
        "elementwise",
        "sigmoid gate on the attention output: one value for each channel, one for each head, or none",
        MODEL,
        choices=("elementwise", "headwise", "none"),
        switch=("elementwise", "none"),
    )
    init_method_std: float = _opt(0.02, "standard deviation of normal initialization", RUN, min=0)
    freeze_embeddings: bool = _opt(False, "do not train the token embedding and its projection", RUN)
    freeze_head: bool = _opt(False, "do not train the LM head and its projection", RUN)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def gate_rows(self) -> int:
        """Rows of each head's output gate in the query projection."""
        return {"elementwise": self.head_dim, "headwise": 1, "none": 0}[self.attention_output_gate]


@dataclass(frozen=True)
class DataConfig:
    """Data. Images, tokens and packs."""

    train_data: tuple[str, ...] = _opt(
        (),
        "training data: manifests (.dataset.json), or .tar files, folders, globs or brace lists, comma separated",
        DATA,
        paths=True,
    )
    train_weights: tuple[str, ...] = _opt(
        (), "sampling weights of the train_data entries, such as 7:3; 7:3,5:5@20000 changes them at step 20000", DATA
    )
    train_epochs: str = _opt(
        "", "repeats of each train_data entry per epoch, such as 1:4; instead of train_weights", DATA
    )
    valid_data: tuple[str, ...] = _opt(
        (), "validation data, given like train_data; each manifest is a set with its own loss", FREE, paths=True
    )
    tokenizer: str = _opt("", "Hugging Face tokenizer.json or SentencePiece .model file", MODEL)
    prompt: str = _opt(DEFAULT_PROMPT, "prompt of samples that have only a caption", DATA)
    image_mode: str = _opt("fixed", "how images are resized", DATA, choices=("fixed", "native"))
    image_size: int = _opt(224, "fixed mode: side in pixels", DATA, min=PATCH_SIZE, multiple_of=PATCH_SIZE)
    fixed_resize: str = _opt("squash", "fixed mode: resize method", DATA, choices=("squash", "resize-center-crop"))
    min_pixels: int = _opt(4096, "native mode: smallest image area", DATA, min=PATCH_SIZE**2)
    max_pixels: int = _opt(262144, "native mode: largest image area", DATA)
    seq_length: int = _opt(16384, "tokens of one pack", DATA, min=1)
    pack_buffer: int = _opt(512, "samples that a lane looks ahead to fill a pack", DATA, min=1)
    shuffle_window: int = _opt(4096, "window, in samples, within which a lane shuffles", DATA, min=1)
    chunk_size: int = _opt(256, "neighboring samples that go to the same lane", DATA, min=1)
    decoder: str = _opt(
        "auto",
        "image decoder; auto: dali on a GPU, else cpu; pillow is the reference",
        FREE,
        choices=("auto", "dali", "cpu", "pillow"),
    )
    num_workers: int = _opt(0, "decoder threads per rank; 0: cores / ranks of the machine, at most 16", FREE, min=0)
    prefetch: int = _opt(2, "micro-batches prepared ahead", FREE, min=1)
    cache_dir: str = _opt("~/.cache/genlip_megatron", "folder for blocks of remote shards", FREE)
    cache_gb: float = _opt(64.0, "cache size in GB; the least recently used blocks are dropped first", FREE, above=0)
    read_timeout: float = _opt(60.0, "seconds before a request to remote storage is retried", FREE, above=0)
    read_retries: int = _opt(5, "retries of a failed request, with growing pauses", FREE, min=0)
    max_consecutive_failures: int = _opt(100, "stop after this many bad samples in a row; 0: never", FREE, min=0)
    max_bad_share: float = _opt(
        0.01, "stop when this fraction of recent samples (1,000 to 200,000) was bad; 1: never", FREE, min=0, max=1
    )
    change_lanes: bool = _opt(False, "on resume: accept another global_batch_size within an epoch", START)
    change_data: bool = _opt(False, "on resume: accept other data or another order; the data starts over", START)


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism. Data parallel size is world size / (tp * pp * cp)."""

    tensor_model_parallel_size: int = _opt(1, "ranks that share each layer", FREE, "tp", min=1)
    pipeline_model_parallel_size: int = _opt(1, "pipeline stages", FREE, "pp", min=1)
    virtual_pipeline_model_parallel_size: int = _opt(1, "model chunks per stage (interleaving)", FREE, "vpp", min=1)
    context_parallel_size: int = _opt(1, "ranks that share each sequence", FREE, "cp", min=1)
    cp_comm_type: str = _opt(
        "a2a",
        "a2a exchanges heads for sequence; all_gather gathers keys and values, for more ranks than heads",
        FREE,
        choices=("a2a", "all_gather"),
    )
    num_layers_in_first_pipeline_stage: int = _opt(0, "layers of the first stage; 0: balanced split", FREE, min=0)
    num_layers_in_last_pipeline_stage: int = _opt(0, "layers of the last stage; 0: balanced split", FREE, min=0)
    sequence_parallel: bool = _opt(True, "with tp > 1: shard activations over the tensor-parallel ranks", FREE)
    overlap_grad_reduce: bool = _opt(False, "overlap the gradient reduction with the backward pass", FREE)
    overlap_param_gather: bool = _opt(False, "overlap the parameter gather with the forward pass", FREE)
    tp_comm_overlap: bool = _opt(
        False, "overlap tensor-parallel communication with Transformer Engine's user buffers", FREE
    )
    tp_comm_overlap_ag: bool = _opt(True, "with tp_comm_overlap: split all-gathers of column-parallel linears", FREE)
    tp_comm_overlap_rs: bool = _opt(True, "with tp_comm_overlap: split reduce-scatters of row-parallel linears", FREE)
    tp_comm_overlap_rs_dgrad: bool = _opt(False, "with tp_comm_overlap: split reduce-scatters of input gradients", FREE)
    fsdp: bool = _opt(False, "shard weights, gradients and optimizer state over the data-parallel ranks", FREE)
    recompute: str = _opt(
        "none",
        "recompute activations in the backward pass: whole layers (full) or recompute_modules (selective)",
        FREE,
        choices=("none", "selective", "full"),
    )
    recompute_modules: tuple[str, ...] = _opt(
        ("core_attn",),
        "with recompute selective: core_attn, mlp, or the cheap layernorm, mlp_act, output_gate",
        FREE,
        choices=("core_attn", "mlp", *LINEAR_INPUTS),
    )
    recompute_num_layers: int = _opt(0, "with recompute full: layers of each model chunk; 0: all", FREE, min=0)
    offload_modules: tuple[str, ...] = _opt(
        (),
        "modules whose inputs move to host memory until the backward pass: attn_norm, qkv_linear, core_attn, "
        "attn_proj, mlp_norm",
        FREE,
        choices=("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"),
    )

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The modules that each layer recomputes: ``recompute_modules`` if ``recompute`` is selective."""
        return self.recompute_modules if self.recompute == "selective" else ()


@dataclass(frozen=True)
class TrainConfig:
    """Training. Batch sizes count packs."""

    micro_batch_size: int = _opt(1, "packs of one forward pass on one data-parallel rank", FREE, "mbs", min=1)
    global_batch_size: int = _opt(512, "packs of one optimizer step", RUN, "gbs", min=1)
    train_iters: int = _opt(257492, "optimizer steps of the run", FREE, min=1)
    lr: float = _opt(1e-3, "peak learning rate", FREE, above=0)
    min_lr: float = _opt(1e-6, "learning rate at the end of the cosine", FREE, min=0)
    lr_warmup_iters: int = _opt(1802, "steps of linear warmup", FREE, min=0)
    weight_decay: float = _opt(0.01, "AdamW weight decay, on every parameter", FREE, min=0)
    adam_beta1: float = _opt(0.9, "AdamW beta 1", FREE, min=0, below=1)
    adam_beta2: float = _opt(0.95, "AdamW beta 2", FREE, min=0, below=1)
    adam_eps: float = _opt(1e-8, "AdamW epsilon", FREE, above=0)
    clip_grad: float = _opt(1.0, "largest global gradient norm; 0: no clipping", FREE, min=0)
    precision: str = _opt("auto", "auto: bf16 on a GPU, fp32 on a CPU", FREE, choices=("auto", "bf16", "fp32"))
    attention_backend: str = _opt(
        "auto",
        "exact prefix-LM attention; auto: the first of varlen, te, grouped that runs here",
        FREE,
        choices=("auto", *ATTENTION_BACKENDS),
    )
    transformer_impl: str = _opt("local", "layer implementation", FREE, choices=("local", "transformer_engine"))
    fp8: str = _opt("none", "FP8 format of the linears; needs Transformer Engine", FREE, choices=("none", "hybrid"))
    fp8_recipe: str = _opt(
        "delayed", "FP8 scales from past steps or from the current tensor", FREE, choices=("delayed", "current")
    )
    fp8_primary_weights: bool = _opt(False, "hold the linears' weights only in FP8; the optimizer keeps float32", FREE)
    fp8_attention: bool = _opt(False, "attention of image queries in FP8; text stays in BF16", FREE)
    fp8_fallback: bool = _opt(False, "use BF16, with a warning, where this machine cannot run FP8", FREE)
    first_last_layers_bf16: bool = _opt(False, "with fp8: keep the first and last layers in BF16", FREE)
    num_layers_at_start_in_bf16: int = _opt(1, "with first_last_layers_bf16: number of first layers", FREE)
    num_layers_at_end_in_bf16: int = _opt(1, "with first_last_layers_bf16: number of last layers", FREE)
    fusion: str = _opt(
        "auto",
        "compile residual branches and rotary embedding; norms: with the following LayerNorms; auto: on a GPU",
        FREE,
        choices=("auto", "none", "compile", "norms"),
    )
    cuda_graph: bool = _opt(
        False, "replay micro-batches of the same shape from CUDA graphs, on one GPU per model", FREE
    )
    seed: int = _opt(1234, "seed of weights, DropPath and data order", DATA, min=0)
    check_memory: bool = _opt(True, "refuse a layout that needs more memory than a rank has, by estimate", FREE)
    exit_interval: int = _opt(0, "save and exit at the next multiple of this step; 0: never", FREE, min=0)
    exit_duration_in_mins: float = _opt(
        0.0, "save and exit with status 17 this many minutes after the launch; 0: never", FREE, min=0
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str = _opt("", "checkpoint folder of the run; it resumes from the newest one there; empty: no saves", START)
    load: str = _opt("", "a checkpoint, or a folder of checkpoints, to start from if save holds none", START)
    save_interval: int = _opt(1000, "steps between checkpoints", FREE, min=1)
    finetune: bool = _opt(False, "load only the weights; optimizer, schedule and data start over", START)
    async_save: bool = _opt(True, "write checkpoints in the background of training", FREE)
    fully_reshardable_every: int = _opt(
        10,
        "every Nth checkpoint, and the last, loads on any tp and pp, at the cost of a pause; 0: only the last",
        FREE,
        min=0,
    )
    keep_last: int = _opt(3, "newest checkpoints to keep; 0: all", FREE, min=0)
    keep_every: int = _opt(0, "also keep checkpoints of steps that are a multiple of this; 0: none", FREE, min=0)
    keep_best: int = _opt(
        1,
        "also keep this many checkpoints of lowest validation loss; a validation that is among them saves one",
        FREE,
        min=0,
    )
    verify: str = _opt("full", "check before loading: checksums (full) or sizes", START, choices=("full", "sizes"))
    change_drop_path: bool = _opt(False, "on resume: accept another drop_path_rate", START)


@dataclass(frozen=True)
class FaultsConfig:
    """Faults. Bad numbers, hangs, silent corruption and requests to stop."""

    on_spike: str = _opt(
        "warn",
        "on a spike of loss or gradient norm: warn, skip the update, or roll back to the last good checkpoint and "
        "skip the data since",
        FREE,
        choices=("warn", "skip", "rollback"),
    )
    spike_threshold: float = _opt(
        10.0, "a spike is this many robust standard deviations above the median", FREE, above=0
    )
    spike_window: int = _opt(
        128, "recent steps that a step is compared with; detection starts after half of them", FREE, min=1
    )
    max_bad_steps: int = _opt(
        5, "steps in a row without an update before the run rolls back (on_spike rollback) or stops", FREE, min=1
    )
    max_rollbacks: int = _opt(3, "rollbacks without a newer checkpoint before the run stops", FREE, min=0)
    rerun_bad_steps: bool = _opt(
        True, "compute a step of NaN or Inf again: a different result means a faulty device", FREE
    )
    step_timeout: float = _opt(
        20.0, "minutes without a step before the run prints stacks and ends; 0: never", FREE, min=0
    )
    check_replicas_interval: int = _opt(
        1000,
        "steps between comparisons of the data-parallel ranks' weights, also done before saves; 0: never",
        FREE,
        min=0,
    )
    stop_file: str = _opt("", "the run saves and exits when this file appears; empty: <save>/stop", FREE)
    inject_fault: tuple[str, ...] = _opt(
        (), "for drills: faults as kind@step:rank, such as kill@7:0; needs allow_fault_injection", FREE
    )
    allow_fault_injection: bool = _opt(False, "accept inject_fault", FREE)


@dataclass(frozen=True)
class LogConfig:
    """Logging and validation."""

    log_interval: int = _opt(10, "steps between progress lines", FREE, min=1)
    timing_log_level: int = _opt(0, "Megatron-Core's timers: 0 none, 1 parts of a step, 2 details", FREE, min=0, max=2)
    profile: bool = _opt(False, "write traces to <save>/profile, or else <tensorboard_dir>/profile", FREE)
    profile_steps: str = _opt("10:12", "first and last step to trace", FREE)
    profile_ranks: tuple[int, ...] = _opt((0,), "ranks to trace", FREE)
    eval_interval: int = _opt(1000, "steps between validations; 0: only at the end", FREE, min=0)
    eval_iters: int = _opt(0, "global batches of each validation set that one validation uses; 0: all", FREE, min=0)
    eval_only: bool = _opt(False, "validate the loaded checkpoint and exit", START)
    tensorboard_dir: str = _opt("", "TensorBoard folder; empty: <save>/tensorboard", FREE)
    wandb_project: str = _opt("", "also log to this Weights & Biases project", FREE)
    prometheus_file: str = _opt("", "also write the latest values here, for node_exporter's textfile collector", FREE)
    caption_samples: int = _opt(4, "captions written to TensorBoard at each validation", FREE, min=0)

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """(first, last) step of ``profile_steps``; both are traced.

        Raises:
            ValueError: not FIRST:LAST.

        >>> LogConfig(profile_steps="10:12").profiled_steps
        (10, 12)
        """
        match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        first, last = (int(number) for number in match.groups()) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"log.profile_steps = {self.profile_steps!r}: expected FIRST:LAST, steps counted from 1. Use for "
                "example --profile-steps 10:12."
            )
        return first, last


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def profile_folder(self) -> str:
        """The folder of traces, beside checkpoints or TensorBoard logs; empty without either."""
        beside = self.checkpoint.save or self.log.tensorboard_dir
        return f"{beside}/profile" if beside else ""

    @property
    def stop_file(self) -> str:
        """The file that stops the run when it appears; empty without ``faults.stop_file`` and ``checkpoint.save``."""
        return self.faults.stop_file or (f"{self.checkpoint.save}/stop" if self.checkpoint.save else "")

    def value(self, name: str) -> Any:
        """The value of a setting, given as "section.key"."""
        section, key = name.split(".")
        return getattr(getattr(self, section), key)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dictionaries and lists, as written to YAML."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in dataclasses.asdict(self).items()
        }

    def to_yaml(self) -> str:
        """The resolved settings as YAML; reading it gives an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}
SETTINGS: dict[str, dataclasses.Field[Any]] = {
    f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)
}
