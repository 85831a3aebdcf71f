"""Export a tokenizer as files that ``AutoTokenizer`` loads without this package."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from genlip_megatron.tokenizer import END_OF_TURN as END_OF_TURN
from genlip_megatron.tokenizer import read_tokenizer_json

# Pieces of these types are not plain text (sentencepiece_model.proto, ModelProto.SentencePiece.Type).
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"  # how SentencePiece writes a space


def export_tokenizer(path: str | Path, folder: str | Path) -> int:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``; return the end token's id.

    The end token closes every caption and is also the padding token.

    Args:
        path: a Hugging Face ``tokenizer.json``, copied as ``read_tokenizer_json`` reads it, or a SentencePiece unigram
            ``.model``.
        folder: where to write.

    Raises:
        ValueError: another kind of file, or a SentencePiece model that the tokenizers library cannot reproduce.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file() or path.suffix not in (".json", ".model"):
        raise ValueError(
            f"data.tokenizer = {path}: expected an existing Hugging Face .json or SentencePiece .model file"
        )
    if path.suffix == ".model":
        content = sentencepiece_to_json(path).encode()
        backend = Tokenizer.from_buffer(content)
    else:
        try:
            backend, content = read_tokenizer_json(path)
        except ValueError as error:
            raise ValueError(f"data.tokenizer = {path}: {error}") from error
    end = backend.token_to_id(END_OF_TURN)
    if end is None:
        raise ValueError(f"data.tokenizer = {path}: has no token {END_OF_TURN!r}, which closes every sample")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(content)
    special = {"eos_token": END_OF_TURN, "pad_token": END_OF_TURN}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, fields in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return end


def sentencepiece_to_json(path: Path) -> str:
    """The text of a ``tokenizer.json`` that encodes and decodes like a SentencePiece unigram model.

    Raises:
        ValueError: another kind of model, or one that changes text before splitting it into pieces.
    """
    # Its types are created on import; type checkers do not see them.
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for name, value, allowed in (
        ("model_type", trainer.ModelType.Name(trainer.model_type), "UNIGRAM"),
        ("normalization_rule_name", normalizer.name, "identity"),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
    ):
        if value != allowed:
            raise ValueError(
                f"data.tokenizer = {path}: {name} = {value!r} has no Hugging Face equivalent here. Train the tokenizer "
                f"with {allowed!r}, as tools/train_tokenizer.py does"
            )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [piece for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False) for p in added if p.type == _USER_DEFINED])
    special = [p.piece for p in added if p.type == _CONTROL or p.piece == END_OF_TURN]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer.to_str()
