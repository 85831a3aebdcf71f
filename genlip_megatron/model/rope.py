"""Interleaved multi-axis rotary positions (T, H, W), as pure functions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def axis_of_channel(head_dim: int, sections: tuple[int, ...], chunked: bool = False) -> Tensor:
    """int64 [head_dim / 2]: the axis (0 T, 1 H, 2 W) whose position turns each rotary channel.

    Channel i turns by H when ``i % 3 == 1 and i < 3 * sections[1]``, by W when ``i % 3 == 2 and
    i < 3 * sections[2]``, else by T. ``sections[0]`` follows from the other two and is not read.

    Args:
        chunked: instead, the first ``sections[0]`` channels turn by T, the next by H, the last by W.

        >>> axis_of_channel(16, (2, 2, 1)).tolist()
        [0, 1, 2, 0, 1, 0, 0, 0]
        >>> axis_of_channel(16, (3, 3, 2), chunked=True).tolist()
        [0, 0, 0, 1, 1, 1, 2, 2]
    """
    if chunked:
        return torch.arange(3).repeat_interleave(torch.tensor(sections))
    channels = torch.arange(head_dim // 2)
    axes = torch.zeros_like(channels)
    axes[(channels % 3 == 1) & (channels < 3 * sections[1])] = 1
    axes[(channels % 3 == 2) & (channels < 3 * sections[2])] = 2
    return axes


@functools.cache
def _axes_on(device: torch.device, head_dim: int, sections: tuple[int, ...], chunked: bool) -> Tensor:
    """``axis_of_channel`` on ``device``, copied there once."""
    return axis_of_channel(head_dim, sections, chunked).to(device)


def rotary_cos_sin(
    position_ids: Tensor,
    head_dim: int,
    sections: tuple[int, ...],
    theta: float,
    dtype: torch.dtype,
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [S, head_dim], computed in float32 and cast to ``dtype``.

    Args:
        position_ids: int64 [3, S], the T, H, W position of each token.
        head_dim: channels of one head, even.
        sections, chunked: see ``axis_of_channel``.
        theta: base; channel i turns by ``position * theta ** (-2 i / head_dim)``.
    """
    device = position_ids.device
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    positions = position_ids.to(torch.float32)[_axes_on(device, head_dim, sections, chunked)]  # [head_dim/2, S]
    angles = positions.T * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` in place; with ``-sin`` it turns back, which is the gradient."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (half.chunk(2, dim=-1)[0][:, None] for half in (cos, sin))
    old = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(old, sin)
    return x


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [S, H, head_dim] by the angles of ``cos`` and ``sin`` [S, head_dim] (rotate-half convention)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
