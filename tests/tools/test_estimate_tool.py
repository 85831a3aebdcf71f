"""tools/estimate.py prints its report, and one line for bad input."""

from __future__ import annotations

import json

import pytest
import yaml

from genlip_megatron.config import from_dict
from genlip_megatron.config.command_line import parse_args
from tools import estimate as tool

RUN = ["--config", "so16_stage1", "--gpus", "64", "--gpu", "h100"]


@pytest.mark.slow
def test_best_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*RUN, "--top", "3"]) == 0
    text = capsys.readouterr().out
    for part in (
        "817.3 M", "0.848 TFLOP", "weights", "gradients", "optimizer", "activations", "head", "pipeline bubble",
        "data parallel", "tensor parallel", "context parallel", "days", "is an estimate, not a measurement: 45% MFU",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("\n--tp ") == 3
    assert max(len(line) for line in text.splitlines()) < 170


def test_one_layout_and_its_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*flags: str) -> dict:
        assert tool.main([*RUN, "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["layout"]

    one = run("--mbs", "1", "--mfu", "0.3")
    overlapped = "--overlap-grad-reduce --overlap-param-gather"
    assert one["layout"] == f"--tp 1 --pp 1 --micro-batch-size 1 {overlapped} --recompute none" and one["fits"]
    assert one["micro_batches"] == 8 and one["mfu"] == pytest.approx(0.3)  # all communication is overlapped
    waiting = run("--mbs", "1", "--mfu", "0.3", "--no-overlap-grad-reduce", "--no-overlap-param-gather")
    assert waiting["mfu"] < 0.3
    assert one["memory"]["total"] == pytest.approx(
        sum(v for k, v in one["memory"].items() if k not in ("total", "stage"))
    )
    two = run("--mbs", "1", "--mfu", "0.3", "--pp", "2")
    assert two["bubble"] > 0 and two["step_seconds"] > one["step_seconds"]
    assert run("--mbs", "1", "--answer-tokens", "1")["flops_per_sample"] < one["flops_per_sample"]


@pytest.mark.slow
def test_a_layout_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*RUN, "--tp", "1", "--gpu-memory-gb", "40"]) == 1
    text = capsys.readouterr().out
    assert "This layout does not fit. The nearest that fit:" in text
    assert "--tp 1 --pp 1 --micro-batch-size 1 --overlap-grad-reduce --overlap-param-gather --recompute none" in text
    assert tool.main(["--config", "g16_stage1", "--gpu-memory-gb", "1"]) == 1
    assert "no layout on 1 x h100 fits 1.0 GiB per rank" in capsys.readouterr().out


def test_the_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*RUN, "--tp", "2", "--print-config"]) == 0
    assert from_dict(yaml.safe_load(capsys.readouterr().out), "printed") == parse_args([*RUN[:2], "--tp", "2"])[0]


def test_a_cpu_has_no_peak_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config", "demo", "--gpus", "2", "--gpu", "cpu", "--tp", "2"]) == 0
    text = capsys.readouterr().out
    assert "No step time: give --peak-tflops" in text and "days" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus = 0: must be at least 1"),
        (["--gpus", "x"], "argument --gpus: invalid int value: 'x'"),
        (["--gpu", "h1000"], "argument --gpu: invalid choice: 'h1000'"),
        (["--mfu", "45"], "--mfu = 45.0: must be above 0 and at most 1"),
        (["--gpu-memory-gb", "-1"], "--gpu-memory-gb = -1.0: must be above 0"),
        (["--top", "0"], "--top = 0: must be at least 1"),
        (["--image-tokens", "20000"], "--image-tokens = 20000: must be from 0 to 16383"),
        (["--answer-tokens", "75"], "--answer-tokens = 75: must be from 1 to 74"),
        (
            ["--gpus", "64", "--tp", "3"],
            "parallel.tensor_model_parallel_size = 3: must divide model.num_attention_heads = 16",
        ),
        (["--gpus", "6", "--tp", "4"], "world size = 6: not a multiple of tp * pp * cp = 4"),
        (["--image-token", "6"], "unknown flag --image-token. Did you mean '--image-tokens'?"),
        (["--config", "so17_stage1"], "no such recipe"),
    ],
)
def test_bad_input_gets_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--config", "so16_stage1", *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("estimate.py: error: ")
