"""The table of GenLIP's parameters: names, shapes, tensor-parallel layout, initial values and presence.

Everything that needs one of these reads it here: parameter counts, FLOPs, memory estimates, initial weights, conversion
and export. To add a parameter, add a row to ``TABLE``.

A *canonical* tensor belongs to the released format, for example ``visual.layers.3.self_attn.q_proj.weight``: it is
whole, and its layer index is global. A *local* name is that of a parameter of ``GenLIP`` on one rank, with the layer
index within its pipeline stage, for example ``decoder.layers.0.self_attention.linear_qkv.weight``.

Legend of shapes: D hidden size, Q rows of q_proj (D, and those of the output gate behind: D elementwise, one for each
head headwise), F inner size of the SwiGLU, E text
width, V vocabulary; T is the tensor-parallel size.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """How the canonical tensors of one parameter become its tensor-parallel shards, and back.

    Attributes:
        pack: (full canonical tensors, model, T) -> one tensor whose T equal parts are the shards.
        unpack: the inverse of ``pack``.
        dim: the dimension that is sharded; None when every rank holds the whole parameter.
    """

    pack: Callable[[list[Tensor], ModelConfig, int], Tensor] = lambda full, model, size: full[0]
    unpack: Callable[[Tensor, ModelConfig, int], list[Tensor]] = lambda whole, model, size: [whole]
    dim: int | None = None

    def split(self, full: list[Tensor], model: ModelConfig, size: int) -> list[Tensor]:
        """The shards of all T ranks."""
        whole = self.pack(full, model, size)
        return [whole] * size if self.dim is None else list(whole.chunk(size, self.dim))

    def join(self, shards: list[Tensor], model: ModelConfig) -> list[Tensor]:
        """The full canonical tensors. A single shard is not copied: the largest tensors come that way."""
        whole = shards[0] if self.dim is None or len(shards) == 1 else torch.cat(shards, self.dim)
        return self.unpack(whole, model, len(shards))


def _pack_vocabulary(full: list[Tensor], model: ModelConfig, size: int) -> Tensor:
    padding = padded_vocab_size(model.vocab_size, size) - model.vocab_size
    return F.pad(full[0], (0, 0, 0, padding)) if padding else full[0]


def _pack_qkv(full: list[Tensor], model: ModelConfig, size: int) -> Tensor:
    """Whole q, gate, k, v -> [q, gate, k, v] head by head, the order of Megatron-Core's attention."""
    query, key, value = full
    queries = query.split(len(key))  # q, and the gate where the model has one
    parts = [part.unflatten(0, (model.num_attention_heads, -1)) for part in (*queries, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _unpack_qkv(whole: Tensor, model: ModelConfig, size: int) -> list[Tensor]:
    rows = (model.head_dim, model.gate_rows, model.head_dim, model.head_dim)
    heads = whole.unflatten(0, (model.num_attention_heads, -1))
    query, gate, key, value = (part.flatten(0, 1) for part in heads.split(rows, dim=1))
    return [torch.cat((query, gate)), key, value]


def _pack_swiglu(full: list[Tensor], model: ModelConfig, size: int) -> Tensor:
    """Each rank stores its part of the gate above its part of the value."""
    return torch.stack([tensor.unflatten(0, (size, -1)) for tensor in full], dim=1).flatten(0, 2)


def _unpack_swiglu(whole: Tensor, model: ModelConfig, size: int) -> list[Tensor]:
    return [part.flatten(0, 1) for part in whole.unflatten(0, (size, 2, -1)).unbind(1)]


REPLICATED = Layout()
PATCH = Layout(
    lambda full, model, size: full[0].flatten(1), lambda whole, model, size: [whole.unflatten(1, (3, 16, 16))]
)
COLUMNS = Layout(dim=1)
VOCABULARY = Layout(_pack_vocabulary, lambda whole, model, size: [whole[: model.vocab_size]], dim=0)
QKV = Layout(_pack_qkv, _unpack_qkv, dim=0)
SWIGLU = Layout(_pack_swiglu, _unpack_swiglu, dim=0)

# Initial values, see ``weights.initial_tensor``.
NORMAL, XAVIER, ZEROS, ONES, LAYER_SCALE = "normal", "xavier", "zeros", "ones", "layer_scale"

LAYER = "decoder.layers.{i}."


def has_projections(model: ModelConfig) -> bool:
    """Whether the text width differs from the hidden size, so that linears convert between them."""
    return model.text_hidden_size != model.hidden_size


def has_layer_scale(model: ModelConfig) -> bool:
    """Whether residual branches have a learned scale."""
    return model.layer_scale_init != 0


@dataclass(frozen=True)
class Entry:
    """One parameter of ``GenLIP``.

    Attributes:
        local: its local name; ``{i}`` stands for the layer index.
        canonical: (name, shape) of each canonical tensor in it; the letters of a shape are those of the legend.
        layout: how tensor parallelism cuts it.
        init: kind of initial value.
        present: whether a model has it.
        frozen_by: the ``ModelConfig`` setting that freezes it; "" for a part of the vision encoder, which is always
            trained. An export of the encoder leaves out all other parameters: those of text input and output.
    """

    local: str
    canonical: tuple[tuple[str, str], ...]
    layout: Layout
    init: str
    present: Callable[[ModelConfig], bool] = lambda model: True
    frozen_by: str = ""


def _weight_and_bias(
    local: str, canonical: Mapping[str, str], layout: Layout, init: str, bias_layout: Layout = REPLICATED, **more: Any
) -> tuple[Entry, Entry]:
    weights = tuple((f"{name}.weight", shape) for name, shape in canonical.items())
    biases = tuple((f"{name}.bias", shape.split()[0]) for name, shape in canonical.items())
    return (
        Entry(f"{local}.weight", weights, layout, init, **more),
        Entry(f"{local}.bias", biases, bias_layout, ZEROS, **more),
    )


def _norm(local: str, canonical: str) -> tuple[Entry, Entry]:
    return _weight_and_bias(local, {canonical: "D"}, REPLICATED, ONES)


def _layer_entries() -> list[Entry]:
    name = "visual.layers.{i}."
    attention = {f"{name}self_attn.{part}_proj": f"{rows} D" for part, rows in (("q", "Q"), ("k", "D"), ("v", "D"))}
    entries = [
        *_norm(f"{LAYER}input_layernorm", f"{name}layer_norm1"),
        *_norm(f"{LAYER}pre_mlp_layernorm", f"{name}layer_norm2"),
        *_weight_and_bias(f"{LAYER}self_attention.linear_qkv", attention, QKV, XAVIER, QKV),
        *_weight_and_bias(f"{LAYER}self_attention.linear_proj", {f"{name}self_attn.out_proj": "D D"}, COLUMNS, XAVIER),
        *_weight_and_bias(
            f"{LAYER}mlp.linear_fc1", {f"{name}mlp.gate_fc": "F D", f"{name}mlp.fc1": "F D"}, SWIGLU, NORMAL, SWIGLU
        ),
        *_weight_and_bias(f"{LAYER}mlp.linear_fc2", {f"{name}mlp.fc2": "D F"}, COLUMNS, NORMAL),
    ]
    scales = [
        Entry(f"{LAYER}{branch}.scale", ((f"{name}{own}.lambda1", "D"),), REPLICATED, LAYER_SCALE, has_layer_scale)
        for branch, own in (("self_attn_bda", "layer_scale1"), ("mlp_bda", "layer_scale2"))
    ]
    # The order of tensors in exported files: weights, biases, scales.
    return sorted(entries, key=lambda entry: entry.local.endswith(".bias")) + scales


def _projection(local: str, canonical: str, shape: str, frozen_by: str) -> tuple[Entry, Entry]:
    return _weight_and_bias(local, {canonical: shape}, REPLICATED, NORMAL, present=has_projections, frozen_by=frozen_by)


_PATCHES = "vision_embeddings.patch_embedding"
TABLE: tuple[Entry, ...] = (
    Entry("embed.patch_weight", ((f"{_PATCHES}.weight", "D 3 16 16"),), PATCH, NORMAL),
    Entry("embed.patch_bias", ((f"{_PATCHES}.bias", "D"),), REPLICATED, ZEROS),
    Entry("embed.tokens.weight", (("embeddings.weight", "V E"),), VOCABULARY, NORMAL, frozen_by="freeze_embeddings"),
    *_projection("embed.in_proj", "in_proj", "D E", "freeze_embeddings"),
    *_layer_entries(),
    *_norm("head.ln_post", "ln_post"),
    *_projection("head.proj", "proj", "E D", "freeze_head"),
    Entry("head.weight", (("lm_head.weight", "V E"),), VOCABULARY, NORMAL, frozen_by="freeze_head"),
)
_BY_LOCAL = {entry.local: entry for entry in TABLE}
_BY_CANONICAL = {name: (entry, shape) for entry in TABLE for name, shape in entry.canonical}

# Names of norms that Transformer Engine fuses into the next linear -> names of separate norms. Checkpoints use the
# separate names, so each kind of layer can read checkpoints of the other.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# Part of the names of FP8 scales and amax histories, which a checkpoint holds beside the weights (fp8_state.py).
FP8_STATE = ".fp8."


def is_fp8_state(name: str) -> bool:
    """Whether a tensor of a checkpoint is FP8 state.

    >>> is_fp8_state("decoder.layers.mlp.linear_fc1.fp8.scale_fwd"), is_fp8_state("head.weight")
    (True, False)
    """
    return FP8_STATE in name


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of embedding and head, padded so that every tensor-parallel rank holds the same number.

    >>> padded_vocab_size(511, 2)
    512
    """
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def _shape(text: str, model: ModelConfig) -> tuple[int, ...]:
    width = model.hidden_size
    sizes = {
        "D": width,
        "Q": width + model.num_attention_heads * model.gate_rows,
        "F": model.ffn_hidden_size,
        "E": model.text_hidden_size,
        "V": model.vocab_size,
    }
    return tuple(sizes[letter] if letter in sizes else int(letter) for letter in text.split())


def find(local_name: str, layer_offset: int = 0) -> tuple[tuple[str, ...], Entry]:
    """(canonical names, table entry) of a parameter; ``layer_offset`` is the number of layers on earlier stages.

    Raises:
        KeyError: the table has no such parameter.
    """
    parts = local_name.split(".")
    layer = None
    if parts[:2] == ["decoder", "layers"]:
        layer = int(parts[2]) + layer_offset
        parts[2] = "{i}"
    name = ".".join(parts)
    for fused, separate in FUSED_NORMS.items():
        name = name.replace(fused, separate)
    entry = _BY_LOCAL[name]
    return tuple(canonical.format(i=layer) for canonical, _ in entry.canonical), entry


def find_canonical(name: str) -> tuple[Entry, str]:
    """(table entry, shape as in the table) of a canonical tensor.

    Raises:
        KeyError: the table has no such tensor.
    """
    return _BY_CANONICAL[_template(name)]


def _template(name: str) -> str:
    return re.sub(r"^visual\.layers\.\d+\.", "visual.layers.{i}.", name)


def in_encoder(name: str) -> bool:
    """Whether a canonical tensor belongs to the vision encoder, not only to text input or output.

    >>> in_encoder("visual.layers.0.mlp.fc1.weight"), in_encoder("lm_head.weight")
    (True, False)
    """
    row = _BY_CANONICAL.get(_template(name))
    return row is None or not row[0].frozen_by


def freeze(model: torch.nn.Module, config: ModelConfig) -> None:
    """Turn off gradients of the parameters that ``freeze_embeddings`` and ``freeze_head`` name."""
    for name, parameter in model.named_parameters():
        setting = find(name)[1].frozen_by
        if setting and getattr(config, setting):
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class ModelParameter:
    """One parameter of a whole model, the unit of conversion.

    Attributes:
        key: its name in a checkpoint, where the layers' parameters of one name are slices of one tensor.
        layer: which slice; None for a parameter outside the layers.
        shapes: canonical name -> shape, of its canonical tensors.
        stored: the parameter's shape without tensor parallelism.
        layout: how the canonical tensors lie in it.
    """

    key: str
    layer: int | None
    shapes: dict[str, tuple[int, ...]]
    stored: tuple[int, ...]
    layout: Layout


def model_parameters(model: ModelConfig) -> Iterator[ModelParameter]:
    """Every parameter of a model, in the order of the forward pass."""
    entries = [entry for entry in TABLE if entry.present(model)]
    for layered, group in itertools.groupby(entries, lambda entry: entry.local.startswith(LAYER)):
        for layer, entry in itertools.product(range(model.num_layers) if layered else (None,), group):
            shapes = {name.format(i=layer): _shape(shape, model) for name, shape in entry.canonical}
            key = entry.local.replace("{i}.", "")
            yield ModelParameter(key, layer, shapes, _shard_shape(entry, model, 1), entry.layout)


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model with its shape, in the order of the forward pass."""
    return {name: shape for parameter in model_parameters(model) for name, shape in parameter.shapes.items()}


@functools.cache
def _shard_shape(entry: Entry, model: ModelConfig, size: int) -> tuple[int, ...]:
    full = [torch.empty(_shape(shape, model), device="meta") for _, shape in entry.canonical]
    return tuple(entry.layout.split(full, model, size)[0].shape)


@functools.cache
def rank_sizes(model: ModelConfig, tensor_parallel_size: int = 1) -> dict[str, int]:
    """Local name with ``{i}`` -> elements that one tensor-parallel rank holds of that parameter, in one layer."""
    return {
        entry.local: torch.Size(_shard_shape(entry, model, tensor_parallel_size)).numel()
        for entry in TABLE
        if entry.present(model)
    }


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model."""
    return sum(size * (model.num_layers if name.startswith(LAYER) else 1) for name, size in rank_sizes(model).items())


@functools.cache
def layer_matrix_size(model: ModelConfig, tensor_parallel_size: int = 1, part: str = "") -> int:
    """Elements of one layer's matrices on one rank: the multiply-adds of one token in its linears.

    Args:
        part: only names that begin with this, for example "mlp.".
    """
    sizes = rank_sizes(model, tensor_parallel_size)
    matrices = [name for name in sizes if _BY_LOCAL[name].init in (NORMAL, XAVIER)]
    return sum(sizes[name] for name in matrices if name.startswith(LAYER + part))


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The settings of ``ModelConfig`` that canonical tensors reveal by their shapes and names.

    Raises:
        ValueError: a tensor that every model has is missing or is not a matrix.
    """
    letters: dict[str, int] = {}
    layer = "visual.layers.{i}."
    for template in ("embeddings.weight", *(f"{layer}{name}.weight" for name in _MEASURED)):
        name = template.format(i=0)
        if name not in shapes:
            raise ValueError(f"the weights have no {name}: they are not a whole GenLIP model in the released format")
        if len(shapes[name]) != 2:
            raise ValueError(f"{name} is {list(shapes[name])}; expected a matrix")
        letters |= zip(_BY_CANONICAL[template][1].split(), shapes[name], strict=True)
    # Malformed names are reported as unexpected when all tensors are compared.
    numbers = [name.split(".")[2] for name in shapes if name.startswith("visual.layers.")]
    return {
        "vocab_size": letters["V"],
        "text_hidden_size": letters["E"],
        "hidden_size": letters["D"],
        "num_layers": max(int(number) for number in numbers if number.isascii() and number.isdigit()) + 1,
        "ffn_hidden_size": letters["F"],
        "attention_output_gate": {0: "none", letters["D"]: "elementwise"}.get(letters["Q"] - letters["D"], "headwise"),
        "layer_scale_init": 0.1 if f"{layer}layer_scale1.lambda1".format(i=0) in shapes else 0.0,
    }


# ``sizes_of`` reads these shapes in order, so the last one sets D.
_MEASURED = ("mlp.fc1", "self_attn.q_proj", "self_attn.k_proj")
