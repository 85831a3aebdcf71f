"""Names of settings in Megatron-LM, torchtitan, OpenCLIP, Hugging Face's Trainer, LLaVA and nanochat.

Only for error messages; no foreign name is accepted. Names are written with dashes and without the leading ones.
"""

from __future__ import annotations

# A setting or YAML section -> its names elsewhere, with the same unit.
_EQUAL = {
    # Data
    "train_data": "data-path train-data-path training-data data train-shards dataset-path training.dataset-path "
    "training.dataset image-folder",
    "valid_data": "valid-data-path val-data eval-data validation-data test-data validation.dataset-path",
    "train_weights": "train-data-upsampling-factors data-weights mixture-weights",
    "tokenizer": "tokenizer-model tokenizer-path tokenizer-name tokenizer-name-or-path vocab-file "
    "model.tokenizer-path model.hf-assets-path",
    "image_size": "img-size img-h img-w force-image-size image-resolution resolution input-size crop-size",
    "fixed_resize": "image-resize-mode image-aspect-ratio",
    "max_pixels": "image-max-pixels",
    "min_pixels": "image-min-pixels",
    "seq_length": "sequence-length seq-len max-seq-len max-seq-length max-sequence-length model-max-length "
    "max-position-embeddings context-length training.seq-len block-size",
    "num_workers": "workers dataloader-num-workers data-workers num-data-workers training.num-workers",
    "prefetch": "dataloader-prefetch-factor prefetch-factor",
    "cache_dir": "data-cache-path",
    # Training
    "lr": "learning-rate lr-rate base-lr max-lr peak-lr optimizer.lr optimizer.learning-rate",
    "min_lr": "lr-min lr-end eta-min min-learning-rate lr-cooldown-end",
    "lr_warmup_iters": "warmup warmup-steps warmup-iters num-warmup-steps lr-warmup-steps lr-scheduler.warmup-steps",
    "train_iters": "max-steps steps num-steps total-steps train-steps num-train-steps max-iters num-iterations "
    "iterations iters max-train-steps training.steps",
    "weight_decay": "wd optimizer.weight-decay",
    "adam_beta1": "beta1 optimizer.beta1",
    "adam_beta2": "beta2 optimizer.beta2",
    "adam_eps": "eps adam-epsilon epsilon optimizer.eps",
    "clip_grad": "grad-clip-norm max-grad-norm grad-clip gradient-clipping gradient-clip-val clip-grad-norm max-norm "
    "training.max-norm",
    "precision": "dtype mixed-precision training.mixed-precision-param",
    "attention_backend": "attn-implementation attn-impl attention-impl",
    "seed": "random-seed data-seed training.seed debug.seed",
    "fp8": "fp8-format",
    "cuda_graph": "enable-cuda-graph cuda-graph-impl external-cuda-graph",
    # Parallelism
    "tensor_model_parallel_size": "tensor-parallel-size tensor-parallel tp-size "
    "parallelism.tensor-parallel-degree tensor-parallel-degree model-parallel-size",
    "pipeline_model_parallel_size": "pipeline-parallel-size pipeline-parallel pp-size "
    "parallelism.pipeline-parallel-degree pipeline-parallel-degree",
    "virtual_pipeline_model_parallel_size": "num-virtual-stages-per-pipeline-rank virtual-pipeline-size",
    "context_parallel_size": "cp-size parallelism.context-parallel-degree context-parallel-degree",
    "num_layers_in_first_pipeline_stage": "decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "decoder-last-pipeline-num-layers",
    "fsdp": "use-megatron-fsdp use-torch-fsdp2 use-custom-fsdp",
    # Model
    "num_layers": "n-layers n-layer depth num-hidden-layers encoder-num-layers",
    "hidden_size": "d-model n-embd embed-dim dim model-dim width",
    "num_attention_heads": "n-heads n-head num-heads",
    "ffn_hidden_size": "intermediate-size mlp-dim ffn-dim",
    "rope_theta": "rotary-base rope-base",
    "layernorm_epsilon": "norm-epsilon layer-norm-eps rms-norm-eps norm-eps",
    "drop_path_rate": "drop-path stochastic-depth",
    "layer_scale_init": "ls-init-value layerscale layer-scale",
    "init_method_std": "initializer-range init-std",
    # Checkpoints
    "save": "output-dir out-dir save-dir checkpoint-dir ckpt-dir save-path checkpoint-path default-root-dir "
    "job.dump-folder checkpoint.folder checkpoint.save-folder logs",
    "load": "resume resume-from-checkpoint resume-from load-dir checkpoint.initial-load-path pretrained "
    "pretrained-checkpoint init-from load-checkpoint",
    "save_interval": "save-steps save-every save-frequency checkpoint-interval checkpoint.interval save-freq "
    "checkpointing-steps",
    "keep_last": "save-total-limit checkpoint.keep-latest-k keep-latest-k checkpoints-total-limit",
    "finetune": "no-load-optim save-only-model checkpoint.initial-load-model-only load-weights-only",
    "async_save": "checkpoint.async-mode use-persistent-ckpt-worker",
    # Logs and validation
    "log_interval": "log-every-n-steps logging-steps log-every log-freq print-freq metrics.log-freq",
    "eval_interval": "eval-steps val-frequency eval-every val-check-interval eval-freq validation.freq",
    "eval_iters": "max-eval-steps val-steps limit-val-batches validation.steps",
    "tensorboard_dir": "logging-dir log-dir tensorboard-path metrics.save-tb-folder",
    "wandb_project": "wandb-project-name wandb project",
    "profile": "use-pytorch-profiler profiling.enable-profiling enable-profiling",
    # Sections of a YAML file
    "train": "training trainer hyperparameters",
    "parallel": "parallelism distributed",
    "log": "logging metrics profiling validation",
    "checkpoint": "checkpointing checkpoints",
}

# What to do instead, then the foreign names. Megatron-LM's switches for what is always on are among them.
_INSTEAD = """
batch sizes count packs of seq_length tokens: use --micro-batch-size packs per rank and pass, --global-batch-size \
packs per step
    batch-size per-device-train-batch-size per-device-eval-batch-size per-device-batch-size batch-size-per-gpu
    per-gpu-train-batch-size local-batch-size training.local-batch-size device-batch-size total-batch-size
    train-batch-size bs bsz training.global-batch-size parallelism.pipeline-parallel-microbatch-size
a run has --train-iters steps of --global-batch-size packs; tools/prepare_data.py prints the packs of an epoch
    epochs num-train-epochs num-epochs n-epochs nepochs max-epochs train-samples train-num-samples val-num-samples
    iter-per-epoch total-samples train-tokens max-tokens
it follows from --global-batch-size / (--micro-batch-size * data parallel size)
    gradient-accumulation-steps accum-freq grad-accum-steps accumulate-grad-batches grad-accumulation-steps
    grad-accum accum-steps accumulation-steps gas
    num-microbatches
give the warmup in steps: --lr-warmup-iters
    lr-warmup-fraction lr-warmup-samples lr-warmup-init warmup-ratio warmup-fraction warmup-epochs
use --precision bf16 or fp32; there is no fp16 training
    bf16 fp16 fp32 amp half bf16-full-eval fp16-full-eval tf32 loss-scale initial-loss-scale
    accumulate-allreduce-grads-in-fp32 grad-reduce-in-bf16 training.mixed-precision-reduce
use --recompute selective or full, with --recompute-modules or --recompute-num-layers
    gradient-checkpointing grad-checkpointing activation-checkpointing recompute-granularity recompute-method
    recompute-activations checkpoint-activations activation-checkpoint.mode activation-checkpoint.selective-ac-option
use --attention-backend; auto takes a fused kernel if one runs here
    use-flash-attn flash-attention use-flash-attention flash-attn use-xformers
torchrun sets it: use --nnodes and --nproc-per-node before pretrain_genlip.py
    world-size nproc-per-node nnodes node-rank rank local-rank master-addr master-port num-gpus gpus devices num-nodes
    data-parallel-size dp distributed-backend dist-url
data parallel size is world size / (tp * pp * cp); --fsdp also shards weights and gradients
    parallelism.data-parallel-replicate-degree parallelism.data-parallel-shard-degree data-parallel-shard-degree
    data-parallel-replicate-degree data-parallel-sharding-strategy
this is fixed here; leave it out
    use-distributed-optimizer use-mcore-models swiglu use-rotary-position-embeddings no-position-embedding
    untie-embeddings-and-output-weights disable-bias-linear use-dist-ckpt normalization position-embedding-type
    attention-softmax-in-fp32 dataloader-type ckpt-format auto-detect-ckpt-format group-query-attention
    add-bias-linear do-train ddp-backend data-impl split checkpoint.enable checkpoint.enable-checkpoint
    dataset-resampled remove-unused-columns lazy-preprocess bidirectional-attention
the schedule is linear warmup (--lr-warmup-iters), then cosine to --min-lr at --train-iters
    lr-decay lr-decay-style lr-decay-iters lr-decay-samples lr-decay-steps lr-scheduler lr-scheduler-type lr-schedule
    lr-wsd-decay-style lr-wsd-decay-iters lr-scheduler.decay-ratio lr-scheduler.decay-type lr-scheduler.min-lr-factor
    lr-scheduler.lr-min warmdown-ratio final-lr-frac skip-scheduler
the optimizer is always AdamW, distributed over the data-parallel ranks; leave it out
    optimizer optim opt opt-kwargs optimizer.name optimizer.implementation momentum use-zero zero-stage deepspeed
a model is a recipe or a YAML file: use --config, as --config so16_stage1
    model model-name model-type arch model-name-or-path vision-tower model.name model.flavor job.config-file yaml-cfg
    config-file model-config
the folder of a run identifies it: use --save
    name run-name exp-name experiment-name wandb-exp-name wandb-run-name wandb-name job.description
TensorBoard logs are always written; --wandb-project NAME also logs to Weights & Biases
    report-to tensorboard metrics.enable-tensorboard metrics.enable-wandb enable-wandb use-wandb logger log-with
--train-data takes .tar shards and manifests; tools/make_shards.py packs tables and folders
    dataset-type dataset dataset-name data-format csv-img-key csv-caption-key csv-separator image-key text-key
    json-text-key train-data-file
the file of --tokenizer decides: tokenizer.json or SentencePiece .model
    tokenizer-type
patches are always 16 x 16 pixels; leave it out
    patch-size patch-dim
use --vocab-size, a multiple of the tensor parallel size
    padded-vocab-size make-vocab-size-divisible-by
use --vpp, the number of model chunks per stage
    num-layers-per-virtual-pipeline-stage
models have no experts; leave it out
    expert-model-parallel-size num-experts parallelism.expert-parallel-degree ep
every head has its own keys and values of hidden_size / num_attention_heads channels; leave it out
    num-query-groups n-kv-heads num-key-value-heads kv-channels head-dim
the only dropout is DropPath: --drop-path-rate
    hidden-dropout attention-dropout dropout
use --fusion compile
    compile torch-compile torchcompile training.compile compile.enable
only --freeze-embeddings and --freeze-head freeze weights
    lock-image freeze-vision freeze-backbone freeze-lm freeze-llm tune-mm-mlp-adapter
checkpoints always hold the whole run; load only the weights with --load DIR --finetune
    no-save-optim no-save-rng no-load-rng checkpoint.last-save-model-only
a run resumes from the checkpoints in --save; name a new folder to start over
    overwrite-output-dir
use --eval-interval and --eval-iters, or --eval-only
    do-eval eval-strategy evaluation-strategy
use --save-interval, --keep-last, --keep-every and --keep-best
    save-strategy save-most-recent
"""


def _by_name(table: str) -> dict[str, str]:
    """Answer by name. An answer begins its line; the names below it are indented."""
    answers: dict[str, str] = {}
    answer = ""
    for line in table.strip().splitlines():
        if line.startswith(" "):
            answers |= dict.fromkeys(line.split(), answer)
        else:
            answer = line
    return answers


EQUAL = {name: setting for setting, names in _EQUAL.items() for name in names.split()}
INSTEAD = _by_name(_INSTEAD)
