"""Scores through tools/zeroshot.py equal full passes, and its figures equal those computed by hand from them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from genlip_megatron.data.index import write_index
from genlip_megatron.data.scan import build_index
from genlip_megatron.evaluate import image_scores, report_parts, zero_shot
from genlip_megatron.evaluate.confusion import confusion_picture
from genlip_megatron.evaluate.likelihood import LikelihoodScorer
from genlip_megatron.hf.image_processing_genlip import GenLIPImageProcessor
from genlip_megatron.hf.modeling_genlip import GenLIPForCausalLM
from genlip_megatron.tokenizer import load_tokenizer
from tests.data.shards import write_shard
from tests.hf.models import export, tiny
from tests.infer.conftest import tool as tool
from tests.plugging.conftest import byte_tokenizer
from tools.zeroshot import main

Tool = Callable[..., str]
NAMES = ["cat", "old dog", "elk", "a very long-legged bird"]
TEMPLATES = ["a {}.", "{}"]
TEXTS = ["a cat.", "cat", "a old dog.", "old dog", "a elk.", "elk", "a a very long-legged bird.",
         "a very long-legged bird"]  # fmt: skip
PROMPT = "What?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported GenLIP with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(folder / "bytes.json")
    sizes = tiny(vocab_size=257)
    return export(folder / "model", folder / "bytes.json", sizes, image_mode="fixed", image_size=32, prompt=PROMPT)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(7)]


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def full_passes(model: Path, pictures: list[Image.Image] | None, texts: list[str], end: bool = False) -> Tensor:
    """float32 [images or 1, texts]: one pass for each image and text, by transformers only."""
    network, processor = GenLIPForCausalLM.from_pretrained(model).eval(), GenLIPImageProcessor.from_pretrained(model)
    tokenizer = load_tokenizer(model / "tokenizer.json")
    prompt = tokenizer.encode(PROMPT)
    scores = []
    for picture in pictures or [None]:
        pixels = {} if picture is None else {"pixel_values": processor(picture, return_tensors="pt")["pixel_values"]}
        for text in texts:
            ids = tokenizer.encode(text) + (tokenizer.closing_ids[:1] if end else [])
            with torch.inference_mode():
                logits = network(torch.tensor([prompt + ids]), **pixels).logits[0, len(prompt) - 1 : -1]
            scores.append(float(logits.log_softmax(dim=-1)[range(len(ids)), ids].sum()))
    return torch.tensor(scores).view(-1, len(texts))


@pytest.fixture(scope="module")
def naive(model: Path, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """(likelihoods [images, texts], those without image [texts])."""
    return full_passes(model, pictures, TEXTS), full_passes(model, None, TEXTS)[0]


def by_hand(naive: tuple[Tensor, Tensor], normalise: str, prior: str) -> Tensor:
    """[images, classes]."""
    likelihoods, blind = naive
    lengths = torch.tensor([1.0 if normalise == "none" else float(len(text)) for text in TEXTS])  # a token is a byte
    if prior == "no-image":
        likelihoods = likelihoods - blind
    if prior == "shuffled":
        likelihoods = likelihoods - likelihoods.double().exp().mean(dim=0).log().float()
    scores = likelihoods / lengths
    return torch.stack([(scores[:, 2 * c] + scores[:, 2 * c + 1]) / 2 for c in range(4)], dim=1)


@pytest.fixture(scope="module")
def data(
    naive: tuple[Tensor, Tensor], pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor]:
    """(folder with a shard of the pictures, the texts of the classes and templates; the labels). Every picture has the
    class that wins by tokens without a prior."""
    folder = tmp_path_factory.mktemp("data")
    labels = by_hand(naive, "tokens", "none").argmax(dim=1)
    assert len(labels.unique()) > 1
    members = {}
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        members |= {f"{number}.png": png(picture), f"{number}.cls": str(label).encode()}
    write_shard(folder / "val.tar", members)
    (folder / "names.json").write_text(json.dumps(NAMES))
    (folder / "templates.json").write_text(json.dumps(TEMPLATES))
    return folder, labels


def classify(folder: Path, model: Any, output: Path, *more: Any) -> list[Any]:
    names, templates = folder / "names.json", folder / "templates.json"
    words = [folder / "val.tar", "--class-names", names, "--template", templates, "--output", output, "--load", model]
    return ["classify", *words, *more]


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_the_right_class_wins_and_every_figure_is_that_of_full_passes(
    tool: Tool, model: Path, data: tuple[Path, Tensor], naive: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    folder, labels = data
    output = tmp_path / "out"
    said = tool(main, *classify(folder, model, output, f"random:{model}", "--batch-size", 3))
    assert "accuracy 100.0%" in said
    trained, control = results(output)["encoders"]
    assert control["settings"]["fingerprint"] != trained["settings"]["fingerprint"]
    for normalise in ("tokens", "none", "bytes"):
        for prior in ("none", "no-image", "shuffled"):
            right = by_hand(naive, normalise, prior).argmax(dim=1) == labels
            assert trained["accuracies"][normalise][prior] == pytest.approx(right.double().mean().item())
    assert trained["accuracy"] == trained["accuracies"]["tokens"]["none"] == 1.0
    assert results(output)["versions"]["torch"] and results(output)["command"]
    assert trained["settings"]["prompt"] == PROMPT and trained["settings"]["images"]["image_mode"] == "fixed"
    for name in ("results.png", "confusion.png"):
        assert min(Image.open(output / name).size) > 100
    kept = [np.load(file) for file in (output / "scores").glob("*.npy")]
    assert min(np.abs(scores - naive[0].numpy()).max() for scores in kept) < 1e-4


def test_the_end_token_is_part_of_the_text(
    tool: Tool, model: Path, data: tuple[Path, Tensor], pictures: list[Image.Image], tmp_path: Path
) -> None:
    tool(main, *classify(data[0], model, tmp_path / "out", "--end-token"))
    (kept,) = (np.load(file) for file in (tmp_path / "out" / "scores").glob("*.npy"))
    np.testing.assert_allclose(kept[:2], full_passes(model, pictures[:2], TEXTS, end=True), rtol=0, atol=1e-4)


def test_a_killed_run_continues_and_other_choices_need_no_model(
    tool: Tool,
    model: Path,
    data: tuple[Path, Tensor],
    naive: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_scores, "PART", 2)
    scored: list[int] = []
    stop_after = 2
    whole = LikelihoodScorer.__call__

    def counted(self: LikelihoodScorer, images: Any) -> Tensor:
        if len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(LikelihoodScorer, "__call__", counted)
    words = classify(data[0], model, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        main([str(word) for word in words])
    assert not (tmp_path / "out" / "results.json").exists()
    finished = sorted((tmp_path / "out" / "scores").glob("*"))
    assert [file.suffix for file in finished] == [".npy"] * 2
    finished[0].write_bytes(finished[0].read_bytes()[:-9])  # as a damaged disk leaves it
    scored, stop_after = [], 99
    tool(main, *words)
    assert sum(scored) == 5  # of 7: one part of two images was kept
    assert results(tmp_path / "out")["encoders"][0]["accuracy"] == 1.0
    scored = []
    tool(main, *words, "--normalise", "none", "--prior", "shuffled")
    assert not scored
    right = by_hand(naive, "none", "shuffled").argmax(dim=1) == data[1]
    assert results(tmp_path / "out")["encoders"][0]["accuracy"] == pytest.approx(right.double().mean().item())
    tool(main, *words, "--prompt", "Other?")
    assert sum(scored) == 7


@pytest.fixture(scope="module")
def captioned(model: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed shard of four pictures; two of them have the same caption."""
    folder = tmp_path_factory.mktemp("captioned")
    captions = ["a cat.", "old dog", "elk", "a cat."]
    members: dict[str, bytes] = {}
    for number, caption in enumerate(captions):
        members |= {f"{number}.png": png(pictures[number]), f"{number}.txt": caption.encode()}
    write_shard(folder / "val.tar", members)
    write_index(build_index(str(folder / "val.tar"), load_tokenizer(model / "tokenizer.json"), PROMPT))
    return folder / "val.tar"


def test_recall_of_captions_is_that_of_full_passes(
    tool: Tool, model: Path, captioned: Path, naive: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    tool(main, "retrieve", captioned, "--load", model, "--output", tmp_path / "out", "--prior", "no-image")
    texts = ["a cat.", "old dog", "elk"]
    columns = [TEXTS.index(text) for text in texts]
    scores = (naive[0][:4, columns] - naive[1][columns]) / torch.tensor([float(len(text)) for text in texts])
    to_text = sum(int(scores[i].argmax()) == own for i, own in enumerate((0, 1, 2, 0))) / 4
    to_image = sum(int(scores[:, t].argmax()) in own for t, own in enumerate(((0, 3), (1,), (2,)))) / 3
    (row,) = results(tmp_path / "out")["encoders"]
    assert (row["image_to_text"], row["text_to_image"]) == pytest.approx((to_text, to_image))
    assert row["recalls"]["tokens"]["no-image"]["image_to_text"] == row["image_to_text"]
    assert (tmp_path / "out" / "results.png").exists()
    block = report_parts.results([tmp_path / "out"], tmp_path).blocks[0]
    assert block.table is not None and block.facts["prior"] == "no-image" and block.facts["images"] == "4"
    assert block.table.columns == ["encoder", "recall at 1", "image to text", "text to image"]


def test_the_best_candidate_is_that_of_full_passes(
    tool: Tool, model: Path, pictures: list[Image.Image], naive: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    candidates = [TEXTS[:3], TEXTS[1:], TEXTS[2:4]]
    lines = []
    for number, texts in enumerate(candidates):
        pictures[number].save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"path": str(tmp_path / f"{number}.png"), "candidates": texts}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    words = ["select", tmp_path / "list.jsonl", "--load", model, "--output", tmp_path / "out"]
    tool(main, *words, "--normalise", "bytes", "--prior", "no-image")
    (model_row,) = results(tmp_path / "out")["encoders"]
    rows = [json.loads(line) for line in (tmp_path / "out" / model_row["file"]).read_text().splitlines()]
    for number, (row, texts) in enumerate(zip(rows, candidates, strict=True)):
        columns = [TEXTS.index(text) for text in texts]
        likelihoods, blind = naive[0][number, columns], naive[1][columns]
        torch.testing.assert_close(torch.tensor(row["log_likelihoods"]), likelihoods, rtol=0, atol=1e-4)
        expected = (likelihoods - blind) / torch.tensor([float(len(text)) for text in texts])
        torch.testing.assert_close(torch.tensor(row["scores"]), expected, rtol=0, atol=1e-4)
        assert row["best"] == texts[int(expected.argmax())] and row["candidates"] == texts


def test_priors_and_lengths_by_hand() -> None:
    likelihoods = torch.tensor([[0.5, 0.2], [0.25, 0.4]]).log()
    texts = zero_shot.Texts(["é", "bb"], [[1, 2, 3], [4]], 1)
    blind = torch.tensor([0.5, 0.1]).log()
    scores = zero_shot.class_scores(likelihoods, blind, texts, "none", "no-image")
    torch.testing.assert_close(scores, torch.tensor([[1.0, 2.0], [0.5, 4.0]]).log())
    scores = zero_shot.class_scores(likelihoods, blind, texts, "none", "shuffled")
    torch.testing.assert_close(scores, torch.tensor([[0.5 / 0.375, 0.2 / 0.3], [0.25 / 0.375, 0.4 / 0.3]]).log())
    for normalise, lengths in (("tokens", [3.0, 1.0]), ("bytes", [2.0, 2.0]), ("none", [1.0, 1.0])):
        scores = zero_shot.class_scores(likelihoods, blind, texts, normalise, "none")
        torch.testing.assert_close(scores, likelihoods / torch.tensor(lengths))


def test_recall_of_a_text_counts_each_of_its_images() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    assert zero_shot.recall_at_1(scores, torch.tensor([0, 0, 1])) == {"image_to_text": 1.0, "text_to_image": 1.0}
    found = zero_shot.recall_at_1(scores, torch.tensor([0, 1, 0]))
    assert found == {"image_to_text": pytest.approx(1 / 3), "text_to_image": 0.0}


def test_names_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    assert zero_shot.read_names(None, ["tree_frog", "elk"]) == ["tree frog", "elk"]
    file.write_text('{"n1": "cat", "n2": "dog", "n3": "elk"}')
    assert zero_shot.read_names(file, ["n3", "n1"]) == ["elk", "cat"]
    with pytest.raises(ValueError, match="no name for class n4"):
        zero_shot.read_names(file, ["n1", "n4"])
    file.write_text('["cat", "dog", "elk"]')
    assert zero_shot.read_names(file, ["0", "1"]) == ["cat", "dog", "elk"]
    with pytest.raises(ValueError, match="expected 2 texts"):
        zero_shot.read_names(file, ["a", "b"])
    file.write_text('["cat", "dog", "cat"]')
    with pytest.raises(ValueError, match="classes 0 and 2 have the same text, 'cat'"):
        zero_shot.read_names(file, ["a", "b", "c"])


def test_a_picture_of_many_classes_leaves_out_their_names() -> None:
    counts = torch.eye(100, dtype=torch.int64)
    assert confusion_picture(counts, [f"class {i}" for i in range(100)], "x" * 90).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def encoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of the encoder only, and an encoder of transformers."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from genlip_megatron.hf.modeling_genlip import GenLIPVisionModel

    folder = tmp_path_factory.mktemp("encoders")
    GenLIPVisionModel(GenLIPForCausalLM.from_pretrained(model).config).save_pretrained(folder / "only")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(folder / "siglip")
    return {"only": folder / "only", "siglip": folder / "siglip"}


def test_a_model_without_a_language_head_is_refused(
    tool: Tool, data: tuple[Path, Tensor], encoder: dict[str, Path], tmp_path: Path
) -> None:
    for name, message in (
        (encoder["only"], "only a vision encoder"),
        (encoder["siglip"], "only a vision encoder"),
        (f"random:{encoder['only']}", "only a vision encoder"),
        ("hf:google/siglip", "only GenLIP has a language head"),
        ("nowhere", "no such folder"),
    ):
        line = tool(main, *classify(data[0], name, tmp_path / "out"), status=2)
        assert f"--load {str(name).removeprefix('random:')}: {message}" in line


def test_bad_settings_and_files_are_one_line(
    tool: Tool, model: Path, data: tuple[Path, Tensor], captioned: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    folder, _ = data
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("mine")
    shown = tmp_path / "0.png"
    pictures[0].save(shown)
    lists = {
        "broken": "{",
        "alone": json.dumps({"path": str(shown), "candidates": ["a"]}),
        "lost": json.dumps({"path": "no.png", "candidates": ["a", "b"]}),
        "shape": json.dumps({"path": str(shown), "candidates": "a"}),
        "control": json.dumps({"path": str(shown), "candidates": ["a", "<|im_end|>"]}),
        "empty": "",
    }
    for name, content in lists.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    out = tmp_path / "out"
    words = [*classify(folder, model, out)]
    unnamed = ["classify", folder / "val.tar", "--load", model, "--output", out]
    select = ["--load", model, "--output", out]
    for arguments, message in (
        (unnamed, "--class-names: missing, and the classes of DATA are called 0, 1"),
        ([*unnamed, "--class-names", tmp_path / "bad.json"], "expected"),
        ([*unnamed, "--class-names", tmp_path / "no.json"], "cannot be read"),
        ([*words, "--template", "a photo"], "needs one {}"),
        ([*words, "--template", tmp_path / "bad.json"], "needs one {}"),
        ([*words, "--template", "{} <|im_end|>"], "text = 'cat <|im_end|>': it spells the control token"),
        ([*words, "--prompt", ""], "--prompt '': it is empty"),
        ([*words, "--batch-size", 0], "--batch-size 0: must be at least 1"),
        ([*words, "--per-class", -1], "--per-class -1: must be at least 0"),
        ([*words, "--prior", "wrong"], "--prior"),
        ([*words, "--image-mode", "native", "--image-size", 64], "needs --image-mode fixed"),
        ([*words, "--device", "tpu"], "--device tpu: cannot be used"),
        ([*words, "--load", model, model], "two of the same name"),
        ([*words, "--output", tmp_path / "bad.json"], "it is a file"),
        ([*words, "--output", tmp_path / "foreign"], "this command did not write it"),
        (["classify", tmp_path / "nowhere", "--load", model, "--output", out], "no such folder or table"),
        (["retrieve", shown, *select], "an image file has no caption"),
        (["retrieve", captioned, "--limit", 1, *select], "only one caption"),
        (["select", tmp_path / "none.jsonl", *select], "cannot be read"),
        (["select", tmp_path / "broken.jsonl", *select], "line 1 is not JSON"),
        (["select", tmp_path / "alone.jsonl", *select], "1 candidates. A choice needs two or more"),
        (["select", tmp_path / "lost.jsonl", *select], "no.png: no such file"),
        (["select", tmp_path / "shape.jsonl", *select], "line 1: expected"),
        (["select", tmp_path / "control.jsonl", *select], "control token"),
        (["select", tmp_path / "empty.jsonl", *select], "no lines"),
        (["select", tmp_path / "control.jsonl", *select, "--prior", "shuffled"], "shuffled"),
    ):
        assert message in tool(main, *arguments, status=2)


def test_an_image_that_cannot_be_used_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: list[Image.Image]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        pictures[0].save(tmp_path / "data" / name / "0.png")
    bad = tmp_path / "data" / "dog" / "1.png"
    bad.write_bytes(b"this is no image")
    words = ["classify", str(tmp_path / "data"), "--load", str(model), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert line.count(str(bad)) == 1 and "does not decode" in line and "Replace or remove this image" in line
    bad.unlink()
    assert main(words) == 0
