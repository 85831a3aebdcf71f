"""A sample's caption file -> turns of text -> token ids with a loss mask."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from genlip_megatron.tokenizer import END_OF_TURN, Tokenizer

_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
# LLaVA's format marks the place of the image; here the image always comes first.
_IMAGE_MARKER = re.compile("<image>", re.IGNORECASE)
_KINDS = {list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number", str: "text"}

Turns = list[tuple[str, bool]]  # (text, whether it carries loss)


def parse_turns(content: bytes, is_json: bool, default_prompt: str) -> Turns:
    """(text, carries loss) of each turn of a caption file, up to the last answer.

    Accepts ``{"caption": ...}``, ``{"conversations" or "conversation": [{"from", "value"}]}`` and plain text. Null and
    empty fields count as missing. One ``<image>`` marker is removed, wherever it is; turns are stripped.

    Raises:
        ValueError: another format, no text to learn from, or more than one image.
    """
    turns = _parse_json(_decode(content), default_prompt) if is_json else _with_prompt(_decode(content), default_prompt)
    markers = sum(len(_IMAGE_MARKER.findall(text)) for text, _ in turns)
    if markers > 1:
        raise ValueError(f"more than one image in the caption: {markers} <image> markers, and a sample has one image")
    turns = [(strip_image_marker(text), carries_loss) for text, carries_loss in turns]
    # Text after the last answer is no answer, and the closing tokens would be learned after it.
    while turns and not (turns[-1][1] and _is_visible(turns[-1][0])):
        turns.pop()
    if not turns:
        raise ValueError("caption is empty")
    for text, _ in turns:
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("caption is not valid Unicode: half of a surrogate pair")
        _refuse_control_tokens(text, (END_OF_TURN,))
    return turns


def strip_image_marker(text: str) -> str:
    """``text`` without image markers, stripped.

    >>> strip_image_marker("<image>\\nWhat is it? ")
    'What is it?'
    """
    return _IMAGE_MARKER.sub("", text).strip()


def check_turns(turns: Turns, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a turn contains a control token, or characters that the tokenizer cannot write."""
    for text, _ in turns:
        _refuse_control_tokens(text, tokenizer.control_tokens)
        if lost := tokenizer.lost(text):
            raise ValueError(f"caption holds text that the tokenizer cannot write: {lost[:40]!r}")


def encode_prompt(prompt: str, tokenizer: Tokenizer, setting: str) -> list[int]:
    """Token ids of a prompt, cleaned and checked like the turns of a caption; [] for an empty prompt.

    Args:
        setting: name of the setting, for messages.

    Raises:
        ValueError: it contains a control token, or characters that the tokenizer cannot write.
    """
    if (markers := len(_IMAGE_MARKER.findall(prompt))) > 1:
        raise ValueError(f"{setting} = {prompt!r}: {markers} <image> markers, and the model reads one image")
    text = strip_image_marker(prompt)
    try:
        check_turns([(text, False)], tokenizer)
    except ValueError as error:
        raise ValueError(f"{setting} = {prompt!r}: {str(error).replace('caption', 'it', 1)}") from None
    return tokenizer.encode(text)


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error}") from error


def _with_prompt(caption: str, default_prompt: str) -> Turns:
    return [(strip_image_marker(default_prompt), False), (caption, True)]


def _parse_json(text: str, default_prompt: str) -> Turns:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"caption is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"caption JSON is not an object: it is {_kind(record)}")
    for name in ("image", "images"):
        if isinstance(record.get(name), list) and len(record[name]) > 1:
            raise ValueError(f'more than one image in the caption: "{name}" lists {len(record[name])}')
    for name in ("conversations", "conversation"):
        if not _is_missing(record.get(name)):
            return _conversation(record[name], name)
    caption = record.get("caption")
    if isinstance(caption, str):
        return _with_prompt(caption, default_prompt)
    if isinstance(caption, list) and caption:
        raise ValueError(f'"caption" is a list of {len(caption)}: write one text, or a sample for each')
    if not _is_missing(caption):
        raise ValueError(f'"caption" is {_kind(caption)}, not text')
    if "caption" in record or "conversations" in record or "conversation" in record:
        raise ValueError("caption is empty")
    keys = ", ".join(sorted(map(str, record))[:8]) or "none"
    raise ValueError(f'caption JSON has neither "caption" nor "conversations": its keys are {keys}')


def _conversation(turns: Any, name: str) -> Turns:
    if not isinstance(turns, list):
        raise ValueError(f'"{name}" is not a list: it is {_kind(turns)}')
    parsed = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn of the conversation is {_kind(turn)}, not an object")
        if missing := " and ".join(f'"{field}"' for field in ("from", "value") if field not in turn):
            raise ValueError(f"a turn of the conversation has no {missing}: its keys are {', '.join(sorted(turn))}")
        if turn["from"] not in _USER + _ASSISTANT:
            raise ValueError(f"a turn comes from {turn['from']!r}: expected {', '.join(_USER + _ASSISTANT)}")
        if not isinstance(turn["value"], str):
            raise ValueError(f'the "value" of a turn is {_kind(turn["value"])}, not text')
        parsed.append((turn["value"], turn["from"] in _ASSISTANT))
    if not any(carries_loss for _, carries_loss in parsed):
        raise ValueError("the conversation has no assistant turn")
    return parsed


def _is_missing(value: Any) -> bool:
    """Whether a field counts as missing: null, NaN, or empty."""
    return value is None or value != value or (isinstance(value, (str, list, dict)) and not value)


def _is_visible(text: str) -> bool:
    """Whether a text has a visible character."""
    return any(unicodedata.category(letter) not in ("Zs", "Zl", "Zp", "Cc", "Cf") for letter in text)


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _refuse_control_tokens(text: str, control_tokens: Sequence[str]) -> None:
    for token in control_tokens:
        if token in text:
            raise ValueError(f"caption spells the control token {token!r}")


def tokenize_many(samples: Sequence[Turns], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(token ids, whether each carries loss) of every sample's text: its turns in order, then the closing pair.

    Every turn is tokenised separately, with nothing between turns. Assistant turns and the closing pair carry loss.
    """
    # Most samples have the same prompt: each distinct text is tokenised once.
    texts = list(dict.fromkeys(text for turns in samples for text, _ in turns if text))
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts), strict=True)) if texts else {}
    results = []
    for turns in samples:
        ids: list[int] = []
        loss: list[bool] = []
        for text, carries_loss in turns:
            tokens = ids_of.get(text, [])
            ids += tokens
            loss += [carries_loss] * len(tokens)
        ids += tokenizer.closing_ids
        loss += [True] * len(tokenizer.closing_ids)
        results.append((ids, loss))
    return results
