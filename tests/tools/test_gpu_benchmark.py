"""The GPU benchmark: its baseline is the same model, reports list missing figures, jobs run; figures need a GPU."""

from __future__ import annotations

import doctest
import json
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import gpu
import gpu_baseline
import gpu_report
import gpu_sections
import numpy as np
import pytest
import torch
from common import make_samples, tokens_of
from gpu_report import Figure
from gpu_sections import Job
from plain import PlainGenLIP
from train_step import padded

from genlip_megatron.batch import pack_samples
from genlip_megatron.config import ModelConfig
from genlip_megatron.testing.distributed import run_distributed

HERE = {"device": "H", "date": "2030-01-01", "torch": "9"}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_the_baseline_is_the_plain_model_on_packs() -> None:
    model = ModelConfig(2, 48, 2, 64, 32, 300, (4, 4, 4), drop_path_rate=0.0)
    rng = np.random.default_rng(0)
    samples = make_samples([(2, 3), (4, 4), (1, 1)], rng)
    for sample in samples:
        sample.token_ids[:] = [token % model.vocab_size for token in sample.token_ids]  # type: ignore[index]
    batch = pack_samples([samples], sum(map(tokens_of, samples)) + 5)
    torch.manual_seed(0)
    plain = PlainGenLIP(model)
    answers = int((batch.loss_weights > 0).sum())
    expected = plain(padded(samples), "answer")
    torch.testing.assert_close(
        gpu_baseline.pack_loss(plain, batch, flex=False) / answers, expected, atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():  # FlexAttention has no backward pass on a CPU
        dense, flex = (gpu_baseline.pack_features(plain, batch, flex) for flex in (False, True))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)
    step = gpu_baseline.trainer(model, [batch] * 2, torch.device("cpu"), torch.float32)
    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_derived_figures() -> None:
    failed, tried = doctest.testmod(gpu_report)
    assert tried and not failed
    step = Figure("step", "l16 stage 1 BF16", 50.0, "% MFU", details={"samples/s": 800.0})
    baseline = Figure("step", "l16 stage 1 baseline", 20.0, "% MFU", details={"samples/s": 320.0})
    loader = Figure("data", "loader, dali", 900.0, "samples/s")
    found = {figure.name: figure for figure in gpu_report.derived([step, baseline, loader])}
    assert found["l16 stage 1 over the baseline"].value == 2.5
    assert found["loader, dali"].target == 1200
    lost = Figure("step", "l16 stage 1 baseline", missing="out of memory")
    figures = gpu_report.derived([step, lost])
    found = {figure.name: figure for figure in figures}
    assert found["l16 stage 1 over the baseline"].missing == "baseline: out of memory"
    assert found["l16 stage 1 BF16"].target == 50
    drawing = gpu_report.chart([Figure("step", f"l16 stage 1 {kind}", 1.0) for kind in gpu_sections.STEP_KINDS])
    xml.dom.minidom.parseString(drawing)
    assert all(colour in drawing for colour in gpu_report._COLOURS.values())
    drawing = gpu_report.chart(figures)
    xml.dom.minidom.parseString(drawing)
    # One bar with its target and one without a figure; ratios have no bar.
    assert (drawing.count("<line"), drawing.count("not measured"), drawing.count("text-anchor")) == (1, 1, 2)


def test_a_page_keeps_its_figures_until_new_ones_exist(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    missing, there = Figure("head", "a", missing="no CUDA device"), Figure("head", "a", 3.0, "TFLOP/s")
    page.write_text("before\n")
    with pytest.raises(ValueError, match="has no <!-- gpu:begin -->"):
        gpu_report.write_page(page, [missing], HERE)
    page.write_text("before\n<!-- gpu:begin -->\n<!-- gpu:end -->\nafter\n")
    gpu_report.write_page(page, [missing], HERE)
    gpu_report.write_page(page, [missing], HERE)
    assert "not measured: no CUDA device" in page.read_text() and not page.with_suffix(".svg").exists()
    gpu_report.write_page(page, [there], HERE)
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu:begin -->\nMeasured on H, 2030-01-01; torch 9.\n")
    assert text.endswith("<!-- gpu:end -->\nafter\n") and "3 TFLOP/s" in text and "(page.svg)" in text
    with pytest.raises(ValueError, match="it holds figures"):
        gpu_report.write_page(page, [missing], HERE)
    assert page.read_text() == text


@needs_no_gpu
def test_without_a_gpu_everything_is_listed_as_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "b.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--sections", "head,step", "--output", str(output)])
    assert gpu.main() == 0
    figures = json.loads(output.read_text())["figures"]
    assert len(figures) == 3 * 4 + 6 * 8
    assert {figure["missing"] for figure in figures} == {"no CUDA device"}
    assert all(figure["date"] and figure["torch"] == torch.__version__ for figure in figures)
    names = [figure["name"] for figure in figures]
    assert len(set(names)) == len(names) and {"so16 stage 1 TE", "so16 stage 1 FP8 current"} <= set(names)
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    assert all(f"| {figure} |" in page.read_text() for job in gpu.all_jobs() for figure in job.figures)


def test_versions_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91302)
    assert gpu.machine()["cuDNN"] == "9.13.2"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert "cuDNN" not in gpu.machine()


def test_a_wrong_flag_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--sections", "head,hed"], "--sections: unknown hed. Allowed are matmul, attention"),
        (["--write", "x.md", "--rehearse"], "figures of a rehearsal mean nothing"),
        (["--write", "x.md", "--sections", "head"], "the page holds all sections"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
        with pytest.raises(SystemExit):
            gpu.main()
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_fails_or_hangs_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    (late,) = gpu.run_job(Job("head", "head", ("ours",)), 1.0, True)
    assert late.missing == "the section's time was over"
    monkeypatch.setattr(gpu, "_LEAST", 0)
    (hung,) = gpu.run_job(Job("head", "head", ("ours",)), 0.5, True)
    assert hung.missing == "not done within the section's time (0 s left)"
    (broken,) = gpu.run_job(Job("head", "no such job", ("ours",)), 100.0, True)
    assert broken.missing.startswith("its process ended with status 1: ValueError")


@pytest.mark.slow
def test_a_step_is_measured_beside_its_baseline_on_the_same_samples() -> None:
    job = next(job for job in gpu.all_jobs() if job.name == "so16 stage 2")
    figures = gpu.run_job(job, 200.0, True)
    assert [figure.name for figure in figures] == list(job.figures)
    ours, baseline, selective, *others = figures
    assert not (ours.missing or baseline.missing or selective.missing) and all(figure.missing for figure in others)
    measured = (ours, baseline, selective)
    rates = [[float(figure.details[name]) for name in ("tokens/s", "samples/s")] for figure in measured]
    assert [tokens / samples for tokens, samples in rates] == pytest.approx([rates[0][0] / rates[0][1]] * 3)
    assert all(float(ours.details[name]) > 0 for name in ("ms forward", "ms backward"))
    assert (ours.details["attention"], baseline.details["attention"]) == ("grouped", "SDPA")


def head_gradients() -> dict[str, list[torch.Tensor]]:
    """{contestant: [gradient of the hidden states, sum of two calls in the weight's buffer, loss]}."""
    config = gpu_sections.recipe("so16", 1, True)
    gpu_sections.groups.initialize(config)
    head = gpu_sections.Head(
        config.model,
        gpu_sections.transformer_config(config),
        gpu_sections.groups.parallel_state.get_tensor_model_parallel_group(),
    )
    torch.manual_seed(0)
    gpu_sections.quick_weights(head, config)
    weight: Any = head.weight
    hidden = torch.randn(7, 1, config.model.hidden_size, requires_grad=True)
    results = {}
    for who, forward in gpu_sections.head_losses(head, hidden, torch.arange(7)).items():
        weight.main_grad = torch.zeros_like(weight)
        gradient = [gpu_sections.add_head_gradients(forward(), hidden, weight) for _ in range(2)][1]
        results[who] = [gradient, weight.main_grad.clone(), forward().detach()]  # our loss also adds to the buffer
    return results


@pytest.mark.slow
def test_both_heads_compute_the_same_gradients() -> None:
    (results,) = run_distributed(1, head_gradients)
    assert torch.unique(results["ours"][1]).numel() > 2
    torch.testing.assert_close(results["ours"], results["unfused"], atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_every_section_rehearses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "b.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--output", str(output)])
    assert gpu.main() == 0
    report = json.loads(output.read_text())
    assert report["rehearsal"]
    allowed = ("needs a CUDA device", "Transformer Engine")
    for figure in report["figures"]:
        reason = figure["missing"]
        assert figure["value"] is not None or any(word in reason for word in allowed), figure
