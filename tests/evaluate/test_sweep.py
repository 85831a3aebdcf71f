"""``tools/sweep.py``: one curve over image sizes, its resumption, and what it refuses before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe
import pytest
import sweep
from PIL import Image

from genlip_megatron.evaluate import report_parts
from genlip_megatron.evaluate import sweep as library
from tests.evaluate.probes import class_folders

PROBE = probe.__file__


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("data"), 5, 2)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that ran, in this process instead of one each."""
    sizes: list[int] = []

    def run(words: list[str]) -> int:
        assert words[1] == PROBE
        sizes.append(int(words[words.index("--size") + 1]))
        return probe.main(words[2:])

    monkeypatch.setattr(sweep, "_run", run)
    return sizes


def tool(data: Path, *flags: str, encoders: str = "colour pixels") -> list[str]:
    folders = ["--train", str(data / "train"), "--val", str(data / "val")]
    command = [PROBE, "classify", "--head", "knn", "--encoder", *encoders.split(), *folders, "--workers", "0"]
    return [*command, "--device", "cpu", *flags]


def test_sizes_become_one_curve_and_finished_ones_are_not_measured_again(
    data: Path, tmp_path: Path, ran: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep"

    def swept(*sizes: str) -> dict[str, Any]:
        assert sweep.main(["--output", str(output), "--sizes", *sizes, "--", *tool(data)]) == 0
        found: dict[str, Any] = json.loads((output / "results.json").read_text())
        return found

    table = swept("48", "32")
    assert ran == [32, 48] and table["measure"] == "accuracy" and table["grids"] == {"32": [2, 2], "48": [3, 3]}
    assert "encoder colour | accuracy | 32 " in capsys.readouterr().out
    for row in table["encoders"]:
        for size, score in row["scores"].items():
            single = json.loads((output / f"size-{size}" / "results.json").read_text())
            (same,) = (one for one in single["encoders"] if one["settings"]["encoder"] == row["settings"]["encoder"])
            assert same["accuracy"] == score and same["settings"]["fingerprint"] == row["settings"]["fingerprint"]
            assert same["settings"]["size"] == int(size)
    with Image.open(output / "results.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    assert swept("32", "48", "64")["encoders"][1]["scores"].keys() == {"32", "48", "64"} and ran == [32, 48, 64]
    shown, one = (report_parts.results([place], tmp_path).blocks[0] for place in (output, output / "size-32"))
    assert shown.table is not None and shown.table.columns == ["encoder", "32 px", "48 px", "64 px"]
    assert one.table is not None and one.table.columns == ["encoder", "accuracy", "neighbours", "held out accuracy"]
    assert shown.facts["measure"] == one.facts["measure"] == "accuracy" and one.facts["classes"] == "3"
    measure, scores = library.collect(output, [32, 64], "settings.size")
    assert measure == "settings.size" and scores["colour"] == {32: 32, 64: 64}


def test_a_tool_that_fails_ends_the_sweep_and_the_same_command_continues(
    data: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--output", str(tmp_path), "--sizes", "32", "48", "--", *tool(data, encoders="colour")]
    working = sweep._run
    monkeypatch.setattr(sweep, "_run", lambda words: 3 if "48" in words else working(words))
    assert sweep.main(command) == 3 and "size 48: the tool ended with status 3" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["encoders"][0]["scores"].keys() == {"32"}
    monkeypatch.setattr(sweep, "_run", working)
    assert sweep.main(command) == 0 and ran == [32, 48]
    monkeypatch.setattr(sweep, "_run", None)
    other = [*command[:6], *tool(data, "--seed", "1", encoders="colour")]
    assert sweep.main(other) == 2 and "holds a sweep of another command" in capsys.readouterr().err
    facts = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**facts, "fingerprints": {"colour": "0"}}))
    assert sweep.main(command) == 2 and "other weights of the encoders" in capsys.readouterr().err


def _words(*flags: str, encoders: str = "colour") -> Callable[[Path], list[str]]:
    return lambda data: ["--", *tool(data, *flags, encoders=encoders)]


BAD: dict[str, tuple[list[str], Callable[[Path], list[str]], str]] = {
    "no tool": ([], lambda data: [], "-- TOOL: is missing"),
    "no such tool": ([], lambda data: ["--", "tools/nothing.py"], "names no tool that exists"),
    "a tool without sizes": ([], lambda data: ["--", sweep.__file__], "has no --size or --image-size"),
    "a size of the user": ([], _words("--size", "32"), "--size: the sweep sets it"),
    "an output of the user": ([], _words("--output=x"), "--output: the sweep sets it"),
    "a wrong flag of the tool": ([], _words("--hed", "knn"), "unknown flag --hed"),
    "no such encoder": ([], _words(encoders="nowhere"), "--encoder nowhere: no such folder"),
    "a size without whole patches": (
        ["--sizes", "32", "40"],
        _words(),
        "--encoder colour: an image of 40 x 40 pixels has no whole number of 16 x 16 patches",
    ),
    "a misspelt measure": (
        ["--measure", "precision"],
        _words(),
        "--measure precision: tools/probe.py classify has no such",
    ),
    "a tool that measures nothing": (
        [],
        lambda data: ["--", str(Path(PROBE).with_name("extract_features.py")), str(data), "--load", "colour"],
        "-- tools/extract_features.py: measures no encoder",
    ),
    "a measure that is not asked for": (
        ["--measure", "attributes.word"],
        lambda data: ["--", str(Path(PROBE).with_name("zeroshot.py")), "captions", "x.tar", "--load", "colour"],
        "--measure attributes.word: add --attributes",
    ),
    "size 0": (["--sizes", "0"], _words(), "--sizes 0: must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_runs_if_something_is_wrong(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words, message = BAD[case]
    monkeypatch.setattr(sweep, "_run", None)
    try:
        status = sweep.main(["--output", str(tmp_path / "out"), *flags, *words(data)])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_encoder_of_one_size_is_refused_before_anything_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Aimv2VisionConfig(image_size=32, patch_size=16, use_head=False, **sizes)
    Aimv2VisionModel(config).save_pretrained(tmp_path / "aimv2")
    monkeypatch.setattr(sweep, "_run", None)
    words = ["--output", str(tmp_path / "out"), "--sizes", "32", "48", "--"]
    assert sweep.main([*words, *tool(data, encoders=str(tmp_path / "aimv2"))]) == 2
    assert "this AIMv2 has learned positions only for 32 x 32" in capsys.readouterr().err


def test_a_list_counts_as_its_mean_and_image_modes_are_fixed(tmp_path: Path) -> None:
    folder = library.size_folder(tmp_path, 32)
    folder.mkdir()
    row = {"name": "so16", "mass": {"image": {"first": [0.25, None, 0.75]}}}
    (folder / "attention.json").write_text(json.dumps({"models": [row]}))
    assert library.collect(tmp_path, [32, 48], "") == ("mass.image.first", {"so16": {32: 0.5}})
    with pytest.raises(ValueError, match=r"--measure mass\.none: .* has no such number"):
        library.collect(tmp_path, [32], "mass.none")
    attention = str(Path(PROBE).with_name("attention.py"))
    options, setting = sweep.tool_options([attention, "photos", "--load", "a", "b"], 32)
    assert setting == ["--image-mode", "fixed", "--image-size"] and options.load == ["a", "b"]
    assert options.image_size == 32 and options.image_mode == "fixed"


@pytest.mark.parametrize(
    ("tool", "task", "good", "bad"),
    [
        ("zeroshot.py", "classify", "accuracies.bytes.none", "accuracies.bytes"),
        ("zeroshot.py", "captions", "attributes.word", "word"),
        ("perplexity.py", "", "ppl1_without_image", "ppl"),
        ("attention.py", "", "mass.generated.image", "mass.generated.imge"),
    ],
)
def test_measures_are_checked_by_tool(tool: str, task: str, good: str, bad: str) -> None:
    library.check_measure(tool, task, good)
    with pytest.raises(ValueError, match=f"--measure {bad}: .*Allowed are .*{good if tool == 'attention.py' else ''}"):
        library.check_measure(tool, task, bad)
    library.check_measure("someones.py", "", bad)


@pytest.mark.slow
def test_the_tool_runs_as_a_process_of_its_own(data: Path, tmp_path: Path) -> None:
    assert sweep.main(["--output", str(tmp_path), "--sizes", "32", "48", "--", *tool(data, encoders="colour")]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["encoders"]
    assert row["scores"].keys() == {"32", "48"}
