"""Draw layouts.svg: what each of two ranks holds of a pack and of the weights, for every kind of parallelism.

python docs/pictures/layouts.py
"""

from __future__ import annotations

from pathlib import Path

# (image tokens, text tokens) of each sample of the two packs that are drawn.
PACKS = (((8, 4), (6, 3), (9, 5), (2, 1)), ((4, 3), (9, 4), (6, 6), (4, 2)))
COLOURS = ("#3f51b5", "#00897b", "#ef6c00", "#8e24aa")
WEIGHTS, GHOST, INK = "#455a64", "#e4e7eb", "#263238"
SLOTS = 40
SLOT, BAR, CELL_X, CELL_WIDTH, ROW, TOP = 5.4, 20, (176, 510), 326, 92, 70
# Name, flag, what it does; then for each of two ranks its pack, and its part of slots, layers and columns of a matrix.
ALL, LEFT, RIGHT = (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)
ROWS = (
    ("Data parallel", "the default", "each rank has its own pack and all weights", (0, ALL, ALL, ALL),
     (1, ALL, ALL, ALL)),
    ("FSDP", "--fsdp", "as above; a layer's weights are gathered when it runs", (0, ALL, ALL, LEFT),
     (1, ALL, ALL, RIGHT)),
    ("Tensor parallel", "--tp 2", "half of each matrix; between them half of the tokens", (0, LEFT, ALL, LEFT),
     (0, RIGHT, ALL, RIGHT)),
    ("Context parallel", "--cp 2", "half of the tokens; a sample may be cut anywhere", (0, LEFT, ALL, ALL),
     (0, RIGHT, ALL, ALL)),
    ("Pipeline", "--pp 2", "every token passes rank 0, then rank 1", (0, ALL, LEFT, ALL), (0, ALL, RIGHT, ALL)),
)  # fmt: skip
LAYERS, LAYER_WIDTH, LAYER_HEIGHT, GAP = 4, 60, 10, 22


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """One rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" {more}/>'


def text(x: float, y: float, words: str, size: int, more: str = "") -> str:
    """One line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{INK}" {more}>{words}</text>'


def pack(x: float, y: float, number: int, part: tuple[float, float]) -> list[str]:
    """A pack: image tokens in full colour, text tokens lighter, what this rank does not hold in grey."""
    shapes, first = [], 0
    for colour, lengths in zip(COLOURS, PACKS[number], strict=True):
        for length, opacity in zip(lengths, (1.0, 0.45), strict=True):
            for slot in range(first, first + length):
                held = part[0] * SLOTS <= slot < part[1] * SLOTS
                fill, more = (colour, f'fill-opacity="{opacity}"') if held else (GHOST, "")
                shapes.append(rect(x + slot * SLOT, y, SLOT - 0.8, BAR, fill, more))
            first += length
    empty = f'stroke="{GHOST}"'
    return [*shapes, *(rect(x + slot * SLOT, y, SLOT - 0.8, BAR, "#ffffff", empty) for slot in range(first, SLOTS))]


def weights(x: float, y: float, layers: tuple[float, float], columns: tuple[float, float]) -> list[str]:
    """The weights: one bar a layer, with the part that this rank holds filled."""
    shapes = []
    for layer in range(LAYERS):
        top = y + layer * (LAYER_HEIGHT + 3)
        shapes.append(rect(x, top, LAYER_WIDTH, LAYER_HEIGHT, GHOST))
        if layers[0] * LAYERS <= layer < layers[1] * LAYERS:
            left, right = (part * LAYER_WIDTH for part in columns)
            shapes.append(rect(x + left, top, right - left, LAYER_HEIGHT, WEIGHTS))
    return shapes


def picture() -> str:
    """The whole picture as SVG."""
    width, height = CELL_X[1] + CELL_WIDTH, TOP + len(ROWS) * ROW + 36
    shapes = [rect(0, 0, width, height, "#ffffff", 'rx="8"')]
    bold = 'font-weight="bold"'
    for rank, x in enumerate(CELL_X):
        shapes.append(text(x, 26, f"rank {rank}", 17, bold))
        shapes += [text(x, 50, "tokens", 15), text(x + SLOTS * SLOT + GAP, 50, "weights", 15)]
    for number, (name, flag, words, *ranks) in enumerate(ROWS):
        y = TOP + number * ROW
        shapes.append(f'<line x1="16" y1="{y - 6}" x2="{width - 16}" y2="{y - 6}" stroke="{GHOST}"/>')
        shapes += [text(16, y + 28, name, 17, bold), text(16, y + 48, flag, 15, 'font-family="monospace"')]
        for x, (which, slots, layers, columns) in zip(CELL_X, ranks, strict=True):
            shapes += pack(x, y + 16, which, slots)
            shapes += weights(x + SLOTS * SLOT + GAP, y + 4, layers, columns)
        shapes.append(text(CELL_X[0], y + 72, words, 15, 'font-style="italic"'))
    foot = "A colour is a sample: image tokens dark, text tokens light. Grey: held by the other rank. White: padding."
    shapes.append(text(16, height - 16, foot, 14))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, "<title>What two ranks hold of a pack and of the weights</title>", *shapes, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("layouts.svg").write_text(picture())
