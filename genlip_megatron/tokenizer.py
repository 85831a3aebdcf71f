"""Tokenizers: text to token ids that depend only on the text, and back.

A tokenizer file may contain truncation, padding or BPE dropout. They are switched off here. A file whose normalization
loses letters is refused, because the model could never write them.
"""

from __future__ import annotations

import collections
import hashlib
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

END_OF_TURN = "<|im_end|>"
_LETTERS = string.digits + string.ascii_letters + string.punctuation + "éÉñ"
# Where a new user gets one.
_SOURCES = (
    "a tokenizer.json, such as the paper's (hf download Qwen/Qwen3-0.6B tokenizer.json --local-dir .), or a "
    "SentencePiece .model, such as tools/train_tokenizer.py makes from your captions"
)
# A character that no vocabulary contains as a token.
_UNHEARD_OF = "\U0010fffd"
# How control tokens are spelled, including tokens that a file does not mark as special.
_MARKUP = re.compile(r"<\|.+\|>", re.DOTALL)


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
        fingerprint: hexadecimal SHA-256 of the file, without settings that were switched off.
        vocab_size: rows of embedding and head: the largest id + 1, even if some ids are unused.
        closing_ids: ids of the end token and a line break, which close every sample.
        control_tokens: tokens that are not text. Text that contains one must be refused.
    """

    fingerprint: str
    vocab_size: int
    closing_ids: list[int]
    control_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with nothing added. The text of a control token becomes that token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` for many texts; releases the GIL."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` with control tokens. Ids that the tokenizer lacks are left out."""
        ...

    def lost(self, text: str) -> str:
        """Letters of ``text`` that no token can write; empty if there are none."""
        ...


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        backend, content = read_tokenizer_json(path)
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()
        end = backend.token_to_id(END_OF_TURN)
        if end is None:
            raise ValueError(f"it has no token {END_OF_TURN!r}, which closes every sample. Add it to the tokenizer.")
        self._unknown = _unknown_token(backend)
        _check_spaces(self.encode, backend.token_to_id(self._unknown) if self._unknown else None)
        self.closing_ids = [end, *self.encode("\n")]
        added = backend.get_added_tokens_decoder().values()
        control = [token.content for token in added if token.special or _MARKUP.fullmatch(token.content)]
        self.control_tokens = tuple(dict.fromkeys([*control, *([self._unknown] if self._unknown else ())]))
        self._writes_all_bytes = _writes_all_bytes(backend, vocabulary)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=False)

    def lost(self, text: str) -> str:
        if self._writes_all_bytes:
            return ""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._unknown:
            number = self._backend.token_to_id(self._unknown)
            unknown = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == number]
            return "".join(text[first:last] for first, last in unknown)
        # Without an unknown token the backend silently drops such letters.
        normalizer = self._backend.normalizer
        wanted = collections.Counter("".join((normalizer.normalize_str(text) if normalizer else text).split()))
        return "".join((wanted - collections.Counter(self.decode(encoding.ids))).elements())


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = backend = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = backend.vocab_size()
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        self.closing_ids = [backend.piece_to_id(piece) for piece in (END_OF_TURN, "\n")]
        if backend.unk_id() in self.closing_ids:
            raise ValueError(
                f"it lacks the pieces {END_OF_TURN!r} and '\\n', which close every sample. Train it with both as "
                "user-defined symbols, as tools/train_tokenizer.py does."
            )
        _check_letters(backend.normalize)
        ids = range(self.vocab_size)
        pieces = [backend.id_to_piece(i) for i in ids]
        self.control_tokens = tuple(
            piece
            for i, piece in zip(ids, pieces, strict=True)
            if backend.is_control(i) or backend.is_unknown(i) or _MARKUP.fullmatch(piece)
        )
        self._writes_all_bytes = sum(map(backend.is_byte, ids)) == 256

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size])

    def lost(self, text: str) -> str:
        if self._writes_all_bytes:
            return ""
        unknown = self._backend.unk_id()
        parts = zip(self._backend.encode(text), self._backend.encode(text, out_type=str), strict=True)
        return "".join(piece for i, piece in parts if i == unknown)


def read_tokenizer_json(path: str | Path) -> tuple[Any, bytes]:
    """(tokenizer of the library ``tokenizers``, file content) of a ``tokenizer.json``.

    Truncation, padding and dropout are switched off, also in the content. Without them the content is the file's bytes.

    Raises:
        ValueError: it cannot be read, or loses letters.
    """
    from tokenizers import Tokenizer as Backend

    content = Path(path).read_bytes()
    try:
        backend = Backend.from_buffer(content)
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"cannot be read as a tokenizer: {error}") from error
    dropout = getattr(backend.model, "dropout", None)
    if backend.truncation is not None or backend.padding is not None or dropout is not None:
        backend.no_truncation()
        backend.no_padding()
        if dropout is not None:
            backend.model.dropout = None
        content = backend.to_str().encode()
    if backend.normalizer is not None:
        _check_letters(backend.normalizer.normalize_str)
    if backend.pre_tokenizer is not None:
        spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(_LETTERS)]
        kept = "".join(_LETTERS[first:last] for first, last in spans)
        if missing := [letter for letter in _LETTERS if letter not in kept]:
            raise ValueError(f"its pre_tokenizer drops {''.join(missing)!r}. Use one that keeps all text.")
    return backend, content


def _check_letters(normalize: Callable[[str], str]) -> None:
    """Raise ValueError if a normalizer drops letters or maps two letters to the same text."""
    results: dict[str, str] = {}
    for letter in _LETTERS:
        result = normalize(letter)
        if not result.strip() or result in results:
            what = f"makes {results[result]!r} and {letter!r} the same" if result in results else f"drops {letter!r}"
            raise ValueError(
                f"its normalizer {what}, so the model could never tell or write them. Use one that keeps them."
            )
        results[result] = letter


def _check_spaces(encode: Callable[[str], list[int]], unknown: int | None) -> None:
    """Raise ValueError if words run together, or if a line break has no token other than ``unknown``."""
    without, space, line = (encode(text) for text in ("~^", "~ ^", "~\n^"))
    if space == without:
        raise ValueError("it drops spaces, so the model could never write them. Use one that keeps them.")
    if line in (without, space) or not encode("\n") or unknown in encode("\n"):
        raise ValueError("it has no token for a line break, which closes every sample. Use one that keeps line breaks.")


def _unknown_token(backend: Any) -> str | None:
    """The token of text that has no other token."""
    if name := getattr(backend.model, "unk_token", None):
        return name
    # Unigram knows only its id, and reports the text in place of the token's name.
    encoding = backend.encode(_UNHEARD_OF, add_special_tokens=False)
    names = [(backend.id_to_token(i), token) for i, token in zip(encoding.ids, encoding.tokens, strict=True)]
    return next((name for name, token in names if name != token), None)


def _writes_all_bytes(backend: Any, vocabulary: dict[str, int]) -> bool:
    """Whether every byte has a token and the tokenizer uses it: byte-level BPE or byte fallback."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = "".join(f"<0x{byte:02X}>" for byte in _UNHEARD_OF.encode())
    written = "".join(backend.encode(_UNHEARD_OF, add_special_tokens=False).tokens)
    if byte_level.pre_tokenize_str(_UNHEARD_OF)[0][0] in written:
        return all(letter in vocabulary for letter in byte_level.alphabet())
    return spelled in written and all(f"<0x{i:02X}>" in vocabulary for i in range(256))


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face ``tokenizer.json`` or a SentencePiece ``.model`` file.

    Raises:
        ValueError: no such file, not a tokenizer, one that loses letters, or a token id of ``vocab_size`` or above.
    """
    if not str(path):
        raise ValueError(f"data.tokenizer: is not set. Add --tokenizer with {_SOURCES}.")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"data.tokenizer = {path}: is a folder. Name the tokenizer.json or .model file in it.")
    if not path.is_file():
        raise ValueError(f"data.tokenizer = {str(path)!r}: no such file. Give {_SOURCES}.")
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"data.tokenizer = {path}: expected a Hugging Face .json or a SentencePiece .model file.")
    kind = _HuggingFace if path.suffix == ".json" else _SentencePiece
    try:
        tokenizer = kind(path)
    except ValueError as error:
        raise ValueError(f"data.tokenizer = {path}: {error}") from error
    except Exception as error:  # SentencePiece raises its own types
        raise ValueError(f"data.tokenizer = {path}: cannot be read as a tokenizer: {error}") from error
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer = {path}: its tokens do not fit model.vocab_size = {vocab_size}. Set --vocab-size to at "
            f"least {tokenizer.vocab_size}, its largest id + 1."
        )
    return tokenizer
