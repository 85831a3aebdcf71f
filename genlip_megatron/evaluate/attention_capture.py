"""Measure every layer of one forward pass: attention mass, maps, gates, activations.

GenLIP's layers get their attention as an argument; a hook puts a measuring function in its place. Models of
``transformers`` look their attention function up by name; the entry "sdpa" is replaced for the time of the pass. Both
see queries and keys after rotary embedding. The results of the model stay the same.

Legend: S tokens, H heads, K heads of keys, C channels of a head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlip_megatron.evaluate.attention_mass import BLOCK, attention_map, chance_mass, group_mass, visible_keys
from genlip_megatron.evaluate.patch_statistics import mean_cosine, norm_histogram, outlier_share
from genlip_megatron.hf.modeling_genlip import GenLIPAttention

QUERY_GROUPS = ("image", "prompt", "generated")
KEY_GROUPS = ("first", "prefix", "image", "sink", "prompt", "generated")
SINK = 2  # tokens: the paper's sink is the first two of the prompt (Fig. 10)
CLOSED = 0.05  # a gate below it counts as closed


@dataclass(frozen=True)
class Tokens:
    """A sequence of one image and its text.

    Attributes:
        prefix: tokens before the patches: a class token, registers.
        image: patches.
        prompt: tokens of the prompt.
        generated: tokens that the model wrote, without the end token.
    """

    prefix: int
    image: int
    prompt: int = 0
    generated: int = 0

    def __len__(self) -> int:
        return self.prefix + self.image + self.prompt + self.generated

    def sizes(self) -> dict[str, int]:
        """Size of each group of keys."""
        sink = min(SINK, self.prompt)
        sizes = (min(len(self), 1), self.prefix, self.image, sink, self.prompt, self.generated)
        return dict(zip(KEY_GROUPS, sizes, strict=True))

    def keys(self) -> Tensor:
        """float32 [S, 6]: 1 where a token belongs to a group of ``KEY_GROUPS``. First and sink overlap with others.

        >>> Tokens(0, 2, 1, 1).keys().int().tolist()
        [[1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
        """
        starts = (0, 0, self.prefix, self.prefix + self.image, self.prefix + self.image, len(self) - self.generated)
        members = torch.zeros(len(self), len(KEY_GROUPS))
        for column, (start, size) in enumerate(zip(starts, self.sizes().values(), strict=True)):
            members[start : start + size, column] = 1
        return members

    def queries(self, exclude_self: bool = False) -> Tensor:
        """float32 [S, 3]: 1 where a token belongs to a group of ``QUERY_GROUPS``.

        Args:
            exclude_self: leave the first token of the sequence out, which otherwise counts its attention to itself.
        """
        members = self.keys()[:, [KEY_GROUPS.index(group) for group in QUERY_GROUPS]]
        if exclude_self:
            members[:1] = 0
        return members


@dataclass
class Layer:
    """What one layer did; fields that do not apply to the model are None.

    Attributes:
        mass: float64 [3, 6], ``group_mass`` of ``QUERY_GROUPS`` to ``KEY_GROUPS``.
        map: float32, ``attention_map``, if requested.
        gate: mean of the sigmoid gate over tokens and channels.
        closed: share of gate values below 0.05.
        largest_image: largest |value| of the layer's output at patches and prefix tokens.
        largest_text: the same at text tokens.
        cosine: mean cosine between patches of the layer's output.
        outliers: share of patches with an outlying norm.
    """

    mass: Tensor | None = None
    map: Tensor | None = None
    gate: float | None = None
    closed: float | None = None
    largest_image: float | None = None
    largest_text: float | None = None
    cosine: float | None = None
    outliers: float | None = None


@dataclass
class Recorder:
    """Measures the forward passes of a ``with`` block: one sequence in one pass, without a key-value cache.

    Args:
        model: GenLIP or a model of ``transformers``, on any device.
        blocks: its layers; their outputs are measured.
        image, prompt, generated: tokens of the sequence; what precedes them counts as prefix.
        exclude_self: the image's queries leave out the first token of the sequence.
        block: queries that are processed at once.
        maps: numbers of layers, from 1, whose maps are kept.

    Attributes:
        layers: one for each layer that ran.
        tokens: the sequence, after the pass.
        chance: float64 [3, 6], the mass if attention were equal; None if no attention was seen.
        norms: float64, ``norm_histogram`` of the last layer.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    image: int
    prompt: int = 0
    generated: int = 0
    exclude_self: bool = False
    block: int = BLOCK
    maps: Sequence[int] = ()
    layers: list[Layer] = field(default_factory=list)
    tokens: Tokens | None = None
    chance: Tensor | None = None
    norms: Tensor | None = None

    def __enter__(self) -> Recorder:
        self._attended, self._gated, self._left = 0, 0, 0
        self._stack = ExitStack()
        for block in self.blocks:
            self._keep(block.register_forward_hook(self._output))
        for module in self.model.modules():
            if isinstance(module, GenLIPAttention):
                self._keep(module.register_forward_pre_hook(self._replace))
                if module.gated:
                    self._keep(module.q_proj.register_forward_hook(partial(self._gate, module.q_proj.in_features)))
        self._replace_sdpa()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _layer(self, number: int) -> Layer:
        while len(self.layers) <= number:
            self.layers.append(Layer())
        return self.layers[number]

    def _replace(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rotary, attention = args
        return x, rotary, partial(self._genlip, attention)

    def _genlip(
        self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, layer: int
    ) -> Tensor:
        """As ``PrefixAttention``: [S, H, C] from query, key and value [S, H, C]."""
        visible = visible_keys(len(query) - self.prompt - self.generated, len(query))
        self._attend(query.transpose(0, 1), key.transpose(0, 1), visible, query.shape[-1] ** -0.5)
        return attention(query, key, value, layer)

    def _replace_sdpa(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def measured(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
        ) -> Any:
            if len(query) == 1 and query.shape[2] == key.shape[2]:  # a pooling head has one query
                causal = settings.get("is_causal")
                causal = getattr(module, "is_causal", True) if causal is None else causal
                scale = settings.get("scaling") or query.shape[-1] ** -0.5
                self._attend(query[0], key[0], _visible(query.shape[2], mask, causal), scale)
            return plain(module, query, key, value, mask, **settings)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = measured
        self._stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, "sdpa", plain)

    def _attend(self, query: Tensor, key: Tensor, visible: Tensor, scale: float) -> None:
        """Measure one layer's attention: query [H, S, C], key [K, S, C]."""
        text = self.prompt + self.generated
        tokens = self.tokens = Tokens(len(visible) - self.image - text, self.image, self.prompt, self.generated)
        queries, keys = tokens.queries(self.exclude_self), tokens.keys()
        layer = self._layer(self._attended)
        layer.mass = group_mass(query, key, visible, scale, queries, keys, self.block)
        self.chance = chance_mass(visible, queries, keys)
        self._attended += 1
        if self._attended in self.maps:
            layer.map = attention_map(query, key, visible, scale, self.block)

    def _gate(self, width: int, _: nn.Module, __: Any, output: Tensor) -> None:
        """``output``: [S, D + gate], the query projection with the gate behind it."""
        gate = output[:, width:].float().sigmoid()
        layer = self._layer(self._gated)
        layer.gate, layer.closed = float(gate.mean()), float((gate < CLOSED).float().mean())
        self._gated += 1

    def _output(self, _: nn.Module, __: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        self.measure(states[0] if states.dim() == 3 else states)

    def measure(self, states: Tensor) -> None:
        """Measure one layer's output [S, D]."""
        layer = self._layer(self._left)
        self._left += 1
        end = len(states) - self.prompt - self.generated
        layer.largest_image = float(states[:end].abs().max()) if end else None
        layer.largest_text = float(states[end:].abs().max()) if end < len(states) else None
        if self.image:
            patches = states[end - self.image : end]
            layer.cosine, layer.outliers = mean_cosine(patches), outlier_share(patches)
            self.norms = norm_histogram(patches)


def _visible(tokens: int, mask: Tensor | None, causal: bool) -> Tensor:
    """``visible_keys`` of a mask [1, 1, S, S] of ``transformers``: True or 0.0 where a query sees a key.

    Raises:
        ValueError: a query does not see exactly the first keys, as with a sliding window.
    """
    if mask is None:
        return visible_keys(0 if causal else tokens, tokens)
    seen = (mask if mask.dtype == torch.bool else mask == 0)[0, 0].cpu()
    visible = seen.sum(dim=-1)
    if not bool((seen == (torch.arange(tokens) < visible[:, None])).all()):
        raise ValueError("attention mask: a query does not see the first keys, as with padding or a sliding window")
    return visible.expand(tokens)
