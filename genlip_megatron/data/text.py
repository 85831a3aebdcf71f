"""Tokenizers, and a sample's caption file -> token ids with the loss mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

END_OF_TURN = "<|im_end|>"
_USER, _ASSISTANT = {"user", "human"}, {"assistant", "gpt"}


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    fingerprint: str
    vocab_size: int
    closing_ids: list[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without any special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, without holding the interpreter lock."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; the model's rows beyond the tokenizer have none."""
        ...


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(path))
        self.vocab_size = self._backend.get_vocab_size()
        self.fingerprint = _fingerprint(path)
        end = self._backend.token_to_id(END_OF_TURN)
        if end is None:
            raise ValueError(f"data.tokenizer = {path}: it has no token {END_OF_TURN!r}, which closes every sample")
        self.closing_ids = [end, *self.encode("\n")]

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size])


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._backend.vocab_size()
        self.fingerprint = _fingerprint(path)
        self.closing_ids = [self._backend.piece_to_id(piece) for piece in (END_OF_TURN, "\n")]
        if self._backend.unk_id() in self.closing_ids:
            raise ValueError(
                f"data.tokenizer = {path}: it lacks the pieces {END_OF_TURN!r} and '\\n', which close every sample; "
                "train it with them as user-defined symbols (tools/train_tokenizer.py does)"
            )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size])


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """A Hugging Face ``tokenizer.json`` or a SentencePiece ``.model`` file.

    Raises:
        ValueError: no such file, another kind of file, or more tokens than ``vocab_size`` rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer = {str(path)!r}: no such file; give a tokenizer.json or a SentencePiece .model"
        )
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"data.tokenizer = {path}: expected a Hugging Face .json or a SentencePiece .model file")
    kind = _HuggingFace if path.suffix == ".json" else _SentencePiece
    try:
        tokenizer = kind(path)
    except Exception as error:  # each backend has errors of its own
        raise ValueError(f"data.tokenizer = {path}: cannot be read as a tokenizer: {error}") from error
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer = {path}: its {tokenizer.vocab_size} tokens do not fit model.vocab_size = {vocab_size}; "
            f"set --vocab-size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def parse_turns(content: bytes, is_json: bool, default_prompt: str) -> list[tuple[str, bool]]:
    """(text, carries loss) of each turn of a caption file.

    Understands ``{"caption": ...}``, ``{"conversations" or "conversation": [{"from", "value"}]}`` and plain text.
    An ``<image>`` marker is removed wherever it stands; turns are stripped.

    Raises:
        ValueError: none of these, or no word to learn from.
    """
    turns = _parse(content, is_json, default_prompt)
    if not any(text for text, carries_loss in turns if carries_loss):
        raise ValueError("caption is empty")
    for text, _ in turns:
        if END_OF_TURN in text:
            raise ValueError(f"caption contains {END_OF_TURN!r}, which closes every sample")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("caption is not valid Unicode: half of a surrogate pair")
    return turns


def _parse(content: bytes, is_json: bool, default_prompt: str) -> list[tuple[str, bool]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error}") from error
    if not is_json:
        return [(default_prompt, False), (text.strip(), True)]
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"caption is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("caption JSON is not an object")
    turns = record.get("conversations", record.get("conversation"))
    if turns is None:
        if not isinstance(record.get("caption"), str):
            raise ValueError('caption JSON has neither "caption" nor "conversations"')
        return [(default_prompt, False), (record["caption"].strip(), True)]
    if not isinstance(turns, list):
        raise ValueError('"conversations" is not a list')
    parsed = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError('a turn of the conversation has no "value"')
        if turn.get("from") not in _USER | _ASSISTANT:
            raise ValueError(f"a turn comes from {turn.get('from')!r}; known: {', '.join(sorted(_USER | _ASSISTANT))}")
        parsed.append((turn["value"].replace("<image>", "").strip(), turn["from"] in _ASSISTANT))
    if not any(carries_loss for _, carries_loss in parsed):
        raise ValueError("the conversation has no assistant turn")
    return parsed


def tokenize_many(
    samples: Sequence[Sequence[tuple[str, bool]]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """(token ids, whether each is predicted) of every sample's text: its turns in order, then the closing pair.

    Every turn is tokenised by itself with nothing between turns; assistant turns and the closing pair carry loss.
    """
    # Most samples share their prompt: each different text is tokenised once.
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


def tokenize(turns: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """``tokenize_many`` of one sample."""
    return tokenize_many([turns], tokenizer)[0]
