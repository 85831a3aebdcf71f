"""The command line has one flag for each setting, and prints the configuration that runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from genlip_megatron.config import RunConfig, from_dict
from genlip_megatron.config.command_line import parse_args
from genlip_megatron.testing import CHECKOUT

ENTRY = str(CHECKOUT / "pretrain_genlip.py")


def test_aliases_mean_the_full_flags() -> None:
    short = ["--tp", "2", "--pp", "3", "--mbs", "2", "--gbs", "64"]
    long = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3"]
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
