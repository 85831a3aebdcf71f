"""The command line has one flag for each setting, and prints the configuration that runs."""

from __future__ import annotations

import re
import subprocess
import sys

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
