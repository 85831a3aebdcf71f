"""Caption files of the formats seen in the wild become the token sequence that the authors train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.text import load_tokenizer, parse_turns, tokenize

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen3-tokenizer" / "tokenizer.json"


def parse(record: object) -> list[tuple[str, bool]]:
    return parse_turns(json.dumps(record).encode(), True, "Prompt.")


def test_plain_captions() -> None:
    assert parse({"caption": " A cat. ", "url": "x"}) == [("Prompt.", False), ("A cat.", True)]
    assert parse_turns("Ein Käse.\n".encode(), False, "Prompt.") == [("Prompt.", False), ("Ein Käse.", True)]


@pytest.mark.parametrize("key", ["conversations", "conversation"])
@pytest.mark.parametrize(("user", "assistant"), [("user", "assistant"), ("human", "gpt")])
def test_conversations_lose_their_image_marker(key: str, user: str, assistant: str) -> None:
    turns = [
        {"from": user, "value": "<image>\nWhat is it?"},
        {"from": assistant, "value": "A cat."},
        {"from": user, "value": "Where <image>?"},
        {"from": assistant, "value": " On a mat."},
    ]
    parsed = [("What is it?", False), ("A cat.", True), ("Where ?", False), ("On a mat.", True)]
    assert parse({key: turns}) == parsed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "not an object"),
        (b"{}", 'neither "caption" nor "conversations"'),
        (b'{"caption": 3}', 'neither "caption" nor "conversations"'),
        (b'{"conversations": [{"from": "robot", "value": "x"}]}', "a turn comes from 'robot'"),
        (b'{"conversations": [{"from": "user"}]}', 'has no "value"'),
        (b'{"conversations": [{"from": "user", "value": "x"}]}', "no assistant turn"),
        (b'{"conversations": 3}', "not a list"),
    ],
)
def test_other_captions_are_refused_with_the_reason(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_turns(content, True, "Prompt.")


@pytest.mark.skipif(not QWEN.is_file(), reason="the Qwen3 tokenizer is not beside the project")
def test_qwen_ids_are_the_authors() -> None:
    tokenizer = load_tokenizer(QWEN, 151_936)
    ids, loss = tokenize([(DEFAULT_PROMPT, False), ("A cat.", True)], tokenizer)
    answer = tokenizer.encode("A cat.")
    assert ids == [74785, 279, 2168, 304, 7716, 13, *answer, 151645, 198]
    assert loss == [False] * 6 + [True] * (len(answer) + 2)
    assert tokenizer.decode([*answer, 151_800]) == "A cat."


def test_sentencepiece_round_trip_and_turns(demo_data: Path) -> None:
    tokenizer = load_tokenizer(demo_data / "tokenizer.model")
    text = "Two red crosses at the top left."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, loss = tokenize([("Look.", False), ("one", True), ("More?", False), ("two", True)], tokenizer)
    assert ids[-2:] == tokenizer.closing_ids and ids.count(tokenizer.closing_ids[0]) == 1
    lengths = [len(tokenizer.encode(turn)) for turn in ("Look.", "one", "More?", "two")]
    expected = [False] * lengths[0] + [True] * lengths[1] + [False] * lengths[2] + [True] * (lengths[3] + 2)
    assert loss == expected


def test_a_tokenizer_that_cannot_work_is_refused(demo_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens do not fit model.vocab_size = 100; set --vocab-size to at least"):
        load_tokenizer(demo_data / "tokenizer.model", 100)
    with pytest.raises(ValueError, match="no such file; give a tokenizer.json or a SentencePiece .model"):
        load_tokenizer(tmp_path / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected a Hugging Face \.json or a SentencePiece \.model file"):
        load_tokenizer(tmp_path / "vocab.txt")
