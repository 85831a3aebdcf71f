"""The baseline: GenLIP written the obvious way, with padded batches and a dense mask, without packing or Megatron-Core.

Every sample is padded to the longest of its batch. Attention is ``F.scaled_dot_product_attention`` under a boolean mask
of [T, T] pairs per sample. The LM head reads every position (``head="all"``) or, as a fairer opponent, only the rows
that predict an answer token (``head="answer"``). Parameters have the names of the authors' released weights, so a state
dict loads without conversion. The file shares no code with ``genlip_megatron.model``, so it is an independent check as
well as the yardstick of the speed figures. As a script it trains on a saved batch, one step per line of its input
(``train_step.py`` does this). ``gpu_baseline.py`` runs the same model on packs.

Legend: B samples, T tokens of the longest sample, M most patches of a sample, D width, H heads, C head channels,
E text width, F inner width of the SwiGLU, V vocabulary, R rows that predict an answer token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genlip_megatron.config import ModelConfig

PATCH_SIZE = 16
IGNORE = -100


@dataclass(frozen=True)
class PaddedBatch:
    """Samples side by side, each padded at its end.

    Attributes:
        patches: float32 [B, M, 3, 16, 16], normalised; zero beyond ``image_lengths``.
        token_ids: int64 [B, T]; image slots first, then text; 0 at image slots and padding.
        position_ids: int64 [3, B, T], the T, H, W rotary positions.
        image_lengths: int64 [B], patches of each sample.
        lengths: int64 [B], image and text tokens of each sample.
        labels: int64 [B, T], the token that each position predicts (already shifted), -100 where there is no loss.
    """

    patches: Tensor
    token_ids: Tensor
    position_ids: Tensor
    image_lengths: Tensor
    lengths: Tensor
    labels: Tensor


def collate(
    patches: list[Tensor], tokens: list[Tensor], labels: list[Tensor], grids: list[tuple[int, int]]
) -> PaddedBatch:
    """Pad samples to the longest.

    Args:
        patches: per sample float32 [h * w, 3, 16, 16], row major.
        tokens: per sample int64 [text], prompt, answer and closing tokens.
        labels: per sample int64 [h * w + text], the token that each position predicts, -100 without loss.
        grids: per sample (h, w) in patches; (0, 0) for a sample without image.

    >>> batch = collate([torch.zeros(2, 3, 16, 16)], [torch.tensor([5])], [torch.tensor([-100, 5, -100])], [(1, 2)])
    >>> batch.position_ids[:, 0].tolist()
    [[0, 0, 2], [0, 0, 2], [0, 1, 2]]
    """
    positions, ids = [], []
    for text, (height, width) in zip(tokens, grids, strict=True):
        image = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T
        steps = max(height, width) + torch.arange(len(text))
        positions.append(torch.cat((image, steps.expand(3, -1)), dim=1).T)
        ids.append(F.pad(text, (height * width, 0)))
    padded = nn.utils.rnn.pad_sequence
    return PaddedBatch(
        patches=padded(patches, batch_first=True),
        token_ids=padded(ids, batch_first=True),
        position_ids=padded(positions, batch_first=True).permute(2, 0, 1),
        image_lengths=torch.tensor([height * width for height, width in grids]),
        lengths=torch.tensor([len(row) for row in ids]),
        labels=padded(labels, batch_first=True, padding_value=IGNORE),
    )


def prefix_mask(image_lengths: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """bool [B, 1, T, T]: whether query q may see key k. Padding sees only itself, which keeps the softmax finite.

    >>> prefix_mask(torch.tensor([2]), torch.tensor([4]), 4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    slots = torch.arange(longest, device=lengths.device)
    query, key = slots[None, :, None], slots[None, None, :]
    image, length = image_lengths[:, None, None], lengths[:, None, None]
    real = (query < length) & (key < length)
    seen = (key < image) | ((query >= image) & (key <= query))
    return ((real & seen) | (query == key))[:, None]


def rotary(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [B, 1, T, C]: channels take the axes T, H, W in turn as far as the sections reach."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-2 * torch.arange(half, device=position_ids.device).float() / config.head_dim)
    angles = position_ids[..., None].float() * frequencies  # [3, B, T, C / 2]
    mixed = angles[0].clone()
    for axis in (1, 2):
        channels = slice(axis, min(half, 3 * config.rope_sections[axis]), 3)
        mixed[..., channels] = angles[axis][..., channels]
    mixed = torch.cat((mixed, mixed), dim=-1)[:, None]
    return mixed.cos().to(dtype), mixed.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of the last axis."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    """Multi-head attention; a sigmoid gate, also computed by ``q_proj``, multiplies its output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width + self.heads * config.gate_rows)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, *gate = self.q_proj(x).split(x.shape[-1], dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, self.k_proj(x), self.v_proj(x)))
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        y = mask(q, k, v) if callable(mask) else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2)  # [B, T, heads, channels]
        if gate:
            y = torch.sigmoid(gate[0]).unflatten(-1, (self.heads, -1)) * y
        return self.out_proj(y.flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.gate_fc = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.gate_fc(x)) * self.fc1(x))


class LayerScale(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class Block(nn.Module):
    """Pre-norm Transformer layer with LayerScale on both branches, without DropPath."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = SwiGLU(config)
        scaled = config.layer_scale_init > 0
        self.layer_scale1 = LayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = LayerScale(config) if scaled else nn.Identity()

    def forward(self, x: Tensor, mask: Any, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x), mask, cos, sin))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class PlainGenLIP(nn.Module):
    """GenLIP on padded batches. Weights come from a state dict or, for timing, from PyTorch's own initialisation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, text_width = config.hidden_size, config.text_hidden_size
        self.vision_embeddings = nn.ModuleDict(
            {"patch_embedding": nn.Conv2d(3, width, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)}
        )
        self.embeddings = nn.Embedding(config.vocab_size, text_width)
        self.visual = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(config.num_layers))})
        self.ln_post = nn.LayerNorm(width, config.layernorm_epsilon)
        self.lm_head = nn.Linear(text_width, config.vocab_size, bias=False)
        if text_width != width:
            self.in_proj = nn.Linear(text_width, width)
            self.proj = nn.Linear(width, text_width)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[B, T, D] from int64 [B, T] token ids."""
        text = self.embeddings(token_ids)
        return self.in_proj(text) if hasattr(self, "in_proj") else text

    def embed_patches(self, patches: Tensor) -> Tensor:
        """[N, D] from normalised patches [N, 3, 16, 16]."""
        return self.vision_embeddings["patch_embedding"](patches.to(self.ln_post.weight.dtype)).flatten(1)

    def encode(self, x: Tensor, mask: Any, position_ids: Tensor, checkpointed: bool = False) -> Tensor:
        """[B, T, D], the output of ``ln_post``, from embeddings [B, T, D].

        Args:
            mask: bool [B, 1, T, T], or a function that computes attention from q, k and v.
            position_ids: int64 [3, B, T].
            checkpointed: recompute every layer in the backward pass.
        """
        cos, sin = rotary(position_ids, self.config, x.dtype)
        for layer in self.visual["layers"].children():
            x = checkpoint(layer, x, mask, cos, sin, use_reentrant=False) if checkpointed else layer(x, mask, cos, sin)
        return self.ln_post(x)

    def features(self, batch: PaddedBatch) -> Tensor:
        """[B, T, D]: the output of ``ln_post``; meaningless at padding."""
        count, longest = batch.token_ids.shape
        most = batch.patches.shape[1]
        patches = self.embed_patches(batch.patches.flatten(0, 1)).view(count, most, -1)
        patches = F.pad(patches, (0, 0, 0, longest - most))
        slots = torch.arange(longest, device=batch.token_ids.device)
        is_image = (slots < batch.image_lengths[:, None])[..., None]
        x = torch.where(is_image, patches, self.embed(batch.token_ids))
        return self.encode(x, prefix_mask(batch.image_lengths, batch.lengths, longest), batch.position_ids)

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.lm_head(self.proj(features) if hasattr(self, "proj") else features)

    def forward(self, batch: PaddedBatch, head: str = "all") -> Tensor:
        """The mean loss over the batch's answer tokens, a float32 scalar.

        Args:
            batch: see ``PaddedBatch``.
            head: ``"all"`` computes logits [B, T, V], including padding; ``"answer"`` only [R, V].
        """
        features, labels = self.features(batch), batch.labels
        if head == "answer":
            rows = labels != IGNORE
            features, labels = features[rows], labels[rows]
        return F.cross_entropy(self.logits(features).flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE)


def trainer(file: Path, head: str) -> Callable[[], float]:
    """One training step (forward, backward, clip, AdamW) on what ``train_step.py`` saved; returns its loss."""
    saved = torch.load(file, weights_only=True)
    torch.set_num_threads(saved["threads"])
    model, batch = PlainGenLIP(ModelConfig(**saved["model"])), PaddedBatch(**saved["batch"])
    model.load_state_dict(saved["weights"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=saved["lr"], betas=saved["betas"], weight_decay=saved["weight_decay"], fused=True
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = model(batch, head=head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), saved["clip"])
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Take one training step for each line of standard input; print its loss and seconds."""
    parser = argparse.ArgumentParser(description="The padded baseline, one training step per line of input.")
    parser.add_argument("file", type=Path, help="model, weights and batch, saved by train_step.py")
    parser.add_argument("--head", choices=("all", "answer"), required=True, help="rows that the LM head reads")
    options = parser.parse_args()
    step = trainer(options.file, options.head)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        print(loss, time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
