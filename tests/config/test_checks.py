"""Every wrong setting, and every contradiction, is one error line that names the setting and says what to do."""

from __future__ import annotations

import shlex

import pytest

from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args

# A start needs a recipe or sizes; these are the defaults.
SIZES = [
    "--num-layers=27", "--hidden-size=1152", "--num-attention-heads=16", "--ffn-hidden-size=3072",
    "--text-hidden-size=1152",
]  # fmt: skip

SELECTIVE = "--recompute selective --recompute-modules"
FIRST, LAST = (f"--num-layers-in-{end}-pipeline-stage" for end in ("first", "last"))
STAGES = "parallel.num_layers_in_first_pipeline_stage = {}, parallel.num_layers_in_last_pipeline_stage = {}: they "
FP8 = "--transformer-impl transformer_engine --fp8 hybrid"
OVERLAP = f"{FP8} --tp-comm-overlap"
TRACE = "--save runs/x --profile"


@pytest.mark.parametrize(
    ("flags", "message"),  # … stands for any text
    [
        # Names and values
        ("--global-batch-sise 4", "unknown flag --global-batch-sise. Did you mean '--global-batch-size'?"),
        ("--train-iter 4", "unknown flag --train-iter. Did you mean '--train-iters'?"),
        ("--config so16_stage", "no such recipe. Did you mean 'so16_stage"),
        ("--config /nowhere/run.yaml", "--config /nowhere/run.yaml: no such file"),
        ("--lr fast", "train.lr = 'fast': expected a number"),
        ("--lr nan", "train.lr = 'nan': expected a finite number"),
        ("--train-iters 1.5", "train.train_iters = '1.5': expected a whole number"),
        ("--image-mode nativ", "expected one of fixed, native. Did you mean 'native'?"),
        ("--attention-backend flash", "expected one of auto, dense, grouped, varlen, flex, te"),
        ("--cp 32 --cp-comm-type ring", "parallel.cp_comm_type = 'ring': expected one of a2a, all_gather"),
        ("--recompute-modules mlp,core_atn", "parallel.recompute_modules = 'core_atn': expected one of core_attn, "),
        ("--recompute-modules core_atn", "Did you mean 'core_attn'?"),
        ("--offload-modules mlp", "parallel.offload_modules = 'mlp': expected one of attn_norm, qkv_linear, "),
        # Ranges
        ("--image-size 230", "data.image_size = 230: must be at least 16 and a multiple of 16"),
        ("--drop-path-rate 1", "model.drop_path_rate = 1.0: must be at least 0 and below 1"),
        ("--max-bad-share 1.5", "data.max_bad_share = 1.5: must be at least 0 and at most 1"),
        ("--mbs 0", "train.micro_batch_size = 0: must be at least 1"),
        ("--rope-theta 1", "model.rope_theta = 1.0: must be above 1"),
        ("--timing-log-level 3", "log.timing_log_level = 3: must be at least 0 and at most 2"),
        ("--rope-sections 1,2", "model.rope_sections = 1,2: must be a list of length 3"),
        (f"{LAST} -1", "last_pipeline_stage = -1: must be at least 0"),
        # Model, schedule and data
        ("--num-attention-heads 5", "model.num_attention_heads = 5: must divide model.hidden_size = 1152. Use one"),
        ("--num-attention-heads 128", "a head has 9 channels, and the rotary embedding needs an even number"),
        (
            "--train-iters 10 --lr-warmup-iters 1802",
            "train.lr_warmup_iters = 1802: must be below train.train_iters = 10. Lower ",
        ),
        ("--min-lr 1", "train.min_lr = 1.0: is above train.lr = 0.001. Lower --min-lr or raise --lr"),
        ("--max-pixels 256", "data.max_pixels = 256: is below data.min_pixels = 4096. Raise --max-pixels"),
        (
            "--train-data a.tar --train-weights 1 --train-epochs 1",
            "data.train_weights = 1, data.train_epochs = 1: only one of them can set the mixture. Leave one out",
        ),
        ("--train-data a.tar --train-weights 1:2", "data.train_weights = '1:2': expected 1 numbers"),
        ("--train-data a.tar --train-weights 1,2", "data.train_weights = '1,2': '2' has a wrong step"),
        ("--train-data a.tar --train-epochs -1", "data.train_epochs = '-1': expected 1 numbers"),
        # Layout
        ("--tp 3", "tensor_model_parallel_size = 3: must divide model.num_attention_heads = 16. Use --tp "),
        ("--tp 16 --ffn-hidden-size 3080", "size = 16: must divide model.ffn_hidden_size = 3080. Use --tp "),
        (
            "--positions chunked --rope-sections 12,12,11",
            "model.positions = chunked: the sum of model.rope_sections = [12, 12, 11] must be half a head, 36",
        ),
        ("--pp 28", "28 stages or chunks are more than model.num_layers = 27. With --vpp 1 use --pp 1 to 27"),
        (
            "--tp 2 --seq-length 1001",
            "data.seq_length = 1001, train.micro_batch_size = 1: their product 1001 is not a multiple of "
            "tensor_model_parallel_size * context_parallel_size = 2. The nearest multiple is 1000",
        ),
        ("--cp 3", "parallel.context_parallel_size = 3: with a2a it must divide the 16 attention heads"),
        ("--tp 8 --cp 4", "(16 / 8). Use --cp with one of 1, 2, or --cp-comm-type all_gather, which takes any number"),
        ("--vpp 2", "interleaving needs more than one pipeline stage. Use --vpp 1, or --pp 2 or more"),
        ("--pp 14 --vpp 2", "28 stages or chunks are more than model.num_layers = 27. With --vpp 2 use --pp 1 to 13"),
        (f"--pp 3 {FIRST} 26", STAGES.format(26, 0) + "leave 1 of 27 layers for the other 2 stages"),
        (f"{LAST} 2", STAGES.format(0, 2) + "need more than one pipeline stage"),
        ("--fsdp --pp 2", "parallel.fsdp = true, parallel.pipeline_model_parallel_size = 2: every micro-batch"),
        ("--fsdp --overlap-grad-reduce", "fsdp = true, parallel.overlap_grad_reduce = true: FSDP always overlaps"),
        # Recomputation, offloading, fusion
        (f"{SELECTIVE} layernorm --fusion norms", "layernorm cannot be recomputed. Use --fusion auto, compile or none"),
        (
            f"{SELECTIVE} output_gate --no-attention-output-gate",
            "the model has no output gate (model.attention_output_gate = none). Leave output_gate out",
        ),
        (
            f"{SELECTIVE} mlp,layernorm,mlp",
            "parallel.recompute_modules = mlp,layernorm,mlp: a module is named twice. Name it once",
        ),
        (f"{SELECTIVE} mlp,mlp_act", "mlp recomputes mlp_act as well. Leave mlp_act out"),
        (
            f"{SELECTIVE} layernorm --offload-modules core_attn,mlp_norm",
            "parallel.offload_modules = core_attn,mlp_norm: layernorm cannot be recomputed while mlp_norm is offloaded",
        ),
        (
            f"{SELECTIVE} output_gate --offload-modules core_attn,attn_proj",
            "output_gate cannot be recomputed while attn_proj is offloaded. Leave one of them out",
        ),
        ("--fusion norms --transformer-impl transformer_engine", "linears contain the LayerNorms already"),
        (f"{SELECTIVE}=", "parallel.recompute_modules names no module"),
        ("--recompute-num-layers 28", "parallel.recompute_num_layers = 28: is above model.num_layers = 27"),
        ("--offload-modules attn_proj", "output of core_attn, which must be offloaded too. Add core_attn"),
        # CUDA graphs
        ("--cuda-graph --tp 2", "train.cuda_graph = true, parallel.tensor_model_parallel_size = 2: … Use --tp 1"),
        ("--cuda-graph --pp 2", "train.cuda_graph = true, parallel.pipeline_model_parallel_size = 2: … Use --pp 1"),
        ("--cuda-graph --cp 2", "train.cuda_graph = true, parallel.context_parallel_size = 2: … Use --cp 1"),
        ("--cuda-graph --fsdp", "train.cuda_graph = true, parallel.fsdp = true: … Use --no-fsdp"),
        ("--cuda-graph --overlap-grad-reduce", "parallel.overlap_grad_reduce = true: … Use --no-overlap-grad-reduce"),
        ("--cuda-graph --overlap-param-gather", "overlap_param_gather = true: … Use --no-overlap-param-gather"),
        ("--cuda-graph --recompute full", "parallel.recompute = full: … Use --recompute none"),
        ("--cuda-graph --attention-backend flex", "attention_backend = flex: … Use --attention-backend auto, varlen"),
        # FP8 and Transformer Engine
        ("--fp8 hybrid", "train.fp8 = hybrid, train.transformer_impl = local: FP8 needs Transformer Engine. Use"),
        ("--fp8-attention", "train.fp8_attention = true: it needs FP8 linears. Add --fp8 hybrid"),
        ("--fp8-primary-weights", "train.fp8_primary_weights = true: it needs FP8 linears. Add --fp8 hybrid"),
        (f"{FP8} --precision fp32", "train.fp8 = hybrid, train.precision = fp32: FP8 needs bf16"),
        (f"{FP8} --fsdp", "train.fp8 = hybrid, parallel.fsdp = true: FSDP's float32 shards"),
        (
            f"{FP8} --fp8-attention --attention-backend flex",
            "train.attention_backend = flex: only Transformer Engine has FP8 attention. Use --attention-backend auto",
        ),
        (
            f"{FP8} --first-last-layers-bf16",
            "train.fp8_recipe = delayed: delayed scaling needs all layers in FP8. Use --fp8-recipe current",
        ),
        (
            f"{FP8} --fp8-recipe current --first-last-layers-bf16 --num-layers-at-end-in-bf16 28",
            "num_layers_at_end_in_bf16 = 28: must be from 0 to … = 27",
        ),
        (
            f"{FP8} {SELECTIVE} layernorm",
            "cannot recompute layernorm. Use --recompute-modules core_attn,mlp or --fp8-recipe current",
        ),
        (
            f"{FP8} --fp8-attention {SELECTIVE} mlp_act",
            "cannot recompute mlp_act. Use --recompute-modules mlp or --fp8-recipe current",
        ),
        (
            f"{FP8} --fp8-attention --recompute selective",
            "parallel.recompute_modules = core_attn: core_attn would be recomputed outside FP8",
        ),
        (
            f"{FP8} --seq-length 1000",
            "data.seq_length = 1000, … multiple of 16 on each rank, and 1000 / 1 = 1000. The nearest … size is 992",
        ),
        (f"{FP8} --tp 2 --seq-length 1008", "and 1008 / 2 = 504. The nearest allowed size is 1024"),
        (
            f"{FP8} --tp 2 --ffn-hidden-size 3088",
            "ffn_hidden_size = 3088: … 3088 / 2 = 1544. The nearest allowed size is 3072",
        ),
        (
            "--tp-comm-overlap",
            "train.transformer_impl = local, …overlap needs Transformer Engine, … Use --transformer-impl … --tp 2",
        ),
        (OVERLAP, "tensor_model_parallel_size = 1, parallel.sequence_parallel = true: overlap needs"),
        (
            f"{OVERLAP} --tp 2 --valid-data a.tar",
            "log.caption_samples = 4: the overlap buffers … Add --caption-samples 0",
        ),
        # Checkpoints, validation and traces
        ("--finetune", "checkpoint.finetune = true: there is no checkpoint to take weights from. Name one with --load"),
        (
            "--finetune --load x --save x",
            "checkpoint.load = x, checkpoint.save = x: --finetune starts a new run, which needs its own folder",
        ),
        ("--eval-only", "log.eval_only = true: there is no checkpoint to validate. Name one with --load"),
        ("--eval-only --load x", "log.eval_only = true: there is no validation data. Name it with --valid-data"),
        ("--save s3://b/run", "checkpoint.save = s3://b/run: is a URL"),
        ("--load http://h/run", "checkpoint.load = http://h/run: is a URL"),
        ("--tensorboard-dir gs://b/log", "log.tensorboard_dir = gs://b/log: is a URL"),
        ("--stop-file s3://b/stop", "faults.stop_file = s3://b/stop: is a URL"),
        ("--cache-dir s3://b/cache", "data.cache_dir = s3://b/cache: is a URL"),
        ("--on-spike rollback", "faults.on_spike = rollback: there are no checkpoints to roll back to. Add --save"),
        (f"{TRACE} --profile-steps 12", "error: log.profile_steps = '12': expected FIRST:LAST"),
        (f"{TRACE} --profile-steps 0:3", "error: log.profile_steps = '0:3': expected FIRST:LAST"),
        (f"{TRACE} --profile-steps 9:5", "error: log.profile_steps = '9:5': expected FIRST:LAST"),
        (f"{TRACE} --profile-steps 5:257493", "log.profile_steps = 5:257493: the run has only 257492 steps"),
        (f"{TRACE} --profile-ranks=", "error: log.profile_ranks = none: expected ranks"),
        ("--profile", "log.profile = true: neither checkpoint.save nor log.tensorboard_dir names a folder"),
        (f"{TRACE} --eval-only --load x --valid-data v.tar", "error: log.profile = true, log.eval_only = true"),
    ],
)
def test_a_wrong_setting_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args([*SIZES, *shlex.split(flags)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and all(part in line for part in message.split("…")), line


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (12, "--tp 2 --pp 4", r"size = 12: not a multiple of tp \* pp \* cp = 8. Start 8 or 16 processes"),
        (24, "--tp 2 --pp 4 --mbs 2", r"not a multiple of .* data parallel size = 2 \* 3. The nearest multiple is 510"),
        # Interleaving needs a multiple of the stages in micro-batches.
        (8, "--pp 4 --vpp 3 --gbs 4", "size = 4: gives a pipeline 2 micro-batches; .* = 4. The nearest .* size is 8"),
        (8, f"{TRACE} --profile-ranks 0,8", "log.profile_ranks = 0,8: there is no such rank. Use ranks 0 to 7 of 8"),
    ],
)
def test_layouts_must_fit_the_number_of_processes(world_size: int, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(parse_args([*SIZES, *flags.split()])[0], world_size)


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (8, "--tp 2 --pp 4"),
        (64, "--config so16_stage1 --tp 2 --pp 4"),
        (4, "--pp 4 --vpp 3 --gbs 4"),
        (8, TRACE),
        (1, "--cuda-graph"),
        (2, f"{OVERLAP} --tp 2"),
        (2, f"{OVERLAP} --tp 2 --valid-data a.tar --caption-samples 0"),
        (1, f"{FP8} --fp8-attention"),
        (1, f"{FP8} --fp8-attention --recompute full"),
        (1, f"{FP8} --fp8-attention {SELECTIVE} mlp"),
        (1, f"{FP8} --recompute selective"),
        (1, f"{FP8} --fp8-recipe current --first-last-layers-bf16"),
        (1, f"{FP8} --fp8-recipe current {SELECTIVE} layernorm,mlp_act,output_gate"),
        (1, f"{SELECTIVE} mlp_act --offload-modules attn_norm"),
        # Without sequence parallelism each rank has all tokens.
        (2, f"{FP8} --tp 2 --no-sequence-parallel --seq-length 1008"),
    ],
)
def test_settings_that_fit_are_accepted(world_size: int, flags: str) -> None:
    check(parse_args([*SIZES, *flags.split()])[0], world_size)
