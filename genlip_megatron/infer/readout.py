"""Patch readout: the likeliest tokens of the LM head on the features of each patch, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from genlip_megatron.batch import to_image
from genlip_megatron.infer.load import Loaded
from genlip_megatron.infer.prepare import Prepared, packed
from genlip_megatron.tokenizer import END_OF_TURN, Tokenizer

_AT_ONCE = 256  # patches per call of the head
_CELL, _MARGIN = 104, 4  # pixels in the picture: side of a patch, margin of its text
_SIZES = (14, 12)  # font sizes of the likeliest token and of the others
_COLOURS = ("#ffe066", "#ffffff")
_BLANKS = str.maketrans({" ": "\u00b7", "\n": "\u00ac", "\r": "\u00ac", "\t": "\u00bb"})
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


Token = dict[str, Any]  # "id" in the vocabulary, "text" or "#" and the id if that is not printable, "probability"


@torch.inference_mode()
def readout(loaded: Loaded, image: Prepared, top: int = 5) -> list[list[Token]]:
    """The ``top`` likeliest tokens of ``lm_head(proj(ln_post(patch)))`` for every patch, row by row.

    Returns [] if a probability is NaN.

    Args:
        loaded: a model with its text parts.
        image: an image without an error.
        top: tokens per patch.
    """
    assert loaded.tokenizer is not None
    model, tokenizer = loaded.model, loaded.tokenizer
    patches, grid = packed([image], loaded.model.device)
    # The model needs text as input, but patches do not see it.
    text = torch.zeros(1, 1, dtype=torch.int64, device=loaded.model.device)
    states = model(text, patches, grid, output_hidden_states=True, use_cache=False).hidden_states[-1]
    found: list[list[Token]] = []
    for part in model.ln_post(states[: len(patches)]).split(_AT_ONCE):
        best = model.read_out(part).float().softmax(dim=-1).topk(top)
        if not bool(best.values.isfinite().all()):
            return []
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            best_first = zip(ids, probabilities, strict=True)
            found.append([{"id": i, "text": _text(tokenizer, i), "probability": round(p, 6)} for i, p in best_first])
    return found


def _text(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.closing_ids[0]:
        return END_OF_TURN
    text = tokenizer.decode([token])
    seen = text.translate(_BLANKS)
    return text if seen and seen.isprintable() and "\ufffd" not in seen else f"#{token}"


def as_json(image: Prepared, tokens: list[list[Token]]) -> dict[str, Any]:
    """{"path" or "key", "grid", "patches"}; a patch is {"row", "column", "tokens"}."""
    patches = [
        {"row": i // image.columns, "column": i % image.columns, "tokens": best} for i, best in enumerate(tokens)
    ]
    return {**image.name, "grid": [image.rows, image.columns], "patches": patches}


def picture(image: Prepared, tokens: list[list[Token]], fonts: Sequence[_Font]) -> Image.Image:
    """The darkened image with the tokens of each patch written over it, the likeliest on top in yellow.

    Args:
        image: the image.
        tokens: the result of ``readout``.
        fonts: the result of ``load_fonts``.
    """
    pixels = to_image((image.patches + 1) * 127.5, image.rows, image.columns).round().clamp(0, 255).byte()
    width, height = image.columns * _CELL, image.rows * _CELL
    canvas = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.blend(canvas, Image.new("RGB", canvas.size, "black"), 0.45)
    draw = ImageDraw.Draw(canvas)
    for number, best in enumerate(tokens):
        left, top = number % image.columns * _CELL, number // image.columns * _CELL
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline="#777777")
        line = (_CELL - 2 * _MARGIN) / max(len(best), 5)
        for place, token in enumerate(best):
            later = int(place > 0)
            label = _fit(draw, token["text"].translate(_BLANKS), fonts[later], _CELL - 2 * _MARGIN)
            draw.text(
                (left + _MARGIN, top + _MARGIN + place * line),
                label,
                fill=_COLOURS[later],
                font=fonts[later],
                stroke_width=1,
                stroke_fill="black",
            )
    return canvas


def load_fonts(file: str) -> list[_Font]:
    """Fonts of the likeliest token and of the others, from a TrueType or OpenType file; "": Pillow's own.

    Raises:
        ValueError: the file cannot be read.
    """
    if not file:
        return [ImageFont.load_default(size) for size in _SIZES]
    try:
        return [ImageFont.truetype(file, size) for size in _SIZES]
    except OSError as error:
        raise ValueError(f"--font {file}: cannot be read ({error}). Name a TrueType or OpenType file.") from None


def _fit(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """``text``, cut to ``width`` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "\u2026", font) > width:
        text = text[:-1]
    return text + "\u2026"
