"""Caption files of common formats become the token sequence that the authors train on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.data.text import check_turns, encode_prompt, parse_turns, tokenize_many
from genlip_megatron.tokenizer import load_tokenizer

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
        {"from": user, "value": "What is it?"},
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
        (b"[1]", "not an object: it is a list"),
        (b"{}", 'neither "caption" nor "conversations": its keys are none'),
        (b'{"url": "x", "captions": ["a", "b"]}', 'neither "caption" nor "conversations": its keys are captions, url'),
        (b'{"caption": 3}', '"caption" is a number, not text'),
        (b'{"caption": ["one", "two"]}', '"caption" is a list of 2: write one text, or a sample for each'),
        (b'{"caption": {"en": "a cat"}}', '"caption" is an object'),
        (b'{"caption": null}', "caption is empty"),
        (b'{"caption": NaN}', "caption is empty"),
        (b'{"caption": " \\u200b\\u00a0"}', "caption is empty"),
        (b'{"caption": "<image>"}', "caption is empty"),
        (b'{"caption": "<image> a <image> b"}', "more than one image in the caption: 2 <image> markers"),
        (b'{"images": ["a.jpg", "b.jpg"], "caption": "x"}', 'more than one image in the caption: "images" lists 2'),
        (b'{"caption": "a <|im_end|>"}', r"spells the control token '<\|im_end\|>'"),
        (b'{"conversations": [{"from": "robot", "value": "x"}]}', "a turn comes from 'robot': expected user"),
        (b'{"conversations": [{"from": "system", "value": "x"}]}', "a turn comes from 'system': expected user"),
        (b'{"conversations": [{"from": "user"}]}', 'has no "value"'),
        (
            b'{"conversations": [{"role": "user", "content": "x"}]}',
            'has no "from" and "value": its keys are content, role',
        ),
        (b'{"conversations": [{"from": "gpt", "value": null}]}', 'the "value" of a turn is null'),
        (b'{"conversations": ["x"]}', "a turn of the conversation is text, not an object"),
        (b'{"conversations": [{"from": "user", "value": "x"}]}', "no assistant turn"),
        (b'{"conversations": 3}', "not a list"),
    ],
)
def test_other_captions_are_refused_with_the_reason(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_turns(content, True, "Prompt.")


@pytest.mark.parametrize("missing", [None, [], "", {}, float("nan")])
def test_an_empty_field_does_not_hide_another_field(missing: object) -> None:
    turns = [{"from": "user", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    assert parse({"conversations": missing, "caption": "A cat."}) == [("Prompt.", False), ("A cat.", True)]
    assert parse({"conversations": missing, "conversation": turns}) == [("Q?", False), ("A.", True)]
    assert parse({"conversation": missing, "conversations": turns, "caption": missing}) == [("Q?", False), ("A.", True)]


def test_an_image_marker_is_removed_from_every_form() -> None:
    expected = [("Prompt.", False), ("A cat.", True)]
    assert parse({"caption": "<image>\nA cat."}) == expected
    assert parse_turns(b"A cat.<IMAGE>", False, "<image>Prompt.") == expected


def test_nothing_is_learned_after_the_last_answer() -> None:
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}, {"from": "human", "value": "And then?"}]
    assert parse({"conversations": turns}) == [("Q?", False), ("A.", True)]
    assert parse({"conversations": [*turns, {"from": "gpt", "value": " "}]}) == [("Q?", False), ("A.", True)]
    assert parse({"conversations": [*turns, {"from": "gpt", "value": "B."}]})[2:] == [
        ("And then?", False),
        ("B.", True),
    ]


@pytest.mark.skipif(not QWEN.is_file(), reason="the Qwen3 tokenizer is not beside the project")
def test_text_with_a_control_token_is_refused() -> None:
    tokenizer = load_tokenizer(QWEN)
    for token in ("<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<|fim_prefix|>"):
        with pytest.raises(ValueError, match=re.escape(f"caption spells the control token {token!r}")):
            check_turns([("Q?", False), (f"a {token}", True)], tokenizer)
        with pytest.raises(
            ValueError, match=re.escape(f"--prompt = 'x{token}': it spells the control token {token!r}")
        ):
            encode_prompt(f"x{token}", tokenizer, "--prompt")
    check_turns([("a <b> | <tag> im_end", True)], tokenizer)
    assert encode_prompt(" <image>\nDescribe. ", tokenizer, "--prompt") == tokenizer.encode("Describe.")
    with pytest.raises(ValueError, match="--prompt = '<image> and <IMAGE>': 2 <image> markers"):
        encode_prompt("<image> and <IMAGE>", tokenizer, "--prompt")


@pytest.mark.skipif(not QWEN.is_file(), reason="the Qwen3 tokenizer is not beside the project")
def test_qwen_ids_equal_the_authors() -> None:
    tokenizer = load_tokenizer(QWEN, 151_936)
    ((ids, loss),) = tokenize_many([[(DEFAULT_PROMPT, False), ("A cat.", True)]], tokenizer)
    answer = tokenizer.encode("A cat.")
    assert ids == [74785, 279, 2168, 304, 7716, 13, *answer, 151645, 198]
    assert loss == [False] * 6 + [True] * (len(answer) + 2)
    assert tokenizer.decode([*answer, 151_800]) == "A cat."


def test_sentencepiece_round_trip_and_turns(demo_data: Path) -> None:
    tokenizer = load_tokenizer(demo_data / "tokenizer.model")
    text = "Two red crosses at the top left."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ((ids, loss),) = tokenize_many([[("Look.", False), ("one", True), ("More?", False), ("two", True)]], tokenizer)
    assert ids[-2:] == tokenizer.closing_ids and ids.count(tokenizer.closing_ids[0]) == 1
    lengths = [len(tokenizer.encode(turn)) for turn in ("Look.", "one", "More?", "two")]
    expected = [False] * lengths[0] + [True] * lengths[1] + [False] * lengths[2] + [True] * (lengths[3] + 2)
    assert loss == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", "no such file. Give a tokenizer.json, such as the paper's"),
        ("tokenizer.json", "cannot be read as a tokenizer"),
        ("tokenizer.model", "cannot be read as a tokenizer"),
        ("vocab.txt", r"expected a Hugging Face \.json or a SentencePiece \.model file"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(name: str, message: str, tmp_path: Path) -> None:
    if name != "none.json":
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)
