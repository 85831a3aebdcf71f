"""A tiny language model with its tokenizer, and rendered scenes of one colour and one shape with captions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from genlip_megatron.evaluate.scenes import COLOURS

SHAPES = ("circle", "square")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def captions() -> list[str]:
    """Every caption of the scenes."""
    return [f"A {colour} {shape}." for colour, shape in itertools.product(COLOURS, SHAPES)]


def tiny_tokenizer(special: tuple[str, ...] = SPECIAL) -> Any:
    """Byte-level BPE in which each word of the captions is one token; the last special token ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(captions(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[-1], extra_special_tokens=list(special[:-1])
    )


def write_llm(folder: Path) -> Path:
    """A random Qwen2 of two layers, as transformers writes it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_scenes(folder: Path, count: int = 72) -> Path:
    """``scenes.csv`` with ``count`` images, and ``scenes.json`` with a question about each in LLaVA's format."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    texts, rows, records = captions(), ["image,caption"], []
    for number in range(count):
        caption = texts[number % len(texts)]
        colour, shape = caption.strip(".").split()[1:]
        image = Image.fromarray(rng.integers(200, 256, (40, 36, 3)).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((2, 2, 34, 36), fill=COLOURS[colour])
        image.save(folder / f"{number}.png")
        rows.append(f"{number}.png,{caption}")
        turns = [
            {"from": "human", "value": "Which colour?\n<image>"},
            {"from": "gpt", "value": f"{colour}"},
            {"from": "human", "value": "Which shape?"},
            {"from": "gpt", "value": f"{shape}"},
        ]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    records.append({"id": count, "conversations": turns})
    (folder / "scenes.csv").write_text("\n".join(rows) + "\n")
    (folder / "scenes.json").write_text(json.dumps(records))
    return folder
