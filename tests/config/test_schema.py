"""Configuration is strict: every setting has one place, one name and one error that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from genlip_megatron.config import RunConfig, from_dict, load_yaml, override, recipe_names
from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args
from genlip_megatron.testing import CHECKOUT

ENTRY = str(CHECKOUT / "pretrain_genlip.py")

# Paper Tables 1 and 2; the released weights' sizes where they differ.
SIZES = {
    "l16": (24, 1024, 16, 2816, 1024, (8, 12, 12), 0.1),
    "so16": (27, 1152, 16, 3072, 1152, (12, 12, 12), 0.1),
    "g16": (40, 1536, 24, 4096, 1536, (8, 12, 12), 0.2),
    "l16_release": (24, 1152, 16, 2752, 1024, (8, 12, 12), 0.1),
    "so16_release": (27, 1152, 16, 3072, 1024, (12, 12, 12), 0.1),
    "g16_release": (40, 1536, 16, 4096, 1024, (16, 16, 16), 0.2),
}


def recipe(name: str) -> RunConfig:
    return from_dict(load_yaml(name), name)


def error_of(*flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command line that must be refused with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        parse_args(flags)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [1, 2])
def test_recipes_are_the_papers_tables(size: str, stage: int) -> None:
    config = recipe(f"{size}_stage{stage}")
    check(config)
    model, train = config.model, config.train
    assert SIZES[size] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.ffn_hidden_size,
        model.text_hidden_size,
        model.rope_sections,
        model.drop_path_rate,
    )
    large = size.startswith("g16")
    if stage == 1:
        expected = (768, 171_661, 3_433) if large else (512, 257_492, 1_802)
        assert (config.data.image_mode, config.data.image_size, train.lr) == ("fixed", 224, 1e-3)
    else:
        expected = (256, 10_586, 212 if large else 74)
        assert (config.data.image_mode, train.lr) == ("native", 1e-4)
    assert (train.global_batch_size, train.train_iters, train.lr_warmup_iters) == expected
    assert (train.min_lr, train.weight_decay, train.clip_grad) == (1e-6, 0.01, 1.0)
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.9, 0.95, 1e-8)
    assert (config.data.seq_length, model.vocab_size) == (16384, 151936)


def test_every_recipe_is_named_and_checked() -> None:
    assert set(recipe_names()) == {"demo", *(f"{size}_stage{stage}" for size in SIZES for stage in (1, 2))}
    check(recipe("demo"), world_size=4)


def test_flags_beat_yaml_and_yaml_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 0.5, seed: 7}\n")
    config, _ = parse_args(["--config", str(file), "--seed", "9"])
    assert (config.train.lr, config.train.seed, config.train.clip_grad) == (0.5, 9, RunConfig().train.clip_grad)


def test_yaml_round_trip() -> None:
    for name in recipe_names():
        config = recipe(name)
        assert from_dict(yaml.safe_load(config.to_yaml()), "again") == config


def test_aliases_are_the_canonical_flags() -> None:
    short = ["--tp", "2", "--pp", "3", "--mbs", "2", "--gbs", "64"]
    long = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"]
    long += ["--micro-batch-size", "2", "--global-batch-size", "64"]
    assert parse_args(short) == parse_args(long)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global-batch-sise", "4"], "unknown flag --global-batch-sise. Did you mean '--global-batch-size'?"),
        (["--train-iter", "4"], "unknown flag --train-iter. Did you mean '--train-iters'?"),
        (["--config", "so16_stage"], "no such recipe. Did you mean 'so16_stage"),
        (["--config", "/nowhere/run.yaml"], "/nowhere/run.yaml"),
        (["--lr", "fast"], "train.lr = 'fast': expected float"),
        (["--lr", "nan"], "train.lr = 'nan': expected a finite number"),
        (["--train-iters", "1.5"], "train.train_iters = '1.5': expected int"),
        (["--image-mode", "nativ"], "expected one of fixed, native. Did you mean 'native'?"),
        (["--image-size", "230"], "data.image_size = 230: must be a multiple of the patch size 16"),
        (["--train-iters", "10"], "train.lr_warmup_iters = 1802: must be from 0 to below train.train_iters = 10"),
        (["--min-lr", "1"], "train.min_lr = 1.0: must be from 0 to train.lr = 0.001"),
        (["--drop-path-rate", "1"], "model.drop_path_rate = 1.0: must be in [0, 1)"),
        (["--max-bad-share", "1.5"], "data.max_bad_share = 1.5: must be from 0 to 1 (never stop)"),
        (["--mbs", "0"], "train.micro_batch_size = 0: must be at least 1"),
        (["--tp", "3"], "model.num_attention_heads = 16 is not a multiple of tensor_model_parallel_size = 3"),
        (["--tp", "16", "--ffn-hidden-size", "3080"], "model.ffn_hidden_size = 3080 is not a multiple of"),
        (["--pp", "28"], "pipeline_model_parallel_size = 28: more stages than model.num_layers = 27"),
        (["--tp", "2", "--seq-length", "1001"], "data.seq_length * micro_batch_size = 1001 is not a multiple of"),
        (
            ["--tp", "2", "--seq-length", "1001"],
            "tensor_model_parallel_size * context_parallel_size = 2; nearest allowed",
        ),
        (["--cp", "3"], "context_parallel_size = 3: a2a exchanges the 16 heads of a rank"),
        (["--tp", "8", "--cp", "4"], "(num_attention_heads / tensor_model_parallel_size = 16 / 8)"),
        (["--tp", "8", "--cp", "4"], "allowed: 1, 2; or --cp-comm-type all_gather, which takes any number"),
        (["--cp", "32", "--cp-comm-type", "ring"], "parallel.cp_comm_type = 'ring': expected one of a2a, all_gather"),
        (["--vpp", "2"], "virtual_pipeline_model_parallel_size = 2 needs pipeline_model_parallel_size > 1, here is 1"),
        (
            ["--pp", "14", "--vpp", "2"],
            "= 14 * 2: more chunks than model.num_layers = 27; with --vpp 2 allowed: --pp 1 to 13",
        ),
        (["--pp", "3", "--num-layers-in-first-pipeline-stage", "26"], "leave 1 of 27 layers for the other 2 stages"),
        (["--num-layers-in-last-pipeline-stage", "2"], "need pipeline_model_parallel_size > 1 (it is 1)"),
        (["--pp", "2", "--num-layers-in-last-pipeline-stage", "-1"], "they are numbers of layers, 0 for computed"),
        (["--recompute-modules", "core_atn"], "unknown module 'core_atn'. Did you mean 'core_attn'?"),
        (
            ["--recompute", "selective", "--recompute-modules", "layernorm", "--fusion", "norms"],
            "recompute_modules: not layernorm with train.fusion = norms",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "output_gate", "--no-attention-output-gate"],
            "output_gate needs model.attention_output_gate",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "mlp,layernorm,mlp"],
            "recompute_modules = mlp,layernorm,mlp: names a module twice",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "mlp,mlp_act"],
            "mlp makes mlp_act again as well; leave mlp_act out",
        ),
        (
            ["--recompute", "selective", "--recompute-modules", "layernorm", "--offload-modules", "core_attn,mlp_norm"],
            "not layernorm with mlp_norm in parallel.offload_modules",
        ),
        (
            [
                "--recompute",
                "selective",
                "--recompute-modules",
                "mlp_act,output_gate",
                "--offload-modules",
                "core_attn,attn_proj",
            ],
            "not output_gate with attn_proj in parallel.offload_modules",
        ),
        (["--fusion", "norms", "--transformer-impl", "transformer_engine"], "its linears make their norms themselves"),
        (["--recompute", "selective", "--recompute-modules", ""], "parallel.recompute_modules names no module"),
        (["--recompute-num-layers", "28"], "recompute_num_layers = 28: must be from 0 (all) to model.num_layers = 27"),
        (["--offload-modules", "attn_proj"], "attn_proj needs core_attn as well"),
        (["--attention-backend", "flash"], "expected one of auto, dense, grouped, varlen, flex, te"),
        (["--finetune"], "checkpoint.finetune: takes weights from a checkpoint: name it with --load"),
        (["--finetune", "--load", "x", "--save", "x"], "checkpoint.load = x: with --finetune it must be another run's"),
        (["--save", "s3://b/run"], "checkpoint.save = s3://b/run: a URL; name a place on a disk"),
        (["--load", "http://h/run"], "checkpoint.load = http://h/run: a URL"),
        (["--tensorboard-dir", "gs://b/log"], "log.tensorboard_dir = gs://b/log: a URL"),
        (["--stop-file", "s3://b/stop"], "faults.stop_file = s3://b/stop: a URL"),
        (["--cache-dir", "s3://b/cache"], "data.cache_dir = s3://b/cache: a URL"),
        (["--eval-only"], "log.eval_only needs checkpoint.load: name the checkpoint folder with --load"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(*flags, capsys=capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: {}", "unknown section 'mode'. Did you mean 'model'?"),
        ("model: {hidden_sise: 4}", "unknown key model.hidden_sise. Did you mean 'hidden_size'?"),
        ("model: {hidden_size: [4]}", "model.hidden_size = [4]: expected int"),
        ("model: {hidden_size: true}", "model.hidden_size = True: expected int"),
        ("model: 4", "section 'model' must be a mapping"),
        ("train: {lr: 1.0, lr: 2.0}", "key 'lr' is given twice"),
        ("train: {lr: [", "run.yaml"),
        ("train: {[1]: 2}", "run.yaml: a key is no word"),
        ("{[1]: 2}", "run.yaml: a key is no word"),
        ("train: {lr: 2020-01-01}", "train.lr = datetime.date(2020, 1, 1): expected float"),
        ("train: {lr: 2020-13-01}", "run.yaml: month must be in 1..12"),
        ("[" * 5000, "run.yaml: lists or mappings are nested too deep"),
        ("train: {lr: 1} # \udcff", "run.yaml: not UTF-8 text"),
    ],
)
def test_a_mistake_in_yaml_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(file)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.yaml", "no such file"),
        ("folder.yaml", "Is a directory"),
        ("loop.yaml", "Too many levels of symbolic links"),
        ("file/x.yaml", "Not a directory"),
        (f"{'x' * 300}.yaml", "File name too long"),
    ],
)
def test_a_file_of_settings_that_cannot_be_read_is_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "file").touch()
    assert f"--config {tmp_path / name}: {message}" in error_of("--config", str(tmp_path / name), capsys=capsys)


def test_layouts_are_held_against_the_number_of_processes() -> None:
    so16 = override(
        recipe("so16_stage1"),
        {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 4},
    )
    check(so16, world_size=8)
    check(so16, world_size=64)
    with pytest.raises(ValueError, match=r"12 is not a multiple of tp \* pp \* cp = 8; start 8 or 16 processes"):
        check(so16, world_size=12)
    with pytest.raises(ValueError, match=r"global_batch_size = 512 packs is not a multiple of .* = 2 \* 3"):
        check(so16, world_size=24)


def test_interleaving_needs_as_many_micro_batches_as_stages() -> None:
    so16 = override(
        recipe("so16_stage1"),
        {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 4},
    )
    interleaved = override(so16, {"parallel.virtual_pipeline_model_parallel_size": 3, "train.global_batch_size": 8})
    check(interleaved, world_size=8)
    message = r"8 packs are 2 micro-batches a pipeline; .* multiple of .* = 4; nearest allowed: global_batch_size 16"
    with pytest.raises(ValueError, match=message):
        check(interleaved, world_size=16)


def test_print_config_gives_the_configuration_back() -> None:
    done = subprocess.run(
        [sys.executable, ENTRY, "--config", "so16_stage1", "--tp", "2", "--print-config"],
        capture_output=True,
        text=True,
        check=True,
    )
    expected, _ = parse_args(["--config", "so16_stage1", "--tp", "2"])
    assert from_dict(yaml.safe_load(done.stdout), "printed") == expected


def test_help_shows_every_setting_once() -> None:
    done = subprocess.run([sys.executable, ENTRY, "--help"], capture_output=True, text=True, check=True)
    for part in RunConfig().to_dict().values():
        for key in part:
            flag = f"--{key.replace('_', '-')}"
            assert len(re.findall(rf"^  {flag}[ ,]", done.stdout, re.MULTILINE)) == 1, flag


LISTS = {
    "a.tar,b.tar": ["a.tar", "b.tar"],
    "a,b.tar": ["a,b.tar"],
    "a,b.tar,c.tar": ["a,b.tar", "c.tar"],
    "c.tar,a,b.tar": ["c.tar", "a,b.tar"],
    "d,e,f/0.tar,c.tar": ["d,e,f/0.tar", "c.tar"],
    "d,e,f,c.tar": ["d,e,f", "c.tar"],
    "d,e,f/*.tar,[c].tar": ["d,e,f/*.tar", "[c].tar"],
    "d,e,f/**/*.tar": ["d,e,f/**/*.tar"],
    "x-{000,007}.tar,c.tar": ["x-{000,007}.tar", "c.tar"],
    "x-{0{1,2},{3,4}}.tar,c.tar": ["x-{0{1,2},{3,4}}.tar", "c.tar"],
    "d,e,f/{0,1}.tar,c.tar": ["d,e,f/{0,1}.tar", "c.tar"],
    "x-{000..099}.tar": ["x-{000..099}.tar"],
    "open{,b.tar,c.tar": ["open{,b.tar", "c.tar"],
    "missing,c.tar,gone.tar": ["missing", "c.tar", "gone.tar"],
    "s3://x/{a,b}.tar,c.tar": ["s3://x/{a,b}.tar", "c.tar"],
    "s3://x/a,b/t.dataset.json,c.tar": ["s3://x/a,b/t.dataset.json", "c.tar"],
    "s3://x/t.dataset.json,gone.dataset.json": ["s3://x/t.dataset.json", "gone.dataset.json"],
    "s3://x/a,b": ["s3://x/a,b"],
    "s3://x/t,s3://x/u,/v": ["s3://x/t", "s3://x/u", "/v"],
    "c.tar,": ["c.tar"],
    ",,c.tar,,": ["c.tar"],
    "": [],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_comma_of_a_path_does_not_part_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.tar", "b.tar", "c.tar", "d,e,f/0.tar", "open{,b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config, _ = parse_args(["--train-data", text, "--valid-data", text])
    assert list(config.data.train_data) == list(config.data.valid_data) == LISTS[text]
    # A list of YAML's is taken as it is.
    assert from_dict(yaml.safe_load(config.to_yaml()), "again") == config
    assert override(config, {"data.train_data": [text]}).data.train_data == (text,)


def test_long_lists_of_paths_are_parted_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"/some/where/not/here/{i:05d}.dataset.json" for i in range(1000)]
    began = time.monotonic()
    assert override(RunConfig(), {"data.train_data": ",".join(names)}).data.train_data == tuple(names)
    assert time.monotonic() - began < 20
