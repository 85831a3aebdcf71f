"""The page of a data set shows the model's input, and text of the data never becomes markup."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from inspect_page import COLOURS, KINDS, block_shares, build_page
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from genlip_megatron.config import DEFAULT_PROMPT, from_dict
from genlip_megatron.data.loader import Loader
from genlip_megatron.data.scan import build_index
from genlip_megatron.data.text import tokenize_many
from genlip_megatron.model.mask import prefix_lm_mask
from genlip_megatron.tokenizer import END_OF_TURN, load_tokenizer
from tests.data.shards import write_shard
from tools import inspect_data

SIDE, SEQ_LENGTH = 48, 160
CAPTIONS = {
    "a": "A <script>alert('x')</script> & \"more\"\nthan that",
    "b": "Büffel 🐃 end",
    "c<b>": "a cat",
    "d": "the cat sat",
    "e": "at",
}


@dataclass
class Card:
    """A parsed section of the page."""

    title: str = ""
    images: list[np.ndarray] = field(default_factory=list)
    chips: list[tuple[str, str, list[str]]] = field(default_factory=list)  # kind, tooltip, texts
    bad: list[str] = field(default_factory=list)
    rects: list[tuple[str, int]] = field(default_factory=list)  # kind, width
    edges: int = 0


class Page(HTMLParser):
    """The parsed page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cards: list[Card] = []
        self.tags: set[str] = set()
        self._into: Callable[[str], None] | None = None
        self.feed(text)
        self.samples = [card for card in self.cards if not card.rects]
        self.packs = [card for card in self.cards if card.rects]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        kinds = values.get("class", "").split()
        self.tags.add(tag)
        if tag == "section":
            self.cards.append(Card())
        card = self.cards[-1] if self.cards else Card()
        if tag == "h3":
            self._into = lambda text: setattr(card, "title", card.title + text)
        elif tag == "img":
            content = base64.b64decode(values["src"].removeprefix("data:image/png;base64,"))
            card.images.append(np.asarray(Image.open(io.BytesIO(content)).copy()))
        elif "chip" in kinds:
            card.chips.append((kinds[1], values["title"], []))
        elif tag in ("small", "em") and card.chips:
            texts = card.chips[-1][2]
            texts.append("")
            self._into = lambda text: texts.append(texts.pop() + text)
        elif tag == "p" and kinds == ["bad"]:
            card.bad.append("")
            self._into = lambda text: card.bad.append(card.bad.pop() + text)
        elif tag == "rect":
            card.rects.append((kinds[0], int(values["width"])))
        elif tag == "path":
            card.edges += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h3", "small", "em", "p"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into(data)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An indexed shard of five good samples and one that does not decode, with a tokenizer of bytes and two merges."""
    vocab = {word: i for i, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "at", "cat"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "t"), ("c", "at")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TURN])
    backend.save(str(tmp_path / "tokenizer.json"))
    members = {}
    for key, caption in CAPTIONS.items():
        file = io.BytesIO()
        Image.fromarray(pixels_of(key)).save(file, "PNG")
        members |= {f"{key}.png": file.getvalue(), f"{key}.json": json.dumps({"caption": caption}).encode()}
    members |= {"broken.png": b"no image", "broken.json": b'{"caption": "x"}'}
    build_index(write_shard(tmp_path / "t.tar", members), load_tokenizer(tmp_path / "tokenizer.json"), DEFAULT_PROMPT)
    return tmp_path


def pixels_of(key: str) -> np.ndarray:
    """The image of a sample, already in its final size."""
    return np.random.default_rng(ord(key[0])).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def page(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Page]:
    """Run the tool on ``data``; later flags override earlier ones."""

    def run(*words: str) -> Page:
        command = ["inspect_data.py", "--output", str(data / "page.html")]
        command += ["--tokenizer", str(data / "tokenizer.json"), "--image-size", str(SIDE)]
        command += ["--seq-length", str(SEQ_LENGTH), str(data / "t.tar"), *words]
        monkeypatch.setattr(sys, "argv", command)
        if status := inspect_data.main():
            raise SystemExit(status)
        return Page((data / "page.html").read_text())

    return run


def loader(data: Path, packs: int, **flags: object) -> Loader:
    """The loader of training for the same settings."""
    section = {"train_data": [str(data / "t.tar")], "tokenizer": str(data / "tokenizer.json"), "image_size": SIDE}
    tree = {
        "model": {"drop_path_rate": 0.0},
        "data": {**section, "seq_length": SEQ_LENGTH, **flags},
        "train": {"global_batch_size": packs},
    }
    return Loader(from_dict(tree, "test"), "train")


def test_samples_and_packs_are_those_of_training(page: Callable[..., Page], data: Path) -> None:
    shown = page("--samples", "6", "--packs", "2")
    training = loader(data, 2)
    batches = [batch for batch, _ in zip(training, range(6), strict=False)]
    training.close()
    keys = [key for batch in batches for key in batch.keys]
    assert [card.title for card in shown.samples] == keys[:6]
    assert [card.title for card in shown.packs] == ["step 1, pack 1 of 2", "step 1, pack 2 of 2"]
    assert len({len(batch.keys) for batch in batches}) > 1, "the shown packs must have different numbers of samples"
    for card in shown.samples:
        (image,) = card.images
        assert (image == pixels_of(card.title)).all()


def test_a_recipe_gives_the_first_packs_of_its_run(page: Callable[..., Page], data: Path) -> None:
    training = loader(data, 5)
    recipe = data / "run.yaml"
    recipe.write_text(training.config.to_yaml())
    shown = page("--config", str(recipe), "--packs", "3", "--samples", "1")
    for lane, card in enumerate(shown.packs):
        assert card.title == f"step 1, pack {lane + 1} of 5"
        assert card.edges == len(training.plan.next_pack(lane)) - 1 + ("padding" in dict(card.rects))


def test_chips_show_tokens_loss_and_the_predicting_slot(page: Callable[..., Page], data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer.json")
    shown = page(*(word for key in CAPTIONS for word in ("--key", key)))
    assert [card.title for card in shown.samples] == list(CAPTIONS)
    patches = (SIDE // 16) ** 2
    for card in shown.samples:
        turns = [(DEFAULT_PROMPT, False), (CAPTIONS[card.title], True)]
        ((ids, loss),) = tokenize_many([turns], tokenizer)
        (image, _, texts), *chips = card.chips
        assert image == "image" and texts == [f"0-{patches - 1}", f"{patches} patches", "\xa0"]
        assert [int(re.findall(r"id (\d+)", title)[0]) for _, title, _ in chips] == ids
        assert [kind for kind, _, _ in chips] == ["answer" if predicted else "prompt" for predicted in loss]
        first = loss.index(True)
        for i, (_, title, (slot, _, row)) in enumerate(chips):
            assert int(slot) == patches + i
            assert f"T,H,W {','.join([str(SIDE // 16 + i)] * 3)}" in title
            shift = f"← {patches + i - 1}" if loss[i] else f"→ {patches + i + 1}" if i == first - 1 else "\xa0"
            assert row == shift
        text = "".join(text for _, _, (_, text, _) in chips)
        # Characters of several tokens: the last token shows the whole character.
        text = re.sub("�|#[0-9]+", "", text)
        caption = CAPTIONS[card.title].replace(" ", "·").replace("\n", "⏎")
        assert text == f"{DEFAULT_PROMPT.replace(' ', '·')}{caption}{END_OF_TURN}⏎"


def test_with_an_empty_prompt_the_image_predicts(page: Callable[..., Page], data: Path) -> None:
    build_index(str(data / "t.tar"), load_tokenizer(data / "tokenizer.json"), "")
    (card,) = page("--prompt", "", "--key", "d").samples
    assert card.chips[0][2][2] == "→ 9" and card.chips[1][2][2] == "← 8"


@pytest.mark.parametrize(("pixels", "tile"), [(SEQ_LENGTH, 16), (40, 16), (33, 512), (7, 1)])
def test_the_block_mask_is_the_averaged_dense_mask(pixels: int, tile: int, data: Path) -> None:
    training = loader(data, 1)
    batch = training.assemble([training.plan.next_pack(0)], 1)
    side = -(-SEQ_LENGTH // pixels)
    padded = torch.zeros((-(-SEQ_LENGTH // side) * side,) * 2)
    padded[:SEQ_LENGTH, :SEQ_LENGTH] = prefix_lm_mask(batch.sample_ids, batch.is_image).float()
    blocks = len(padded) // side
    dense = padded.reshape(blocks, side, blocks, side).mean((1, 3))
    assert len(batch.keys) > 1 and blocks <= pixels
    torch.testing.assert_close(block_shares(batch.sample_ids, batch.is_image, pixels, tile), dense)


def test_mask_pictures_and_layout_are_those_of_the_pack(page: Callable[..., Page], data: Path) -> None:
    (card,) = page("--samples", "1").packs
    training = loader(data, 1)
    batch = training.assemble([training.plan.next_pack(0)], 1)
    mask = prefix_lm_mask(batch.sample_ids, batch.is_image).numpy()
    whole, corner = card.images
    assert (whole == 255 * mask).all()

    two = int(batch.sample_starts[2]) if len(batch.keys) > 2 else int((batch.sample_ids >= 0).sum())
    crop = corner[-two:, -two:]
    images = np.broadcast_to(batch.is_image[:two].numpy(), crop.shape)
    assert ((crop == KINDS.index("image")) == (mask[:two, :two] & images)).all()
    assert ((crop == KINDS.index("answer")) == (mask[:two, :two] & ~images)).all()
    edges = np.repeat([kind for kind, _ in card.rects], [width for _, width in card.rects])[:two]
    assert [KINDS[kind] for kind in corner[0, -two:]] == [KINDS[kind] for kind in corner[-two:, 0]] == edges.tolist()

    widths = dict.fromkeys(KINDS, 0)
    for kind, width in card.rects:
        widths[kind] += width
    used = int(batch.image_lengths.sum()), int(batch.text_lengths.sum()), int(batch.loss_weights.sum())
    expected = {"image": used[0], "prompt": used[1] - used[2], "answer": used[2], "padding": SEQ_LENGTH - sum(used[:2])}
    assert widths == {**expected, "bad": 0} and len(COLOURS) == len(KINDS)


def test_bad_samples_are_shown_with_their_reason(page: Callable[..., Page], data: Path) -> None:
    recipe = data / "run.yaml"
    recipe.write_text(loader(data, 1, max_consecutive_failures=1).config.to_yaml())
    with open(data / "t.tar", "r+b") as file:
        content = file.read()
        file.seek(content.index(b"the cat sat"))
        file.write(b"The")
    shown = page("--config", str(recipe), "--key", "d", "--key", "e", "--key", "broken", "--packs", "3")
    bad, good, refused = shown.samples
    reason = "the caption's bytes changed since the index was made (crc32)"
    assert bad.bad == [f"Bad sample, carries no loss: {reason}"] and not good.bad
    assert {kind for kind, _, _ in bad.chips[1:]} == {"bad"} and {texts[2] for _, _, texts in bad.chips} == {"\xa0"}
    assert refused.title == "broken" and "never trained on: image does not decode" in refused.bad[0]
    packs = [card for card in shown.packs if card.bad]
    assert packs and all(card.bad == [f"d: {reason}"] * len(card.bad) and "bad" in dict(card.rects) for card in packs)


def test_text_of_the_data_never_becomes_part_of_the_page(page: Callable[..., Page], data: Path) -> None:
    shown = page("--samples", "8", "--packs", "2")
    text = (data / "page.html").read_text()
    assert not {"script", "link", "iframe", "object"} & shown.tags
    assert "c&lt;b&gt;" in text and "c<b>" not in text
    assert "http://" not in text and "https://" not in text and "url(" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples 0, --packs 1: must be at least 1"),
        (["--key", "nope"], "--key nope: no sample with this key in 1 shards"),
        (["--image-mode", "natve"], "flags: data.image_mode = 'natve': expected one of fixed, native"),
        (["--seq-length", "10"], "data.seq_length = 10: an image of 9 patches and its closing tokens do not fit"),
        (["--prompt", "Say it."], "was made with another prompt than data.prompt = 'Say it.'"),
        (["--tokenizer", "nope.json"], "data.tokenizer = 'nope.json': no such file"),
        (["--config", "so17"], "--config so17: no such recipe"),
        (["--pack", "3"], "unknown flag --pack. Did you mean '--packs'?"),
        (["nope.tar"], "nope.tar"),
        (["--output", "nope/page.html"], "--output nope/page.html: its folder does not exist"),
    ],
)
def test_errors_are_one_line_and_keep_an_earlier_page(
    words: list[str], message: str, page: Callable[..., Page], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = build_page("earlier", [], [])
    (data / "page.html").write_text(earlier)
    before = sorted(data.iterdir())
    with pytest.raises(SystemExit) as error:
        page(*words)
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("inspect_data.py: error: ") and line.count("\n") == 1
    assert message in line
    assert (data / "page.html").read_text() == earlier and sorted(data.iterdir()) == before
