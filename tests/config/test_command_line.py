"""The command line has one flag for each setting, and prints the configuration that runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genlip_megatron.config import RunConfig, from_dict
from genlip_megatron.config.command_line import parse_args
from genlip_megatron.testing import CHECKOUT

ENTRY = str(CHECKOUT / "pretrain_genlip.py")


def test_aliases_mean_the_full_flags() -> None:
    short = ["--config", "so16_stage1", "--tp", "2", "--pp", "3", "--mbs", "2", "--gbs", "64"]
    long = ["--config", "so16_stage1", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"]
    long += ["--micro-batch-size", "2", "--global-batch-size", "64"]
    assert parse_args(short) == parse_args(long)


def test_print_config_gives_the_configuration_back() -> None:
    words = ["--config", "so16_stage1", "--tp", "2"]
    done = subprocess.run([sys.executable, ENTRY, *words, "--print-config"], capture_output=True, text=True, check=True)
    assert from_dict(yaml.safe_load(done.stdout), "printed") == parse_args(words)[0]


def test_help_shows_every_setting_once() -> None:
    done = subprocess.run([sys.executable, ENTRY, "--help"], capture_output=True, text=True, check=True)
    for section in RunConfig().to_dict().values():
        for key in section:
            flag = f"--{key.replace('_', '-')}"
            assert len(re.findall(rf"^  {flag}[ ,]", done.stdout, re.MULTILINE)) == 1, flag


def test_the_gates_earlier_true_and_false_still_mean_the_same() -> None:
    for value, meaning in ((True, "elementwise"), (False, "none"), ("headwise", "headwise"), ("none", "none")):
        assert from_dict({"model": {"attention_output_gate": value}}, "x").model.attention_output_gate == meaning
    for words, meaning in (
        (["--no-attention-output-gate"], "none"),
        (["--attention-output-gate"], "elementwise"),
        (["--attention-output-gate", "headwise"], "headwise"),
    ):
        assert parse_args(["--config", "so16_stage1", *words])[0].model.attention_output_gate == meaning
    with pytest.raises(
        ValueError, match=r"model.attention_output_gate = 'maybe': expected one of elementwise, headwise, none"
    ):
        from_dict({"model": {"attention_output_gate": "maybe"}}, "x")


def test_a_start_that_names_no_model_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--train-data", "shards", "--save", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(
        "pretrain_genlip.py: error: --config: names no recipe, and no flag"
    )
    assert "demo, " in line and "so16_stage1" in line
    (tmp_path / "iter_0000010").mkdir()  # a run that was started so by an earlier version still resumes
    assert parse_args(["--train-data", "shards", "--save", str(tmp_path)])[0].model.num_layers == 27
    assert "WARNING: no --config: nothing sets model.num_layers = 27, " in capsys.readouterr().err


def test_sizes_that_nothing_sets_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = tmp_path / "run.yaml", ["--config", str(tmp_path / "run.yaml"), "--ffn-hidden-size", "176"]
    sizes = "num_layers: 2, hidden_size: 64, num_attention_heads: 4"
    file.write_text(f"model: {{{sizes}}}\n")
    assert parse_args(words)[0].model.text_hidden_size == 1152
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"WARNING: --config {file}: nothing sets model.text_hidden_size = 1152; the values are so16's. Set them, or "
        "add a line such as base: l16_stage1"
    )
    for whole in (f"model: {{{sizes}, text_hidden_size: 64}}\n", f"base: demo\nmodel: {{{sizes}}}\n"):
        file.write_text(whole)
        parse_args(words)
        assert capsys.readouterr().err == ""


def test_fewer_steps_cut_what_is_given_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_args(["--config", "so16_stage1", "--train-iters", "8", "--profile", "--save", "run"])[0]
    assert (config.train.lr_warmup_iters, config.log.profile_steps) == (7, "8:8")
    said = [line.partition("WARNING: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "train.lr_warmup_iters = 1802: cut to 7, because --train-iters is 8",
        "log.profile_steps = 10:12: cut to 8:8, because --train-iters is 8",
    ]
    assert parse_args(["--config", "so16_stage1", "--train-iters", "5000"])[0].train.lr_warmup_iters == 1802
    with pytest.raises(SystemExit):  # a flag is not cut
        parse_args(["--config", "so16_stage1", "--train-iters", "8", "--lr-warmup-iters", "20"])
