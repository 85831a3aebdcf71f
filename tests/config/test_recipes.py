"""Recipes hold the paper's settings; YAML files are strict and may build on one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genlip_megatron.config import RunConfig, from_dict, load_yaml, recipe_names
from genlip_megatron.config.checks import check
from genlip_megatron.config.command_line import parse_args

# Paper Tables 1 and 2, and the sizes of the released weights.
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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [1, 2])
def test_recipes_match_the_papers_tables(size: str, stage: int) -> None:
    config = recipe(f"{size}_stage{stage}")
    check(config)
    model, data, train, log = config.model, config.data, config.train, config.log
    assert SIZES[size] == (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.ffn_hidden_size,
        model.text_hidden_size,
        model.rope_sections,
        model.drop_path_rate,
    )
    assert (model.vocab_size, model.layer_scale_init, model.attention_output_gate) == (151936, 0.1, "elementwise")
    large = size.startswith("g16")
    if stage == 1:
        expected = (768, 171_661, 3_433) if large else (512, 257_492, 1_802)
        assert (data.image_mode, data.image_size, data.fixed_resize, train.lr) == ("fixed", 224, "squash", 1e-3)
    else:
        expected = (256, 10_586, 212 if large else 74)
        assert (data.image_mode, data.min_pixels, data.max_pixels, train.lr) == ("native", 4096, 262144, 1e-4)
    assert (train.global_batch_size, train.train_iters, train.lr_warmup_iters) == expected
    assert (train.min_lr, train.weight_decay, train.clip_grad) == (1e-6, 0.01, 1.0)
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.9, 0.95, 1e-8)
    assert (data.seq_length, train.micro_batch_size) == (16384, 1 if large else 2)
    assert config.parallel.overlap_grad_reduce and config.parallel.overlap_param_gather
    assert (log.eval_interval, config.checkpoint.save_interval) == ((5000, 1000) if stage == 1 else (1000, 500))


def test_every_recipe_is_listed_and_valid() -> None:
    assert set(recipe_names()) == {"demo", *(f"{size}_stage{stage}" for size in SIZES for stage in (1, 2))}
    check(recipe("demo"), world_size=4)


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 0.5, seed: 7}\n")
    config, _ = parse_args(["--config", str(file), "--seed", "9"])
    assert (config.train.lr, config.train.seed, config.train.clip_grad) == (0.5, 9, RunConfig().train.clip_grad)


def test_printed_yaml_loads_unchanged() -> None:
    for name in recipe_names():
        config = recipe(name)
        assert from_dict(yaml.safe_load(config.to_yaml()), "again") == config


def test_a_base_is_a_recipe_or_a_file_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text("base: ../mine.yaml\ntrain: {seed: 5}\nlog: {log_interval: 3}\n")
    (tmp_path / "mine.yaml").write_text("base: l16_stage2\ntrain: {seed: 4, lr: 0.5}\n")
    config, expected = recipe(str(tmp_path / "sub" / "run.yaml")), recipe("l16_stage2").to_dict()
    expected["train"] |= {"seed": 5, "lr": 0.5}
    expected["log"] |= {"log_interval": 3}
    assert config.to_dict() == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run": "base: so16_stag1"}, "run.yaml: base = so16_stag1: no such recipe. Did you mean 'so16_stage1'"),
        ({"run": "base: gone.yaml"}, "run.yaml: base = gone.yaml: no such file"),
        ({"run": "base: [demo]"}, "run.yaml: base = ['demo']: expected the name of a recipe or the path"),
        ({"run": "base: ./run.yaml"}, "the files are each other's base (run.yaml -> run.yaml). Remove one base"),
        ({"run": "base: a.yaml", "a": "base: b.yaml", "b": "base: a.yaml"}, "(run.yaml -> a.yaml -> b.yaml -> a.yaml)"),
        ({"run": "base: a.yaml", "a": "model: {hidden_sise: 4}"}, "a.yaml: unknown key model.hidden_sise. Did you"),
        ({"run": "mode: {}"}, "unknown section 'mode'. Did you mean 'model'?"),
        ({"run": "model: {hidden_sise: 4}"}, "unknown key model.hidden_sise. Did you mean 'hidden_size'?"),
        ({"run": "model: {hidden_size: [4]}"}, "model.hidden_size = [4]: expected a whole number"),
        ({"run": "model: {hidden_size: true}"}, "model.hidden_size = True: expected a whole number"),
        ({"run": "parallel: {fsdp: 1}"}, "parallel.fsdp = 1: expected true or false"),
        ({"run": "model: 4"}, "section 'model' must be a mapping"),
        ({"run": "train: {lr: 1.0, lr: 2.0}"}, "key 'lr' is given twice"),
        ({"run": "train: {lr: ["}, "run.yaml"),
        ({"run": "train: {[1]: 2}"}, "run.yaml: a key is not a word"),
        ({"run": "{[1]: 2}"}, "run.yaml: a key is not a word"),
        ({"run": "train: {lr: 2020-01-01}"}, "train.lr = datetime.date(2020, 1, 1): expected a number"),
        ({"run": "train: {lr: 2020-13-01}"}, "run.yaml: month must be in 1..12"),
        ({"run": "[" * 5000}, "run.yaml: its lists or mappings are nested too deep"),
        ({"run": "train: {lr: 1} # \udcff"}, "run.yaml: not UTF-8 text"),
    ],
)
def test_errors_in_yaml_name_the_file_and_the_setting(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "run.yaml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


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
def test_a_file_that_cannot_be_read_is_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--config {tmp_path / name}: {message}" in line
