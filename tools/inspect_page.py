"""The HTML page of ``inspect_data.py``: packs as the model gets them, with images, tokens, layout and masks.

Everything comes from the ``PackedBatch``. The page is one file without network and scripts, with images as inline PNG.
Text of the data is escaped everywhere.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from genlip_megatron.batch import PATCH_SIZE, PackedBatch, to_image
from genlip_megatron.model.mask import prefix_lm_mask
from genlip_megatron.outputs import begins_with
from genlip_megatron.tokenizer import END_OF_TURN, Tokenizer

# Kinds of slots in a pack, their colours and their legend.
PADDING, IMAGE, PROMPT, ANSWER, BAD = range(5)
KINDS = ("padding", "image", "prompt", "answer", "bad")
COLOURS = ("#e2e8f0", "#60a5fa", "#fbbf24", "#34d399", "#f87171")
LEGEND = ("padding", "image patch", "prompt, no loss", "answer and closing tokens, with loss", "bad sample, no loss")

MASK_PIXELS = 1024  # largest side of a mask's picture
_MASK_WIDTH = 540  # width of a mask on the page
_TILE_SLOTS = 512  # side of the mask tiles computed at once
_CROP_SLOTS = 4096
_BAR_SLOTS = 4096  # slots per line of a pack's layout
_ENLARGED_BELOW = 288  # images with smaller sides are enlarged
_CONTEXT_TOKENS = 4  # earlier tokens that a token may need to form a whole character
_BLANKS = {" ": "<i>·</i>", "\n": "<i>⏎</i>", "\t": "<i>⇥</i>"}


@dataclass(frozen=True)
class Origin:
    """The origin of a sample."""

    key: str
    shard: str
    height: int  # of its image before resizing, in pixels
    width: int
    text_tokens: int  # before it was cut to fit its pack
    reason: str = ""  # why it carries no loss
    source: str = ""  # where tools/make_shards.py had it from


@dataclass(frozen=True)
class Pack:
    """One pack: its micro-batch on the CPU, its samples in order, and its title."""

    batch: PackedBatch
    samples: list[Origin]
    name: str


@dataclass(frozen=True)
class Place:
    """Slots of one sample: first its image, then its text."""

    start: int
    images: int
    texts: int

    @property
    def text(self) -> range:
        """Slots of the text."""
        return range(self.start + self.images, self.start + self.images + self.texts)


def place(batch: PackedBatch, number: int) -> Place:
    columns = (batch.sample_starts, batch.image_lengths, batch.text_lengths)
    return Place(*(int(column[number]) for column in columns))


def position(batch: PackedBatch, slot: int) -> str:
    """The T,H,W position of a slot."""
    return ",".join(map(str, batch.position_ids[:, slot].tolist()))


def loss_rows(batch: PackedBatch) -> np.ndarray:
    """int64 [R]: the slots whose output enters the loss."""
    return batch.loss_rows[batch.loss_weights > 0].numpy()


def slot_kinds(pack: Pack) -> np.ndarray:
    """uint8 [S]: the kind of each slot, as an index into ``KINDS``."""
    batch = pack.batch
    samples, is_image = batch.sample_ids.numpy(), batch.is_image.numpy()
    kinds = np.where(samples < 0, PADDING, np.where(is_image, IMAGE, PROMPT)).astype(np.uint8)
    kinds[loss_rows(batch) + 1] = ANSWER
    kinds[np.isin(samples, [i for i, origin in enumerate(pack.samples) if origin.reason])] = BAD
    return kinds


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds, or its id if it adds nothing visible."""
    texts = []
    for i, token in enumerate(ids):
        before = ids[max(0, i - _CONTEXT_TOKENS) : i]
        old, new = tokenizer.decode(before), tokenizer.decode([*before, token])
        while not new.startswith(old):  # the end of an incomplete character
            old = old[:-1]
        text = END_OF_TURN if token == tokenizer.closing_ids[0] else new[len(old) :]
        texts.append(text or f"#{token}")
    return texts


def sample_image(batch: PackedBatch, number: int) -> np.ndarray | None:
    """uint8 [height, width, 3] of a sample, assembled from its patches; None for a sample without an image."""
    count = int(batch.image_lengths[number])
    if not count or batch.patches is None:
        return None
    first = int(batch.image_lengths[:number].sum())
    rows, columns = grid(batch, number)
    return to_image(batch.patches[first : first + count], rows, columns).permute(1, 2, 0).numpy()


def grid(batch: PackedBatch, number: int) -> tuple[int, int]:
    """(rows, columns) of a sample's patches, from the position of its last patch."""
    last = batch.position_ids[:, batch.sample_starts[number] + batch.image_lengths[number] - 1].tolist()
    return last[1] + 1, last[2] + 1


def block_shares(sample_ids: Tensor, is_image: Tensor, pixels: int = MASK_PIXELS, tile: int = _TILE_SLOTS) -> Tensor:
    """float32 [B, B], B <= ``pixels``: fraction of visible (query, key) pairs in each block of the mask.

    The mask's rule depends only on the order of slots. So the mask of two tiles laid end to end contains the part where
    they meet, and the whole S x S mask is never in memory. Tiles without a common sample do not see each other, and
    slots after the end see nothing.
    """
    side = -(-len(sample_ids) // pixels)
    tile = side * max(1, tile // side)
    missing = -len(sample_ids) % tile
    ids, images = pad(sample_ids, (0, missing), value=-1).split(tile), pad(is_image, (0, missing)).split(tile)
    blocks = tile // side
    shares = torch.zeros(len(ids) * blocks, len(ids) * blocks)
    for i, j in itertools.combinations_with_replacement(range(len(ids)), 2):
        if not torch.isin(ids[i], ids[j]).any():
            continue
        pair = [i] if i == j else [i, j]
        mask = prefix_lm_mask(torch.cat([ids[k] for k in pair]), torch.cat([images[k] for k in pair]))
        cells = torch.cat([torch.arange(k * blocks, (k + 1) * blocks) for k in pair])
        shares[cells[:, None], cells] = avg_pool2d(mask[None].float(), side)[0]
    used = -(-len(sample_ids) // side)
    return shares[:used, :used]


def escape(text: str) -> str:
    """Text of the data as HTML; unprintable characters as escapes."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def picture(pixels: np.ndarray, style: str, text: str, palette: Sequence[int] = ()) -> str:
    """An <img> of uint8 [height, width, 3] colours, or [height, width] palette indices."""
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{content}" style="{style}" alt="{escape(text)}">'


def facts(pairs: dict[str, str]) -> str:
    """A list of names and values; values are HTML."""
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in pairs.items())}</dl>"


def rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour[1:]))


def heading(paths: Sequence[str], totals: dict[str, str]) -> str:
    """The heading; names and values of ``totals`` are HTML."""
    legend = "".join(f"<li><b class={kind}></b>{text}</li>" for kind, text in zip(KINDS, LEGEND, strict=True))
    return (
        f"<header><h1>What the model sees</h1><p class=paths>{'<br>'.join(map(escape, paths))}</p>{facts(totals)}"
        f"<ul class=legend>{legend}</ul></header>"
    )


def chip(kind: str, slot: str, text: str, below: str, title: str) -> str:
    """One token; all arguments except the title are HTML."""
    return (
        f'<span class="chip {kind}" title="{escape(title)}"><small>{slot}</small><em>{text}</em>'
        f"<small>{below or '&nbsp;'}</small></span>"
    )


def chips(pack: Pack, number: int, tokenizer: Tokenizer) -> str:
    """The image and text tokens of a sample; under each token with loss the slot that predicts it."""
    batch, kinds, rows = pack.batch, slot_kinds(pack), set(loss_rows(pack.batch).tolist())
    lies = place(batch, number)
    parts = []
    if lies.images:
        last = lies.text.start - 1
        below = f"<b>→ {last + 1}</b>" if last in rows else ""
        parts.append(chip("image", f"{lies.start}-{last}", f"{lies.images} patches", below, "the image, row by row"))
    ids = batch.token_ids[lies.text.start : lies.text.stop].tolist()
    for slot, token, text in zip(lies.text, ids, token_texts(tokenizer, ids), strict=True):
        title, below = f"id {token} | slot {slot} | T,H,W {position(batch, slot)}", ""
        if kinds[slot] == ANSWER:
            title, below = f"{title} | predicted by the output of slot {slot - 1}", f"← {slot - 1}"
        elif slot in rows:
            title, below = f"{title} | its output predicts slot {slot + 1}", f"<b>→ {slot + 1}</b>"
        shown = "".join(_BLANKS.get(c) or escape(c) for c in text)
        parts.append(chip(KINDS[kinds[slot]], str(slot), shown, below, title))
    return f"<div class=chips>{''.join(parts)}</div>"


def figure(batch: PackedBatch, number: int) -> str:
    """A sample's image with its patch grid, and the positions of the corners."""
    pixels = sample_image(batch, number)
    if pixels is None:
        return "<figure class=sample>no image</figure>"
    height, width, _ = pixels.shape
    scale = 2 if max(height, width) <= _ENLARGED_BELOW else 1
    rows, columns = grid(batch, number)
    start = place(batch, number).start
    corners = [position(batch, start + row * columns + column) for row in (0, rows - 1) for column in (0, columns - 1)]
    size = f"width:{width * scale}px;height:{height * scale}px"
    image = picture(pixels, size, "the image as the model sees it")
    mesh = f"<span class=grid style='background-size:{PATCH_SIZE * scale}px {PATCH_SIZE * scale}px'></span>"
    ends = [f"<div class=corners><span>{a}</span><span>{b}</span></div>" for a, b in (corners[:2], corners[2:])]
    return f"<figure class=sample><div>{ends[0]}<div class=frame>{image}{mesh}</div>{ends[1]}</div></figure>"


def sample_card(pack: Pack, number: int, tokenizer: Tokenizer) -> str:
    """One sample: its image, origin and tokens."""
    batch, origin, lies = pack.batch, pack.samples[number], place(pack.batch, number)
    rows, columns = grid(batch, number) if lies.images else (0, 0)
    loss = int((slot_kinds(pack)[lies.text.start : lies.text.stop] == ANSWER).sum())
    notes = ""
    if origin.reason:
        notes += f"<p class=bad>Bad sample, carries no loss: {escape(origin.reason)}</p>"
    if lies.texts < origin.text_tokens:
        notes += f"<p class=note>Caption cut from {origin.text_tokens} to {lies.texts} tokens, to fit its pack.</p>"
    text = f"{position(batch, lies.text[0])} to {position(batch, lies.text[-1])}" if lies.texts else "none"
    values = {
        "original": f"{origin.width} x {origin.height} px",
        "seen as": f"{columns * PATCH_SIZE} x {rows * PATCH_SIZE} px",
        "patches": f"{columns} x {rows} = {lies.images}",
        "text tokens": f"{lies.texts}, {loss} with loss",
        "T,H,W of the text": text,
    }
    return (
        f"<section class=card><h3>{escape(origin.key)}</h3>"
        f"<p class=paths>{escape(origin.shard)} &nbsp; {pack.name}, sample {number + 1}</p>"
        f"{f'<p class=paths>from {escape(origin.source)}</p>' if origin.source else ''}{notes}"
        f"<div class=columns>{figure(batch, number)}<div>{facts(values)}{chips(pack, number, tokenizer)}</div></div>"
        "</section>"
    )


def refused_card(key: str, shard: str, reason: str) -> str:
    """A sample that indexing refused."""
    return (
        f"<section class=card><h3>{escape(key)}</h3><p class=paths>{escape(shard)}</p>"
        f"<p class=bad>Refused when its shard was indexed, never trained on: {escape(reason)}</p></section>"
    )


def layout_bar(pack: Pack) -> str:
    """The slots of a pack in lines of a few thousand; a thin line marks the start of a sample."""
    kinds, samples = slot_kinds(pack), pack.batch.sample_ids.numpy()
    slots = np.arange(len(kinds))
    starts = np.diff(samples, prepend=-2) != 0
    borders = starts | (np.diff(kinds.astype(int), prepend=-1) != 0) | (slots % _BAR_SLOTS == 0)
    begins = np.flatnonzero(borders)
    lines: dict[int, list[str]] = {}
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(kinds)], strict=True):
        line, kind, sample = begin // _BAR_SLOTS, KINDS[kinds[begin]], int(samples[begin])
        x = begin - line * _BAR_SLOTS
        name = f"{pack.samples[sample].key}: " if sample >= 0 else ""
        title = escape(f"{name}{kind}, slots {begin} to {end - 1}")
        rect = f'<rect class="{kind}" x="{x}" width="{end - begin}" height="1"><title>{title}</title></rect>'
        edge = f'<path d="M{x} 0V1"/>' if starts[begin] and begin else ""
        lines.setdefault(line, []).append(rect + edge)
    width = min(len(kinds), _BAR_SLOTS)
    return "".join(
        f'<div class=bar><small>{line * _BAR_SLOTS}</small><svg viewBox="0 0 {width} 1" preserveAspectRatio="none">'
        f"{''.join(parts)}</svg></div>"
        for line, parts in lines.items()
    )


def sharp(pixels: int) -> str:
    """Style of a mask with this side: enlarged pixels stay sharp."""
    return "image-rendering:pixelated" if pixels <= _MASK_WIDTH else ""


def mask_pictures(pack: Pack) -> str:
    """The whole mask by blocks, and that of the first two samples pair by pair."""
    batch = pack.batch
    shares = block_shares(batch.sample_ids, batch.is_image).numpy()
    side = -(-batch.num_tokens // len(shares))
    # Rounded up, with a steep start of the palette, so that a block with a single visible pair does not look empty.
    levels = np.ceil(shares * 255).astype(np.uint8)
    depth = np.sqrt(np.arange(256) / 255)[:, None]
    palette = np.rint((1 - depth) * rgb("#f1f5f9") + depth * rgb("#1e3a8a")).astype(int).ravel().tolist()
    count, kinds = min(int((batch.sample_ids.numpy() // 2 == 0).sum()), _CROP_SLOTS), slot_kinds(pack)
    visible = prefix_lm_mask(batch.sample_ids[:count], batch.is_image[:count]).numpy()
    edge, hidden = max(3, count // 60), len(COLOURS) + 1
    framed = np.full((count + edge + 1,) * 2, len(COLOURS), np.uint8)
    framed[:edge, edge + 1 :] = kinds[:count]
    framed[edge + 1 :, :edge] = kinds[:count, None]
    framed[edge + 1 :, edge + 1 :] = np.where(visible, np.where(batch.is_image[:count], IMAGE, ANSWER), hidden)
    colours = [value for colour in (*COLOURS, "#ffffff", "#f1f5f9") for value in rgb(colour)]
    whole = picture(levels, sharp(len(levels)), "the mask by blocks", palette)
    corner = picture(framed, sharp(len(framed)), "the mask of the first samples", colours)
    return (
        f"<div class=masks><figure>{whole}<figcaption>Attention mask of the whole pack: queries down, keys across. The "
        f"darker a block, the more of its {side} x {side} pairs are visible.</figcaption></figure>"
        f"<figure>{corner}<figcaption>Its first {count} slots pair by pair, at most two samples: every query sees "
        "the image of its own sample (blue); text also sees the text up to itself (green); images see no text. Edges "
        "show the kind of each query and key.</figcaption></figure></div>"
    )


def pack_section(pack: Pack) -> str:
    """One pack: figures, layout, mask."""
    counts = np.bincount(slot_kinds(pack), minlength=len(KINDS)).tolist()
    total = sum(counts)
    values = {
        "samples": str(len(pack.samples)),
        "fill": f"{100 * (1 - counts[PADDING] / total):.2f}%",
        **{kind: f"{count:,}" for kind, count in zip(KINDS, counts, strict=True) if count or kind != "bad"},
    }
    bad = "".join(
        f"<p class=bad>{escape(origin.key)}: {escape(origin.reason)}</p>" for origin in pack.samples if origin.reason
    )
    return (
        f"<section class='card pack'><h3>{pack.name}</h3>{facts(values)}{bad}"
        f"{layout_bar(pack)}{mask_pictures(pack)}</section>"
    )


def build_page(top: str, cards: Sequence[str], packs: Sequence[Pack]) -> str:
    """The page of a heading, samples and packs."""
    sections = "\n".join(pack_section(pack) for pack in packs)
    rules = "".join(
        f"b.{kind}{{background:{colour}}}rect.{kind}{{fill:{colour}}}.chip.{kind}{{border-color:{colour};"
        f"background:color-mix(in srgb,{colour} 22%,white)}}"
        for kind, colour in zip(KINDS, COLOURS, strict=True)
    )
    return _PAGE.substitute(heading=top, cards="\n".join(cards), sections=sections, colours=rules)


_TOP = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>What the model sees</title>
"""
is_page = begins_with(_TOP.encode())

_PAGE = Template(
    _TOP
    + """<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>
body{margin:0 auto;max-width:1180px;padding:24px;font:14px/1.45 system-ui,sans-serif;color:#0f172a;background:#f8fafc}
h1,h2,h3,p,dl,ul,figure{margin:0}h1{font-size:26px}h2{font-size:20px;margin:32px 0 12px}
h3{font-size:16px;overflow-wrap:anywhere}p{margin:4px 0}
.paths{color:#64748b;font-size:12px;overflow-wrap:anywhere}
code,em{font-family:ui-monospace,Menlo,"DejaVu Sans Mono",monospace}
dl{display:flex;flex-wrap:wrap;gap:6px 28px;margin:10px 0}
dt{color:#64748b;font-size:12px}dd{margin:0;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;list-style:none;font-size:13px}
.legend b{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.card{background:white;border:1px solid #e2e8f0;border-radius:10px;padding:16px 18px;margin:14px 0}
p.bad,p.note{border-left:4px solid #f87171;background:#fef2f2;padding:6px 10px;overflow-wrap:anywhere}
p.note{border-color:#fbbf24;background:#fffbeb}
.columns{display:flex;gap:22px;align-items:flex-start;margin-top:10px}.columns>div{flex:1;min-width:300px}
.columns dl{margin-top:0}.sample{overflow-x:auto;max-width:620px;flex:none}.sample>div{width:max-content}
.corners{display:flex;justify-content:space-between;gap:12px;font-size:11px;color:#64748b}
.frame{position:relative;outline:1px solid #cbd5e1}.frame img{display:block;image-rendering:pixelated}
.grid{position:absolute;inset:0;background-image:linear-gradient(90deg,#0003 1px,#fff3 1px 2px,#0000 2px),
linear-gradient(#0003 1px,#fff3 1px 2px,#0000 2px)}
.chips{display:flex;flex-wrap:wrap;gap:4px}
.chip{display:inline-flex;flex-direction:column;align-items:center;border:1px solid;border-radius:5px;padding:1px 5px;
unicode-bidi:isolate;max-width:100%}
.chip small{font-size:9.5px;line-height:1.3;color:#64748b}.chip em{font-style:normal;overflow-wrap:anywhere}
.chip i{font-style:normal;color:#94a3b8}
.bar{display:flex;align-items:center;gap:8px;margin:3px 0}.bar small{width:44px;text-align:right;color:#64748b}
.bar svg{flex:1;height:26px}.bar path{stroke:#0f172a;stroke-width:1px;vector-effect:non-scaling-stroke}
.masks{display:grid;grid-template-columns:1fr 1fr;gap:24px;margin-top:16px}
.masks img{width:100%;border:1px solid #e2e8f0}figcaption{font-size:12.5px;color:#475569}
@media(max-width:760px){body{padding:12px}.columns{display:block}.columns>div{min-width:0}.sample{max-width:100%}
.masks{grid-template-columns:1fr}}
$colours
</style></head><body>
$heading
<h2>Samples</h2>
<p>Images are assembled from the patches that the model gets. The grid shows the patches, the corners their T,H,W
positions. Above each token is its slot in the pack. <b>← n</b>: the token carries loss, and the output of slot n
predicts it. <b>→ n</b>: it carries no loss, but its output predicts the first token of the answer. Hover over a token
for its id and position.
</p>
$cards
<h2>Packs</h2>
$sections
</body></html>
"""
)
