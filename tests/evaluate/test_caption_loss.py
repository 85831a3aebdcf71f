"""``tools/zeroshot.py captions``: the loss is that of full passes, the attributes are those of the captions."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep
import torch
import zeroshot
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from genlip_megatron.evaluate import report_parts
from genlip_megatron.evaluate.attributes import attribute_accuracy, parse_attributes
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from genlip_megatron.infer.caption import Captioner
from genlip_megatron.infer.inputs import Inputs, ShardImage
from genlip_megatron.tokenizer import load_tokenizer
from tests.hf.models import export, tiny
from tests.infer.conftest import tool as tool
from tests.plugging.conftest import byte_tokenizer

Tool = Callable[..., str]
PROMPT = "What?"
Turns = list[tuple[str, bool]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported GenLIP with random weights and a tokenizer of bytes, for native sizes."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(folder / "bytes.json")
    sizes = {"image_mode": "native", "min_pixels": 1024, "max_pixels": 4096}
    return export(folder / "model", folder / "bytes.json", tiny(vocab_size=257), prompt=PROMPT, **sizes)


@pytest.fixture(scope="module")
def scenes(demo_data: Path) -> tuple[Path, list[Image.Image], list[str]]:
    """(an indexed shard, its first four images, their captions)."""
    shard = demo_data / "val-00000.tar"
    samples = [sample for sample in Inputs([str(shard)], 4) if isinstance(sample, ShardImage)]
    return shard, [Image.fromarray(sample.read()) for sample in samples], [sample.truth("") for sample in samples]


def by_hand(model: Path, images: list[Image.Image], texts: list[Turns], **sizes: Any) -> dict[str, float]:
    """Loss and bits per byte, from logits of one pass for each image and the tokens of its turns."""
    network = GenLIPForCausalLM.from_pretrained(model).eval()
    processor = GenLIPImageProcessor.from_pretrained(model, **sizes)
    tokenizer = load_tokenizer(model / "tokenizer.json")
    total, tokens, size = 0.0, 0, 0
    for image, turns in zip(images, texts, strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        for text, answer in [*turns, ("", True)]:
            new = tokenizer.encode(text) if text else tokenizer.closing_ids
            ids, learned = ids + new, learned + [answer] * len(new)
        pixels = processor(image, return_tensors="pt")
        with torch.inference_mode():
            shares = network(torch.tensor([ids]), **pixels).logits[0].log_softmax(dim=-1)
        places = [place for place, counts in enumerate(learned) if counts]
        total -= sum(float(shares[place - 1, ids[place]]) for place in places)
        tokens += len(places)
        size += sum(len(text.encode()) for text, answer in turns if answer)
    return {"loss": total / tokens, "bits_per_byte": total / size / math.log(2), "tokens": tokens}


def captioned(text: str) -> Turns:
    return [(PROMPT, False), (text, True)]


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "results.json").read_text())["encoders"]
    return found


def test_the_loss_of_a_shard_is_that_of_full_passes_and_attributes_are_those_of_all_captions(
    tool: Tool,
    model: Path,
    scenes: tuple[Path, list[Image.Image], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard, images, truths = scenes
    said = [truths[0], truths[1], truths[1], truths[0]]
    left = iter(said * 2)
    monkeypatch.setattr(Captioner, "text", lambda self, ids: next(left))
    flags = ["--attributes", "--max-new-tokens", 4, "--limit", 4, "--batch-size", 3, "--output", tmp_path / "out"]
    printed = tool(zeroshot.main, "captions", shard, "--load", model, f"random:{model}", *flags)
    expected = by_hand(model, images, list(map(captioned, truths)))
    trained, control = rows(tmp_path / "out")
    assert {name: trained[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert control["loss"] != trained["loss"] and control["tokens"] == trained["tokens"]
    share = attribute_accuracy(said, [parse_attributes(truth) for truth in truths])
    assert trained["attributes"] == pytest.approx(share) and 0 < share["word"] < 1
    assert f"loss {trained['loss']:.4f}" in printed and f"word {share['word']:.1%}" in printed
    (block, *_) = report_parts.results([tmp_path / "out"], tmp_path).blocks
    assert block.table is not None and block.facts["samples"] == "4"
    shown = dict(zip(block.table.columns, block.table.rows[0], strict=True))
    assert {"loss", "bits per byte", "attributes word"} < shown.keys() and shown["loss"] == f"{trained['loss']:.4g}"
    with Image.open(tmp_path / "out/results.png") as picture:
        assert picture.format == "PNG"


def test_tables_and_conversations_count_only_answers_and_changed_texts_are_scored_again(
    tool: Tool, model: Path, scenes: tuple[Path, list[Image.Image], list[str]], tmp_path: Path
) -> None:
    _, images, truths = scenes
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images[:2]):
        image.save(tmp_path / "images" / f"{number}.png")
    talk = [("human", "<image>\nColour?"), ("gpt", "Ångström."), ("human", "And?"), ("gpt", "No.")]
    record = {"image": "1.png", "conversations": [{"from": who, "value": text} for who, text in talk]}
    (tmp_path / "talk.json").write_text(json.dumps([record, {**record, "image": None}]))
    turns = [("Colour?", False), ("Ångström.", True), ("And?", False), ("No.", True)]
    inputs = [tmp_path / "table.csv", tmp_path / "talk.json"]
    words = ["captions", *inputs, "--image-folder", tmp_path / "images", "--load", model, "--output", tmp_path / "out"]
    for text in truths[:2]:
        with (tmp_path / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), ("0.png", text)])
        tool(zeroshot.main, *words, "--image-mode", "fixed", "--image-size", 48)
        sizes = {"image_mode": "fixed", "size": {"height": 48, "width": 48}}
        expected = by_hand(model, images[:2], [captioned(text), turns], **sizes)
        (row,) = rows(tmp_path / "out")
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "out/results.json").read_text())["samples_without_image"] == 1


def test_bad_settings_and_files_are_one_line(
    tool: Tool, model: Path, scenes: tuple[Path, list[Image.Image], list[str]], tmp_path: Path
) -> None:
    shard, images, _ = scenes
    images[0].save(tmp_path / "0.png")
    for name, text in (("cat", "A cat."), ("control", "A <|im_end|> cat."), ("lost", "A cat.")):
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{'1' if name == 'lost' else '0'}.png,{text}\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text('{"command": [], "task": "classify", "normalise": "none"}')
    for words, message in (
        ([tmp_path / "0.png"], "has no caption. Name a table or indexed .tar shards"),
        ([tmp_path / "lost.csv"], "1 of 1 images do not exist"),
        ([tmp_path / "control.csv"], "spells the control token '<|im_end|>'"),
        ([tmp_path / "cat.csv", "--attributes"], "0.png does not name one colour. Leave the flag out"),
        ([tmp_path / "cat.csv", "--caption-column", "text"], "neither conversations nor a column text"),
        ([shard, "--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
        ([shard, "--limit", -1], "--limit -1: must be at least 0"),
        ([shard, "--normalise", "none"], "unknown flag --normalise"),
        ([shard, "--output", tmp_path / "foreign"], "this command did not write it"),
    ):
        flags = ["--output", tmp_path / "out", "--load", model]
        assert message in tool(zeroshot.main, "captions", words[0], *flags, *words[1:], status=2)


@pytest.mark.slow
def test_a_sweep_gives_loss_and_attributes_against_size(
    model: Path, scenes: tuple[Path, list[Image.Image], list[str]], tmp_path: Path
) -> None:
    shard, images, truths = scenes
    tool = ["captions", str(shard), "--load", str(model), f"random:{model}", "--limit", "4", "--device", "cpu"]
    words = ["--", zeroshot.__file__, *tool, "--attributes", "--max-new-tokens", "2"]
    command = ["--output", str(tmp_path), "--sizes", "32", "48"]
    assert sweep.main([*command, *words]) == 0
    table = json.loads((tmp_path / "results.json").read_text())
    assert table["measure"] == "loss" and len(table["encoders"]) == 2
    for size in (32, 48):
        sizes = {"image_mode": "fixed", "size": {"height": size, "width": size}}
        expected = by_hand(model, images, list(map(captioned, truths)), **sizes)["loss"]
        assert table["encoders"][0]["scores"][str(size)] == pytest.approx(expected, rel=1e-5)
    # Another measure is read from the sizes that are finished.
    assert sweep.main([*command, "--measure", "attributes.word", *words]) == 0
    table = json.loads((tmp_path / "results.json").read_text())
    assert [row["scores"] for row in table["encoders"]] == [{"32": 0.0, "48": 0.0}] * 2
    block = report_parts.results([tmp_path], tmp_path).blocks[0]
    assert block.facts["measure"] == "attributes.word"
