"""Every wrong setting, and every contradiction, is one error line that names the setting and says what to do."""

from __future__ import annotations

import pytest

from genlip_megatron.config import RunConfig, from_dict, load_yaml, override
from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args

LAYERNORM = ["--recompute", "selective", "--recompute-modules", "layernorm"]
STAGE_ENDS = "parallel.num_layers_in_first_pipeline_stage = {}, parallel.num_layers_in_last_pipeline_stage = {}: they "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # Names and values
        (["--global-batch-sise", "4"], "unknown flag --global-batch-sise. Did you mean '--global-batch-size'?"),
        (["--train-iter", "4"], "unknown flag --train-iter. Did you mean '--train-iters'?"),
        (["--config", "so16_stage"], "no such recipe. Did you mean 'so16_stage"),
        (["--config", "/nowhere/run.yaml"], "--config /nowhere/run.yaml: no such file"),
        (["--lr", "fast"], "train.lr = 'fast': expected a number"),
        (["--lr", "nan"], "train.lr = 'nan': expected a finite number"),
        (["--train-iters", "1.5"], "train.train_iters = '1.5': expected a whole number"),
        (["--image-mode", "nativ"], "expected one of fixed, native. Did you mean 'native'?"),
        (["--attention-backend", "flash"], "expected one of auto, dense, grouped, varlen, flex, te"),
        (["--cp", "32", "--cp-comm-type", "ring"], "parallel.cp_comm_type = 'ring': expected one of a2a, all_gather"),
        (
            ["--recompute-modules", "mlp,core_atn"],
            "parallel.recompute_modules = 'core_atn': expected one of core_attn, ",
        ),
        (["--recompute-modules", "core_atn"], "Did you mean 'core_attn'?"),
        (["--offload-modules", "mlp"], "parallel.offload_modules = 'mlp': expected one of attn_norm, qkv_linear, "),
        # Ranges
        (["--image-size", "230"], "data.image_size = 230: must be at least 16 and a multiple of 16"),
        (["--drop-path-rate", "1"], "model.drop_path_rate = 1.0: must be at least 0 and below 1"),
        (["--max-bad-share", "1.5"], "data.max_bad_share = 1.5: must be at least 0 and at most 1"),
        (["--mbs", "0"], "train.micro_batch_size = 0: must be at least 1"),
        (["--rope-theta", "1"], "model.rope_theta = 1.0: must be above 1"),
        (["--timing-log-level", "3"], "log.timing_log_level = 3: must be at least 0 and at most 2"),
        (["--rope-sections", "1,2"], "model.rope_sections = 1,2: must be a list of length 3"),
        (["--num-layers-in-last-pipeline-stage", "-1"], "last_pipeline_stage = -1: must be at least 0"),
        # Model, schedule and data
        (
            ["--num-attention-heads", "5"],
            "model.num_attention_heads = 5: must divide model.hidden_size = 1152. Use one",
        ),
        (["--num-attention-heads", "128"], "a head has 9 channels, and the rotary embedding needs an even number"),
        (["--train-iters", "10"], "train.lr_warmup_iters = 1802: must be below train.train_iters = 10. Lower "),
        (["--min-lr", "1"], "train.min_lr = 1.0: is above train.lr = 0.001. Lower --min-lr or raise --lr"),
        (["--max-pixels", "256"], "data.max_pixels = 256: is below data.min_pixels = 4096. Raise --max-pixels"),
        (
            ["--train-data", "a.tar", "--train-weights", "1", "--train-epochs", "1"],
            "data.train_weights = 1, data.train_epochs = 1: only one of them can set the mixture. Leave one out",
        ),
        (["--train-data", "a.tar", "--train-weights", "1:2"], "data.train_weights = '1:2': expected 1 numbers"),
        (["--train-data", "a.tar", "--train-weights", "1,2"], "data.train_weights = '1,2': '2' has a wrong step"),
        (["--train-data", "a.tar", "--train-epochs", "-1"], "data.train_epochs = '-1': expected 1 numbers"),
        # Layout
        (
            ["--tp", "3"],
            "parallel.tensor_model_parallel_size = 3: must divide model.num_attention_heads = 16. Use --tp ",
        ),
        (["--tp", "16", "--ffn-hidden-size", "3080"], "size = 16: must divide model.ffn_hidden_size = 3080. Use --tp "),
        (["--pp", "28"], "28 stages or chunks are more than model.num_layers = 27. With --vpp 1 use --pp 1 to 27"),
        (
            ["--tp", "2", "--seq-length", "1001"],
            "data.seq_length = 1001, train.micro_batch_size = 1: their product 1001 is not a multiple of "
            "tensor_model_parallel_size * context_parallel_size = 2. The nearest multiple is 1000",
        ),
        (["--cp", "3"], "parallel.context_parallel_size = 3: with a2a it must divide the 16 attention heads"),
        (
            ["--tp", "8", "--cp", "4"],
            "(16 / 8). Use --cp with one of 1, 2, or --cp-comm-type all_gather, which takes any number",
        ),
        (["--vpp", "2"], "interleaving needs more than one pipeline stage. Use --vpp 1, or --pp 2 or more"),
        (
            ["--pp", "14", "--vpp", "2"],
            "28 stages or chunks are more than model.num_layers = 27. With --vpp 2 use --pp 1 to 13",
        ),
        (
            ["--pp", "3", "--num-layers-in-first-pipeline-stage", "26"],
            STAGE_ENDS.format(26, 0) + "leave 1 of 27 layers for the other 2 stages",
        ),
        (["--num-layers-in-last-pipeline-stage", "2"], STAGE_ENDS.format(0, 2) + "need more than one pipeline stage"),
        # Recomputation, offloading, fusion
        ([*LAYERNORM, "--fusion", "norms"], "where layernorm cannot be recomputed. Use --fusion auto, compile or none"),
        (
            ["--recompute", "selective", "--recompute-modules", "output_gate", "--no-attention-output-gate"],
            "the model has no output gate (model.attention_output_gate = false). Leave output_gate out",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "mlp,layernorm,mlp"],
            "parallel.recompute_modules = mlp,layernorm,mlp: a module is named twice. Name it once",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "mlp,mlp_act"],
            "mlp recomputes mlp_act as well. Leave mlp_act out",
        ),
        (
            [*LAYERNORM, "--offload-modules", "core_attn,mlp_norm"],
            "parallel.offload_modules = core_attn,mlp_norm: layernorm cannot be recomputed while mlp_norm is offloaded",
        ),
        (
            [
                "--recompute",
                "selective",
                "--recompute-modules",
                "output_gate",
                "--offload-modules",
                "core_attn,attn_proj",
            ],
            "output_gate cannot be recomputed while attn_proj is offloaded. Leave one of them out",
        ),
        (["--fusion", "norms", "--transformer-impl", "transformer_engine"], "linears contain the LayerNorms already"),
        (["--recompute", "selective", "--recompute-modules", ""], "parallel.recompute_modules names no module"),
        (["--recompute-num-layers", "28"], "parallel.recompute_num_layers = 28: is above model.num_layers = 27"),
        (["--offload-modules", "attn_proj"], "output of core_attn, which must be offloaded too. Add core_attn"),
        # Checkpoints and validation
        (
            ["--finetune"],
            "checkpoint.finetune = true: there is no checkpoint to take weights from. Name one with --load",
        ),
        (
            ["--finetune", "--load", "x", "--save", "x"],
            "checkpoint.load = x, checkpoint.save = x: --finetune starts a new run, which needs its own folder",
        ),
        (["--eval-only"], "log.eval_only = true: there is no checkpoint to validate. Name one with --load"),
        (
            ["--eval-only", "--load", "x"],
            "log.eval_only = true: there is no validation data. Name it with --valid-data",
        ),
        (["--save", "s3://b/run"], "checkpoint.save = s3://b/run: is a URL"),
        (["--load", "http://h/run"], "checkpoint.load = http://h/run: is a URL"),
        (["--tensorboard-dir", "gs://b/log"], "log.tensorboard_dir = gs://b/log: is a URL"),
        (["--stop-file", "s3://b/stop"], "faults.stop_file = s3://b/stop: is a URL"),
        (["--cache-dir", "s3://b/cache"], "data.cache_dir = s3://b/cache: is a URL"),
        (
            ["--on-spike", "rollback"],
            "faults.on_spike = rollback: there are no checkpoints to roll back to. Add --save",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_layouts_must_fit_the_number_of_processes() -> None:
    layout = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 4}
    so16 = override(from_dict(load_yaml("so16_stage1"), "so16_stage1"), layout)
    check(so16, world_size=8)
    check(so16, world_size=64)
    with pytest.raises(ValueError, match=r"size = 12: not a multiple of tp \* pp \* cp = 8. Start 8 or 16 processes"):
        check(so16, world_size=12)
    message = r"size = 512: not a multiple of .* data parallel size = 2 \* 3. The nearest multiple is 510"
    with pytest.raises(ValueError, match=message):
        check(so16, world_size=24)


def test_interleaving_needs_a_multiple_of_the_stages_in_micro_batches() -> None:
    interleaved = override(
        RunConfig(),
        {
            "parallel.pipeline_model_parallel_size": 4,
            "parallel.virtual_pipeline_model_parallel_size": 3,
            "train.global_batch_size": 4,
        },
    )
    check(interleaved, world_size=4)
    message = r"size = 4: gives a pipeline 2 micro-batches; .* = 4. The nearest allowed size is 8"
    with pytest.raises(ValueError, match=message):
        check(interleaved, world_size=8)
