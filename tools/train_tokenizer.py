#!/usr/bin/env python3
"""Train a small SentencePiece model on the captions of shards.

    tools/train_tokenizer.py demo/train-*.tar --output demo/tokenizer.model

The closing tokens of every training sequence, <|im_end|> and a line break, get their own pieces. The output replaces a
model that this tool trained, but no other file.
"""

from __future__ import annotations

from genlip_megatron.command import command

# isort: split
import argparse
import io
import os
import sys
import tarfile
from collections.abc import Iterator

import sentencepiece

from genlip_megatron.config import DEFAULT_PROMPT
from genlip_megatron.config.command_line import StrictParser
from genlip_megatron.data.patterns import expand_shards
from genlip_megatron.data.scan import CAPTION_SUFFIXES
from genlip_megatron.data.text import parse_turns
from genlip_megatron.outputs import check_file, write
from genlip_megatron.tokenizer import END_OF_TURN


def captions(shards: list[str]) -> Iterator[str]:
    """Every turn of every caption; unreadable captions are skipped, and indexing reports them."""
    for shard in shards:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                suffix = os.path.splitext(member.name)[1].lower()
                file = archive.extractfile(member) if member.isreg() and suffix in CAPTION_SUFFIXES else None
                if file is None:
                    continue
                try:
                    turns = parse_turns(file.read(), suffix == ".json", DEFAULT_PROMPT)
                except ValueError:
                    continue
                yield from (text for text, _ in turns if text)


def is_own(content: bytes) -> bool:
    """Whether a file is a model that this tool trained: it has the closing tokens, but no begin and end tokens."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        return False
    own = all(model.id_to_piece(model.piece_to_id(piece)) == piece for piece in (END_OF_TURN, "\n"))
    return own and model.bos_id() == model.eos_id() == -1


def train(texts: list[str], model: io.BytesIO, vocab_size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        bos_id=-1,
        eos_id=-1,
        user_defined_symbols=[END_OF_TURN, "\n"],
        num_threads=1,
        minloglevel=2,
    )


@command
def main() -> None:
    parser = StrictParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help=".tar files, folders of them, or globs")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=512, help="largest number of pieces (default: 512)")
    options = parser.parse_args()
    if options.vocab_size < 1:
        raise ValueError(f"--vocab-size {options.vocab_size}: must be at least 1")
    check_file(options.output, is_own)
    try:
        texts = list(captions(expand_shards(options.shards, "SHARDS")))
    except tarfile.TarError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if not texts:
        raise ValueError("no shard holds a readable caption")
    model = io.BytesIO()
    try:
        train(texts, model, options.vocab_size)
    except RuntimeError as error:  # its message ends with the possible sizes
        raise ValueError(f"--vocab-size {options.vocab_size}: {str(error).rpartition('] ')[2]}") from error
    write(options.output, model.getvalue(), is_own)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    print(f"{options.output}: {pieces} pieces from {len(texts)} texts")


if __name__ == "__main__":
    sys.exit(main())
