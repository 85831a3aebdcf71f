"""Likelihood of many texts given an image: the image and prompt run once, texts share their common beginnings.

For image x, prompt q and text y of tokens y_1 ... y_n:  log p(y | x, q) = sum_i log p(y_i | x, q, y_1 ... y_{i-1}).

The keys and values of image and prompt are computed once for each image. The texts form trees of tokens (tries): a node
is a token after a given beginning, so that "a photo of a" is computed once for all class names. A tree of T nodes runs
as one sequence whose mask lets a node see the prefix, its ancestors and itself. Leaves need no pass: only the
probability of their token does.

Cost of one image with a prefix of S tokens and N texts of L tokens: S + (nodes with children) tokens through the
layers, where separate passes need N * (S + L).

Legend: B images, T nodes of a tree that run, S slots of the prefix, N texts, H heads, C channels of a head,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genlip_megatron.hf.attention_genlip import text_start
from genlip_megatron.infer.prepare import Prepared, packed

_HEAD_ROWS = 256  # rows of logits at a time: 151,936 tokens in float32 are 0.6 MB a row


class TokenTree:
    """Texts of tokens as one tree.

    Attributes:
        tokens: int64 [nodes], a parent before its children.
        parents: int64 [nodes], -1 for first tokens.
        depths: int64 [nodes], 0 for first tokens.
        ends: int64 [texts], the node of each text's last token.

    >>> tree = TokenTree([[5, 6], [5, 7, 8], [9]])
    >>> tree.tokens.tolist(), tree.parents.tolist(), tree.ends.tolist()
    ([5, 6, 7, 8, 9], [-1, 0, 0, 2, -1], [1, 3, 4])
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        depths: list[int] = []
        ends = []
        for text in texts:
            node = -1
            for depth, token in enumerate(text):
                known = nodes.setdefault((node, token), len(nodes))
                if known == len(depths):
                    depths.append(depth)
                node = known
            ends.append(node)
        self.parents = torch.tensor([parent for parent, _ in nodes], dtype=torch.int64)
        self.tokens = torch.tensor([token for _, token in nodes], dtype=torch.int64)
        self.depths, self.ends = torch.tensor(depths, dtype=torch.int64), torch.tensor(ends)
        # Nodes with children are the ones that run: their output predicts the children.
        self.inner = self.parents[self.parents >= 0].unique()
        place = torch.full((len(nodes) + 1,), -1)  # the last entry serves parent -1
        place[self.inner] = torch.arange(len(self.inner))
        self.predictors = place[self.parents]  # [nodes], which inner node predicts each; -1: the prefix does
        inner_parents = self.predictors[self.inner]
        self.sees = torch.eye(len(self.inner), dtype=torch.bool)  # [T, T], ancestors and itself
        for row, parent in enumerate(inner_parents.tolist()):
            if parent >= 0:
                self.sees[row] |= self.sees[parent]

    def path_sums(self, values: Tensor) -> Tensor:
        """[B, texts] sums along each text's path of ``values`` [B, nodes]."""
        sums = values.clone()
        for depth in range(1, int(self.depths.max()) + 1):
            at = (self.depths == depth).nonzero().squeeze(1)
            sums[:, at] += sums[:, self.parents[at]]
        return sums[:, self.ends]


def trees(texts: Sequence[Sequence[int]], most: int) -> list[tuple[list[int], TokenTree]]:
    """(numbers of the texts, their tree) for groups of texts of at most ``most`` nodes, neighbours in sorted order."""
    groups: list[list[int]] = []
    size, before = most + 1, ()  # type: tuple[int, Sequence[int]]
    for number in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        text = texts[number]
        shared = next((i for i, pair in enumerate(zip(text, before, strict=False)) if pair[0] != pair[1]), None)
        new = len(text) - (min(len(text), len(before)) if shared is None else shared)
        if size + new > most:
            groups.append([])
            size, new = 0, len(text)
        groups[-1].append(number)
        size, before = size + new, text
    return [(group, TokenTree([texts[i] for i in group])) for group in groups]


class _PrefixKeys:
    """Keys and values of the prefix, as ``PrefixAttention`` stores them: [B, H, S, C] for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer: int) -> None:
        self.layers.append((key, value))


class TreeAttention:
    """Attention of a tree's nodes over the prefix, their ancestors and themselves.

    Args:
        prefix: keys and values of the prefix, filled from the back of its slots.
        lengths: int64 [B], tokens of each prefix.
        sees: bool [T, T].
    """

    cache = None

    def __init__(self, prefix: _PrefixKeys, lengths: Tensor, sees: Tensor) -> None:
        self._prefix = prefix
        slots = prefix.layers[0][0].shape[2]
        filled = torch.arange(slots, device=lengths.device) >= slots - lengths[:, None]  # [B, S]
        shape = (len(lengths), len(sees))
        own = sees.to(lengths.device).expand(*shape, len(sees))
        self._mask = torch.cat((filled[:, None].expand(*shape, slots), own), dim=2)[:, None]  # [B, 1, T, S + T]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """[B * T, H, C] from query, key and value [B * T, H, C]."""
        batch = len(self._mask)
        query, key, value = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (query, key, value))
        before = self._prefix.layers[layer]
        key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self._mask)
        return mixed.transpose(1, 2).flatten(0, 1)


class LikelihoodScorer:
    """Log-likelihoods of a fixed list of texts for batches of images.

    Args:
        model: ``GenLIPForCausalLM`` in evaluation mode.
        prompt: token ids between the image and the texts; at least one.
        texts: token ids of each text; none is empty.
        most_nodes: nodes of a tree; more need more memory and run fewer, larger products.
    """

    def __init__(
        self, model: Any, prompt: Sequence[int], texts: Sequence[Sequence[int]], most_nodes: int = 512
    ) -> None:
        assert prompt and all(texts)
        self._model = model
        self._prompt = torch.tensor(prompt, device=model.device)
        self._trees, self._count = trees(texts, most_nodes), len(texts)

    def __call__(self, images: Sequence[Prepared]) -> Tensor:
        """float32 [B, N] of images without errors, on the CPU."""
        patches, grid = packed(images, self._model.device)
        return self._score(patches, grid)

    def without_image(self) -> Tensor:
        """float32 [N], after the prompt only, on the CPU."""
        return self._score(None, torch.zeros(1, 2, dtype=torch.int64, device=self._model.device))[0]

    @torch.inference_mode()
    def _score(self, patches: Tensor | None, grid: Tensor) -> Tensor:
        model, batch = self._model, len(grid)
        prefix = _PrefixKeys()
        ids = self._prompt.expand(batch, -1)
        rows, states = model._begin(ids, patches, None if patches is None else grid, None, prefix)
        last = model.ln_post(states[-1][rows.text_slots[:, -1]])  # [B, D], predicts first tokens
        starts = text_start(grid, model.config.positions) + len(self._prompt)
        scores = torch.empty(batch, self._count)
        for numbers, tree in self._trees:
            hidden = last[:, None]  # [B, 1 + T, D]
            if len(tree.inner):
                tokens = tree.tokens[tree.inner].to(grid.device)
                depths = tree.depths[tree.inner].to(grid.device)
                positions = (starts[:, None] + depths).flatten().expand(3, -1)
                attention = TreeAttention(prefix, rows.lengths, tree.sees)
                output = model.visual(model.in_proj(model.embeddings(tokens.repeat(batch))), positions, attention)[-1]
                hidden = torch.cat((hidden, model.ln_post(output).unflatten(0, (batch, -1))), dim=1)
            scores[:, numbers] = tree.path_sums(self._token_scores(hidden, tree))
        return scores

    def _token_scores(self, hidden: Tensor, tree: TokenTree) -> Tensor:
        """float32 [B, nodes] log-probability of every node's token, from ``hidden`` [B, 1 + T, D] of its predictor."""
        batch, sources = hidden.shape[:2]
        found = torch.empty(batch, len(tree.tokens))
        order = tree.predictors.argsort()
        bounds = torch.searchsorted(tree.predictors[order], torch.arange(-1, sources)).tolist()
        step = max(1, _HEAD_ROWS // batch)
        for start in range(0, sources, step):
            end = min(start + step, sources)
            nodes = order[bounds[start] : bounds[end]]
            logits = self._model.read_out(hidden[:, start:end]).float()  # [B, rows, V]
            rows = (tree.predictors[nodes] + 1 - start).to(hidden.device)
            chosen = logits[:, rows, tree.tokens[nodes].to(hidden.device)] - logits.logsumexp(dim=2)[:, rows]
            found[:, nodes] = chosen.cpu()
        return found
