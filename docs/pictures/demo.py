"""Draw demo.png, an unseen picture with its caption and its patch readout, from what `make demo` leaves behind:

tools/patch_readout.py demo/val-00000.tar --load runs/demo --limit 20 --top 3 --output readout
python docs/pictures/demo.py demo/val-00000.tar runs/demo/captions.jsonl readout val000018
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, HEAD, FOOT = 76, 20, 40, 88
INK, PALE, FIRST, LATER = "#263238", "#607d8b", "#ffd54f", "#ffffff"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def picture(image: Image.Image, caption: str, truth: str, readout: dict) -> Image.Image:
    """Image and caption on the left, the likeliest tokens of each patch on the right."""
    rows, columns = readout["grid"]
    width, height = columns * CELL, rows * CELL
    small = (int(0.65 * width), int(0.65 * height))
    right = 2 * MARGIN + small[0]
    canvas = Image.new("RGB", (right + width + MARGIN, HEAD + height + FOOT), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 8), "in: an image not trained on", INK, font(20))
    draw.text((right, 8), "inside: what the LM head reads in each patch", INK, font(20))
    canvas.paste(image.resize(small, Image.Resampling.BICUBIC), (MARGIN, HEAD))
    large = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(Image.blend(large, Image.new("RGB", large.size, "black"), 0.55), (right, HEAD))
    for patch in readout["patches"]:
        left, top = right + patch["column"] * CELL, HEAD + patch["row"] * CELL
        draw.rectangle((left, top, left + CELL, top + CELL), outline="#8a8a8a")
        for place, token in enumerate(patch["tokens"][:3]):
            text, colour = token["text"].strip() or "_", FIRST if place == 0 else LATER
            draw.text((left + 5, top + 4 + place * 23), text, colour, font(17 if place == 0 else 15))
    draw.text((MARGIN, HEAD + height + 12), f"out: {caption}", INK, font(24))
    draw.text((MARGIN, HEAD + height + 50), f"written for it: {truth}", PALE, font(19))
    return canvas


def main(shard: str, captions: str, readouts: str, key: str) -> None:
    """Write demo.png beside this file."""
    with tarfile.open(shard) as tar:
        name = next(name for name in tar.getnames() if name.rsplit(".", 1)[0] == key and not name.endswith(".json"))
        file = tar.extractfile(name)
        assert file is not None
        image = Image.open(io.BytesIO(file.read())).convert("RGB")
    row = next(row for row in map(json.loads, Path(captions).read_text().splitlines()) if row["key"] == key)
    readout = json.loads(next(Path(readouts).glob(f"*-{key}.json")).read_text())
    drawn = picture(image, row["caption"], row["truth"], readout).quantize(128)
    drawn.save(Path(__file__).with_name("demo.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
