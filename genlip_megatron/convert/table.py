"""One table of names and layouts: the authors' released format on one side, this project's parameters on the other.

It serves every direction: initial weights (full tensors cut for a rank), comparing gradients, and converting
checkpoints both ways. A *canonical* name is one of the released format, for example
``visual.layers.3.self_attn.q_proj.weight``; layer indices in it are global. A *local* name is that of a parameter of
``GenLIP``, with the layer index within the pipeline stage.

Legend: D hidden size, F inner size, E text width, V vocabulary, H heads, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.config import ModelConfig

# split: full canonical tensors -> the shards of all T ranks; join is its inverse.
Split = Callable[[list[Tensor], ModelConfig, int], list[Tensor]]
Join = Callable[[list[Tensor], ModelConfig], list[Tensor]]


@dataclass(frozen=True)
class Layout:
    """How canonical tensors become tensor-parallel shards of one parameter, and back.

    ``dim`` is the dimension that the ranks share out; None when every rank holds the whole.
    """

    split: Split
    join: Join
    dim: int | None = None


@dataclass(frozen=True)
class Entry:
    """One parameter: its local name, the canonical tensors in it, and their layout. ``{i}`` is the layer index."""

    local: str
    canonical: tuple[str, ...]
    layout: Layout


def _same(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    return [full[0]] * size


def _first(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    return [shards[0]]


def _split_patch(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    return [full[0].flatten(1)] * size


def _join_patch(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    return [shards[0].unflatten(1, (3, 16, 16))]


def _together(shards: list[Tensor], dim: int = 0) -> Tensor:
    """The whole of shards; one alone is not copied, since the largest tensors come that way."""
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=dim)


def _split_columns(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    return list(full[0].chunk(size, dim=1))


def _join_columns(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    return [_together(shards, dim=1)]


def _split_vocabulary(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    rows = -(-model.vocab_size // size) * size
    padded = full[0] if rows == model.vocab_size else F.pad(full[0], (0, 0, 0, rows - model.vocab_size))
    return list(padded.chunk(size))


def _join_vocabulary(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    return [_together(shards)[: model.vocab_size]]


def _split_qkv(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    """All q then all gate, k, v -> [q, gate, k, v] of each head in turn, which Megatron-Core's attention expects."""
    query, key, value = full
    heads = model.num_attention_heads
    parts = list(query.chunk(2)) if model.attention_output_gate else [query]
    parts = [part.unflatten(0, (heads, model.head_dim)) for part in (*parts, key, value)]
    return list(torch.stack(parts, dim=1).flatten(0, 2).chunk(size))


def _join_qkv(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    count = 4 if model.attention_output_gate else 3
    parts = _together(shards).unflatten(0, (model.num_attention_heads, count, model.head_dim))
    query, *gate, key, value = (part.flatten(0, 1) for part in parts.unbind(1))
    return [torch.cat((query, *gate)), key, value]


def _split_swiglu(full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
    """Each rank stores its part of the gate above its part of the value."""
    gate, value = (tensor.chunk(size) for tensor in full)
    return [torch.cat(pair) for pair in zip(gate, value, strict=True)]


def _join_swiglu(shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
    gates, values = zip(*(shard.chunk(2) for shard in shards), strict=True)
    return [torch.cat(gates), torch.cat(values)]


REPLICATED = Layout(_same, _first)
PATCH = Layout(_split_patch, _join_patch)
COLUMNS = Layout(_split_columns, _join_columns, dim=1)
VOCABULARY = Layout(_split_vocabulary, _join_vocabulary, dim=0)
QKV = Layout(_split_qkv, _join_qkv, dim=0)
SWIGLU = Layout(_split_swiglu, _join_swiglu, dim=0)

_LAYER, _NAME = "decoder.layers.{i}.", "visual.layers.{i}."


def _layer_entries() -> list[Entry]:
    entries = []
    for kind in ("weight", "bias"):
        attention = tuple(f"{_NAME}self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
        swiglu = tuple(f"{_NAME}mlp.{name}.{kind}" for name in ("gate_fc", "fc1"))
        row = COLUMNS if kind == "weight" else REPLICATED
        entries += [
            Entry(f"{_LAYER}input_layernorm.{kind}", (f"{_NAME}layer_norm1.{kind}",), REPLICATED),
            Entry(f"{_LAYER}pre_mlp_layernorm.{kind}", (f"{_NAME}layer_norm2.{kind}",), REPLICATED),
            Entry(f"{_LAYER}self_attention.linear_qkv.{kind}", attention, QKV),
            Entry(f"{_LAYER}self_attention.linear_proj.{kind}", (f"{_NAME}self_attn.out_proj.{kind}",), row),
            Entry(f"{_LAYER}mlp.linear_fc1.{kind}", swiglu, SWIGLU),
            Entry(f"{_LAYER}mlp.linear_fc2.{kind}", (f"{_NAME}mlp.fc2.{kind}",), row),
        ]
    for branch, number in (("self_attn_bda", 1), ("mlp_bda", 2)):
        entries.append(Entry(f"{_LAYER}{branch}.scale", (f"{_NAME}layer_scale{number}.lambda1",), REPLICATED))
    return entries


TABLE: tuple[Entry, ...] = (
    Entry("embed.patch_weight", ("vision_embeddings.patch_embedding.weight",), PATCH),
    Entry("embed.patch_bias", ("vision_embeddings.patch_embedding.bias",), REPLICATED),
    Entry("embed.tokens.weight", ("embeddings.weight",), VOCABULARY),
    Entry("embed.in_proj.weight", ("in_proj.weight",), REPLICATED),
    Entry("embed.in_proj.bias", ("in_proj.bias",), REPLICATED),
    *_layer_entries(),
    Entry("head.ln_post.weight", ("ln_post.weight",), REPLICATED),
    Entry("head.ln_post.bias", ("ln_post.bias",), REPLICATED),
    Entry("head.proj.weight", ("proj.weight",), REPLICATED),
    Entry("head.proj.bias", ("proj.bias",), REPLICATED),
    Entry("head.weight", ("lm_head.weight",), VOCABULARY),
)
_BY_LOCAL = {entry.local: entry for entry in TABLE}
# Within a layer, names of the norms that Transformer Engine fuses into the linears behind them, and those of norms that
# stand alone. Checkpoints know the latter only, so that layers of either kind read those of the other.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# In the names of FP8 scales and their histories, which stand beside a checkpoint's weights; see model/fp8_state.py.
FP8_STATE = ".fp8."

# What a vision encoder alone has no use for: the text's way in and out.
TEXT_ONLY = tuple(f"{name}." for name in ("embeddings", "in_proj", "proj", "lm_head"))


def find(local_name: str, layer_offset: int) -> tuple[tuple[str, ...], Layout]:
    """(canonical names, layout) of a parameter; ``layer_offset`` is the number of layers on earlier stages.

    Raises:
        KeyError: the table does not know the parameter.
    """
    parts = local_name.split(".")
    layer = None
    if parts[:2] == ["decoder", "layers"]:
        layer = int(parts[2]) + layer_offset
        parts[2] = "{i}"
    name = ".".join(parts)
    for fused, alone in FUSED_NORMS.items():
        name = name.replace(fused, alone)
    entry = _BY_LOCAL[name]
    return tuple(name.format(i=layer) for name in entry.canonical), entry.layout


@dataclass(frozen=True)
class Group:
    """What is converted at once: a parameter and the canonical tensors in it.

    Attributes:
        key: its name in a checkpoint, where the layers' parameters of one name are slices of one tensor.
        layer: which slice, or None for a parameter outside the layers.
        canonical: names of the canonical tensors.
        shapes: their shapes.
        stored: the parameter's shape without tensor parallelism.
        layout: how the canonical tensors lie in it.
    """

    key: str
    layer: int | None
    canonical: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    stored: tuple[int, ...]
    layout: Layout


def groups(model: ModelConfig) -> Iterator[Group]:
    """Every parameter of a model, in the order of the forward pass."""
    shapes = canonical_shapes(model)
    first = next(i for i, entry in enumerate(TABLE) if entry.local.startswith(_LAYER))
    layered = tuple(entry for entry in TABLE if entry.local.startswith(_LAYER))
    for entries, layer in (
        (TABLE[:first], None),
        *((layered, i) for i in range(model.num_layers)),
        (TABLE[first + len(layered) :], None),
    ):
        for entry in entries:
            names = tuple(name.format(i=layer) for name in entry.canonical)
            if names[0] in shapes:
                full = [torch.empty(shapes[name], device="meta") for name in names]
                stored = entry.layout.split(full, model, 1)[0].shape
                key = entry.local.replace("{i}.", "")
                yield Group(key, layer, names, tuple(shapes[name] for name in names), tuple(stored), entry.layout)


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model with its shape, in the order of the forward pass."""
    width, inner, text = model.hidden_size, model.ffn_hidden_size, model.text_hidden_size
    query = 2 * width if model.attention_output_gate else width
    shapes: dict[str, tuple[int, ...]] = {
        "vision_embeddings.patch_embedding.weight": (width, 3, 16, 16),
        "vision_embeddings.patch_embedding.bias": (width,),
        "embeddings.weight": (model.vocab_size, text),
    }
    if text != width:
        shapes |= {"in_proj.weight": (width, text), "in_proj.bias": (width,)}
    for i in range(model.num_layers):
        layer = {
            "layer_norm1": (width,),
            "layer_norm2": (width,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (width, width),
            "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "mlp.gate_fc": (inner, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        for name, shape in layer.items():
            shapes[f"visual.layers.{i}.{name}.weight"] = shape
            shapes[f"visual.layers.{i}.{name}.bias"] = shape[:1]
        if model.layer_scale_init:
            shapes |= {f"visual.layers.{i}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
    shapes |= {"ln_post.weight": (width,), "ln_post.bias": (width,)}
    if text != width:
        shapes |= {"proj.weight": (text, width), "proj.bias": (text,)}
    shapes["lm_head.weight"] = (model.vocab_size, text)
    return shapes
