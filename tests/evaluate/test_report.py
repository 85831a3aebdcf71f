"""The page of a run: its curves are TensorBoard's, its commands run, and a browser shows all of it."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
import torch
from PIL import Image

from genlip_megatron.config.command_line import build_parser
from genlip_megatron.evaluate import attention_plots, probe_results, report_parts, report_plots, sweep
from genlip_megatron.evaluate.report_page import Picture
from genlip_megatron.evaluate.run_log import Curve, Mark, RunLog, read_log
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.runs import tiny_config
from tests.convert.test_round_trips import saved
from tests.evaluate.browser import look
from tests.train.test_writer import apart, begun, log, shown

__all__ = ["apart"]
PARTS = ["Training", "Captions", "Newest checkpoint", "Attention", "Probes", "Training data"]


@pytest.mark.usefixtures("apart")
def test_curves_are_those_of_tensorboard_and_repeated_steps_are_kept_apart(tmp_path: Path) -> None:
    """A run from the start to step 31, rolled back to 24, resumed after a crash from 20."""
    writer = begun(tmp_path, 0)
    log(writer, 0, *range(32))
    writer.rewind(24)
    log(writer, 24, *range(25, 28))
    log(begun(tmp_path, 20), 20, *range(21, 32))
    found = read_log(tmp_path / "tensorboard")
    scalars, texts = shown(tmp_path)
    curve = found.curves["lm loss"]
    assert [(step, round(value, 2)) for step, value in curve.kept] == scalars
    assert found.captions["validation/0"] == texts and len(texts) == 4
    with Image.open(io.BytesIO(found.images["validation/0"])) as picture:
        assert picture.getpixel((0, 0)) == (30, 30, 30)
    assert [[step for step, _ in points] for points in curve.repeated] == [[*range(25, 32)], [*range(21, 28)]]
    assert found.marks == [Mark("started", 0), Mark("rolled back", 24), Mark("resumed", 20)]


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the log of a run that was rolled back once."""
    folder = (
        tmp_path_factory.mktemp("runs") / "run of_a_very_long_name_without_any_space_or_hyphen_where_a_line_could_break"
    )
    run_distributed(1, saved, tiny_config(demo_data, checkpoint__save=str(folder), data__num_workers=1), True)
    # TensorBoard orders files by their second and process: that run's file could come after this one.
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    writer = begun(folder, 0)
    for step in range(0, 60):
        values = {"lm loss": 9 * 0.9**step + 0.2, "lm loss validation": 9 * 0.9**step + 0.3}
        speeds = {"tokens-per-second": 2e5 + step, "throughput": 300.0, "iteration-time": 1.5, "data-wait": 0.01}
        writer.scalars({**values, **speeds, "grad-norm": 1 / (1 + step), "learning-rate": 1e-3}, step)
        if step % 20 == 0:
            picture = torch.full((3, 64, 96), 3 * step, dtype=torch.uint8)
            writer.caption(0, picture, f"caption: <b>caption {step}</b>\n\ntruth: {'a true caption ' * 12}", step)
        if step == 40:
            writer.rewind(30)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of tools/attention.py, tools/probe.py and tools/sweep.py."""
    root = tmp_path_factory.mktemp("results")
    names = ["/data/experiments/2026/genlip/runs/so16-stage1-seed7", "random:runs/so16"]
    places = {name: root / name for name in ("attention", "probe", "sweep")}
    for place in places.values():
        place.mkdir()
    chance = {"image": {"first": 0.1, "image": 0.5}, "generated": {"first": 0.1, "image": 0.5}}
    mass = {query: {key: [0.1, 0.2, 0.3] for key in keys} for query, keys in chance.items()}
    models = [{"name": name, "layers": 3, "mass": mass, "chance_mass": chance} for name in names]
    attention_plots.draw_mass(models, places["attention"] / "mass.png")
    command = "tools/attention.py photos --load run random:run --output attention"
    facts = {"kind": "genlip attention", "command": command, "models": models}
    (places["attention"] / "attention.json").write_text(json.dumps(facts))
    rows = [{"settings": {"encoder": name}, "accuracy": 0.25 * (i + 1)} for i, name in enumerate(names)]
    facts = {"task": "classify", "protocol": "capi", "classes": 4}
    probe_results.write(places["probe"], facts, rows, "accuracy", "top-1 accuracy, %")
    scores = {name: {224: 0.5, 288: 0.6, 336: 0.65, 384: 0.7, 448: 0.7, 512: 0.71} for name in names}
    grids = {size: (size // 16, size // 16) for size in scores[names[0]]}
    sweep.write(places["sweep"], ["tools/probe.py", "classify"], "accuracy", scores, {}, grids)
    return places


@pytest.fixture(scope="module")
def pages(
    run: Path, folders: dict[str, Path], demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """{"full", "empty": (the page, what the tool printed)}."""
    root, found = tmp_path_factory.mktemp("pages"), {}
    images = ["--images", demo_data / "val-00000.tar", "--limit", "1", "--device", "cpu"]
    results = ["--results", folders["probe"], folders["sweep"], "--attention", folders["attention"]]
    for name, flags in (("full", [*images, *results]), ("empty", ["--tensorboard", run / "tensorboard"])):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert report.main([str(word) for word in (run, "--output", root / f"{name}.html", *flags)]) == 0
        found[name] = ((root / f"{name}.html").read_text(), said.getvalue())
    return found


@pytest.mark.slow
def test_a_browser_shows_everything_at_both_widths(pages: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    (full, said), (empty, missing) = pages["full"], pages["empty"]
    assert "missing" not in said
    assert missing.endswith(" | missing: Newest checkpoint, Attention, Probes, zero-shot, perplexity, sweeps\n")
    for page in (full, empty):
        assert [title in page for title in PARTS] == [True] * 6
        outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!data:image/png|#)[^"\'\s>]+', page)
        assert not outside and "<script" not in page and "&lt;b&gt;caption 20&lt;/b&gt;" in page
    assert "<td>0.25</td>" in full and "<td>0.71</td>" in full and "512 px" in full
    # Six curves, a validation image, three histograms; a readout, and a picture of each of three folders.
    assert [one for one in look({"full": full, "empty": empty}, tmp_path) if one["problems"]] == []
    assert (full.count("<img"), empty.count("<img")) == (14, 10)


def test_no_label_of_a_curve_is_cut_off() -> None:
    """Long tick labels, which matplotlib adds after it has laid out the picture."""
    points = [(20, 1.74), (40, 1.0), (60, 0.3), (120, 0.83), (480, 0.12)]
    for panel in report_plots.PANELS:
        curves = {tag: Curve(points, [points[:2]]) for tag in panel.tags}
        picture = report_plots.curves(RunLog(curves, [Mark("resumed", 240)]), panel)
        assert picture is not None
        pixels = np.array(Image.open(io.BytesIO(picture)).convert("L"))
        rim = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert pixels.min() < 100 and all(side.min() == 255 for side in rim), panel.title


@pytest.mark.slow
def test_every_command_on_the_page_is_one_that_its_tool_accepts(run: Path, pages: dict[str, tuple[str, str]]) -> None:
    lines = [line for page, _ in pages.values() for line in re.findall(r"<pre>(.+?)</pre>", page, re.DOTALL)]
    checked = set()
    for program, *words in (shlex.split(html.unescape(line)) for line in lines):
        path = Path(program)
        if path.parent.name != "tools" or not Path(report.__file__).with_name(path.name).is_file():
            continue
        tool = importlib.import_module(path.stem)
        if hasattr(tool, "build_parser"):
            tool.build_parser().parse_args(words[: words.index("--")] if "--" in words else words)
            checked.add(path.name)
    assert checked >= {"report.py", "attention.py", "probe.py", "sweep.py", "caption.py", "patch_readout.py"}
    (validation,) = report_parts.captions(read_log(run), run, run, "").blocks[0].commands
    launch, script, flags = validation.partition(" pretrain_genlip.py ")
    assert launch == "torchrun --nproc-per-node 1" and script and build_parser().parse_args(shlex.split(flags))


def test_data_that_moved_are_missing_with_the_reason(demo_data: Path, tmp_path: Path) -> None:
    config = tiny_config(demo_data, data__train_data=[str(tmp_path / "gone.dataset.json"), "s3://bucket/a.tar"])
    part = report_parts.data(config, "")
    assert part.missing and "gone.dataset.json" in part.blocks[0].missing and "remote" in part.blocks[1].missing
    part = report_parts.data(tiny_config(demo_data), "")
    manifest = json.loads((demo_data / "train.dataset.json").read_text())
    other = report_parts.data(tiny_config(demo_data, data__train_data=[str(demo_data / "train.dataset.json")]), "")
    assert part.blocks[0].table is not None and other.blocks[0].table is not None
    (row,), (same,) = part.blocks[0].table.rows, other.blocks[0].table.rows
    assert row[1:] == same[1:] and row[2] == str(manifest["samples"])


def _other_page(run: Path) -> None:
    (run / "report.html").write_text("<html>mine</html>")


def _results(name: str, content: str) -> Any:
    def write(run: Path) -> None:
        (run / "results").mkdir()
        (run / "results" / name).write_text(content)

    return write


BAD: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "no such run": (None, ("nowhere",), "RUN nowhere: no such folder"),
    "a folder that is no run": (None, ("empty",), "RUN empty: no checkpoint and no TensorBoard events"),
    "no events": (None, ("run", "--tensorboard", "empty"), "--tensorboard empty: it holds no event files"),
    "images without a checkpoint": (None, ("run", "--images", "a.png"), "--images a.png: run holds no checkpoint yet"),
    "a negative limit": (None, ("run", "--limit", "-1"), "--limit -1: must be at least 0"),
    "a page of others": (_other_page, ("run",), "--output run/report.html: it exists, and this command did not"),
    "no results": (None, ("run", "--results", "empty"), "--results empty: results.json cannot be read (No such file"),
    "damaged results": (_results("results.json", "{"), ("run", "--results", "run/results"), "results.json cannot be"),
    "no attention": (None, ("run", "--attention", "empty"), "--attention empty: attention.json cannot be read"),
    "attention of others": (
        _results("attention.json", "{}"),
        ("run", "--attention", "run/results"),
        "its attention.json is not of tools/attention.py",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    begun(Path("run"), 0).scalars({"lm loss": 1.0}, 1)
    if change is not None:
        change(Path("run"))
    before = sorted(tmp_path.rglob("*"))
    assert report.main(list(words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("report.py: error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_of_many_panels_stays_readable() -> None:
    def picture(width: int, dpi: int) -> Picture:
        content = io.BytesIO()
        Image.fromarray(np.zeros((10, width), np.uint8)).save(content, "PNG", dpi=(dpi, dpi))
        return Picture("", content.getvalue())

    assert (picture(960, 192).width, picture(960, 192).least) == (480, 0)
    assert (picture(1500, 144).width, picture(1500, 144).least) == (1000, 720)


def test_a_run_that_starts_again_has_no_captions_yet() -> None:
    log = RunLog(captions={"validation/0": [(0, "a"), (5, "b")], "validation/1": [(7, "c")]})
    log.rewind(5, "resumed")
    assert log.captions == {"validation/0": [(0, "a")]}
    log.rewind(0, "resumed")
    assert log.captions == {}
