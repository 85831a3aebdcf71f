"""``tools/perplexity.py``: a comparison, its sources of data, and every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import perplexity
import pytest
from PIL import Image

pytest.importorskip("transformers")

from genlip_megatron.encoders.interface import Encoder
from genlip_megatron.evaluate import report_parts, sweep
from genlip_megatron.evaluate.dialogues import read_dialogues
from tests.evaluate.tiny_llm import write_llm, write_scenes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scenes.csv`` and ``scenes.json`` with images, and ``llm``."""
    root = write_scenes(tmp_path_factory.mktemp("data"), 24)
    write_llm(root / "llm")
    return root


def words(data: Path, *flags: str, encoder: str = "colour", size: str = "32") -> list[str]:
    fixed = ["--encoder", *encoder.split(), "--size", size, "--workers", "0", "--device", "cpu", "--max-steps", "2"]
    where = ["--llm", str(data / "llm"), "--data", str(data / "scenes.csv"), "--val-fraction", "0.25"]
    return [*fixed, *where, "--batch-size", "6", *flags]


@pytest.mark.slow
def test_a_comparison_is_one_table_and_one_picture(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    flags = ("--data2", str(data / "scenes.json"), "--output", str(output))
    command = words(data, *flags, encoder="colour pixels")
    assert perplexity.main(command) == 0
    printed = capsys.readouterr()
    assert "shuffled" in printed.out and printed.out.count("PPL2") == 2 and "00:00" in printed.err
    table = json.loads((output / "results.json").read_text())
    assert [row["settings"]["encoder"] for row in table["encoders"]] == ["colour", "pixels"]
    assert table["visual_tokens"] == 4 and table["command"] and "torch" in table["versions"]
    assert table["data2"]["samples"] == 24 and table["data2"]["samples_without_image"] == 1
    first, second = ([row["stages"][stage] for row in table["encoders"]] for stage in ("ppl1", "ppl2"))
    assert all(len(result["settings"]["fingerprint"]) == 32 for result in first + second)
    for key in ("tokens", "answer_bytes", "steps"):
        assert first[0][key] == first[1][key] and second[0][key] == second[1][key]
    for key in ("ppl1 training data", "ppl1 held-out data", "llm_fingerprint"):
        assert first[0]["settings"][key] == first[1]["settings"][key]
    assert first[0]["without_image"] != first[1]["image"]
    with Image.open(output / "results.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
    monkeypatch.setattr(Encoder, "encode", None)  # finished encoders are not measured again
    assert perplexity.main(command) == 0
    assert json.loads((output / "results.json").read_text())["encoders"] == table["encoders"]
    assert perplexity.main([*command, "--lr1", "0.1"]) == 2
    assert "another ppl1 learning rate, 0.001, not 0.1" in capsys.readouterr().err


def test_a_report_and_a_sweep_read_the_results(data: Path, tmp_path: Path) -> None:
    output = sweep.size_folder(tmp_path, 32)
    flags = ("--ppl1-only", "--max-steps", "1", "--output", str(output))
    assert perplexity.main(words(data, *flags)) == 0
    table = json.loads((output / "results.json").read_text())
    (row,) = table["encoders"]
    assert table["measure"] == "ppl1" and row["ppl1"] == row["stages"]["ppl1"]["image"]["perplexity"]
    assert row["settings"]["encoder"] == "colour" and len(row["settings"]["fingerprint"]) == 32
    assert row["ppl1_shuffled"] > 0 and row["ppl1_without_image"] > 0
    assert sweep.collect(tmp_path, [32], "") == ("ppl1", {"colour": {32: row["ppl1"]}})
    block = report_parts.results([output], tmp_path).blocks[0]
    assert block.table is not None and block.facts["llm"] == str(data / "llm")
    shown = dict(zip(block.table.columns, block.table.rows[0], strict=True))
    assert row["ppl1_bits_per_byte"] == row["stages"]["ppl1"]["image"]["bits_per_byte"]
    scores = {name: f"{value:.4g}" for name, value in row.items() if name.startswith("ppl1")}
    assert shown == {"encoder": "colour", **{name.replace("_", " "): value for name, value in scores.items()}}


def test_the_defaults_are_the_papers() -> None:
    flags = ["--encoder", "x", "--llm", "x", "--data", "x", "--output", "x"]
    options = perplexity.build_parser().parse_args(flags)
    assert (options.lr1, options.lr2, options.batch_size, options.epochs) == (1e-3, 1e-5, 128, 1)


def test_indexed_shards_and_llava_files_are_read(demo_data: Path, data: Path) -> None:
    found, without = read_dialogues([str(demo_data / "val-00000.tar")], "--data")
    assert without == 0 and all(turns[-1][1] for turns in (dialogue.turns for dialogue in found))
    assert found[0].image.read().mode == "RGB" and len({dialogue.image.stamp for dialogue in found}) == len(found)
    found, without = read_dialogues([str(data / "scenes.json")], "--data")
    assert without == 1
    assert found[0].turns[:2] == [("Which colour?", False), ("red", True)]
    assert found[0].image.stamp == read_dialogues([str(data / "scenes.csv")], "--data")[0][0].image.stamp


def _base(root: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(root / "llm").save_pretrained(root / "base")
    shutil.copytree(root / "llm", root / "llm2")
    shutil.rmtree(root / "llm")
    shutil.copytree(root / "base", root / "llm")
    for path in (root / "llm2").glob("token*"):
        shutil.copy(path, root / "llm")


def _other(kind: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        import transformers

        if kind == "Bert":  # a masked language model, which transformers can load as a causal one
            config: Any = transformers.BertConfig(
                vocab_size=400,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                initializer_range=0.5,
            )
            transformers.BertLMHeadModel(config).save_pretrained(root / "llm")
        else:
            transformers.CLIPVisionConfig().save_pretrained(root / "llm")

    return change


def _no_tokenizer(root: Path) -> None:
    for path in (root / "llm").glob("*token*"):
        path.unlink()


def _without(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def _text(name: str, text: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(text)


CAPTIONED = "image,caption\n0.png,A cat.\n"
BAD = {
    "no tokenizer": (_no_tokenizer, (), "--llm llm: no tokenizer. Copy the tokenizer files"),
    "no language head": (_base, (), "not a causal language model, or its weights are incomplete: they lack lm_head"),
    "a vision model": (_other("CLIP"), (), "model_type 'clip_vision_model' is not a causal language model"),
    "a masked language model": (_other("Bert"), (), "not a causal language model: a token sees those after it"),
    "no such LLM": (None, ("--llm", "nowhere"), "--llm nowhere: cannot be opened"),
    "a hub name offline": (None, ("--llm", "Qwen/Qwen2.5-0.5B"), "Without a network, name a folder"),
    "damaged weights": (_text("llm/model.safetensors", "x"), (), "--llm llm: its weights cannot be loaded"),
    "no data": (None, ("--data", "none.csv"), "--data none.csv: no such file"),
    "an empty table": (_text("scenes.csv", "image,caption\n"), (), "--data scenes.csv: no sample with an image"),
    "an empty file": (_text("scenes.csv", ""), (), "--data scenes.csv: cannot be read as .csv: the file is empty"),
    "no caption column": (None, ("--caption-column", "text"), "neither conversations nor a column text, only image"),
    "no image column": (None, ("--image-column", "file"), "no column file, only image, caption"),
    "an empty caption": (_text("scenes.csv", "image,caption\n0.png,\n"), (), "scenes.csv: row 1: caption is empty"),
    "missing images": (_without("3.png", "4.png"), (), "2 of 24 images do not exist, the first is 3.png"),
    "shards without an index": (_text("a.tar", "x"), ("--data", "a.tar"), "--data "),
    "images without captions": (None, ("--data", "."), "0.png has no caption. Name a table or indexed .tar shards"),
    "too few samples": (None, ("--batch-size", "20"), "too few samples, 18 to train on, for --batch-size 20"),
    "too few held out": (None, ("--val-fraction", "0.01"), "--val-fraction 0.01: fewer than 2 held-out images"),
    "too few in --val": (_text("val.csv", CAPTIONED), ("--val", "val.csv"), "--val: fewer than 2 held-out images"),
    "no room for text": (None, ("--seq-length", "5"), "--data: no sample has at most 1 text tokens"),
    "unequal grids": (None, ("--encoder", "colour", "pixels", "--size", "32", "64"), "unequal grids of patches"),
    "a size without whole patches": (None, ("--size", "40"), "no whole number of 16 x 16 patches"),
    "no such encoder": (None, ("--encoder", "nowhere"), "--encoder nowhere: no such folder"),
    "an encoder twice": (None, ("--encoder", "colour", "colour"), "two of the same name"),
    "a learning rate of 0": (None, ("--lr2", "0"), "--lr2 0.0: must be above 0"),
    "a fraction of 1": (None, ("--val-fraction", "1"), "--val-fraction 1.0: must be above 0 and below 1"),
    "fp16": (None, ("--dtype", "fp16"), "--dtype fp16: gradients would underflow"),
    "data2 without PPL2": (None, ("--data2", "scenes.json", "--ppl1-only"), "--data2: is of PPL2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_feature_is_computed(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, flags, message = BAD[case]
    shutil.copytree(data, tmp_path / "data", copy_function=os.link if change is None else shutil.copy)
    if change is not None:
        change(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(Encoder, "encode", None)
    capsys.readouterr()
    assert perplexity.main(words(Path(), "--output", str(tmp_path / "out"), *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("perplexity.py: error: ") and message in error


@pytest.mark.slow
def test_ranks_share_the_work(data: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, perplexity.__file__, *words(data, "--lr2", "1e-3", "--output", str(output))]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
        (row,) = json.loads((output / "results.json").read_text())["encoders"]
        found.append([row[name] for name in ("ppl1", "ppl1_shuffled", "ppl2", "ppl2_shuffled")])
        assert row["stages"]["ppl2"]["tokens"] == row["stages"]["ppl1"]["tokens"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)
