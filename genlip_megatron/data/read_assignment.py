"""Which bytes of a micro-batch each rank reads, and how the ranks of one micro-batch exchange what they read.

A model-parallel group works on the same micro-batches. Its first pipeline stage reads images, each rank those in its
share of the sequence; its last stage reads captions, dealt out over its ranks; the stages between read nothing. Token
ids and verdicts on bad samples then go round the group, so that every rank holds the same micro-batch but for pixels.

This happens in the loaders' threads, ahead of the step, over a process group of its own on the CPU. What can go wrong
with one sample becomes a verdict, never an exception on one rank, so the ranks stay in step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ReadAssignment:
    """A rank's place among those that work on the same micro-batches. The default is a rank alone.

    Attributes:
        images: it reads images (first pipeline stage).
        captions: it reads captions (last pipeline stage).
        index, count: its place among the tensor- and context-parallel ranks of its stage.
        split_images: each of them embeds its own part of the sequence and needs no other pixels (sequence or context
            parallelism); else the first of them reads and sends the patches to the others.
        group: gloo process group of the whole model-parallel group; None for a rank alone.
        sources: global ranks of the ``count`` ranks of the first stage, in order; needed when patches are sent.
    """

    images: bool = True
    captions: bool = True
    index: int = 0
    count: int = 1
    split_images: bool = True
    group: Any = None
    sources: tuple[int, ...] = ()

    def slots(self, total: int) -> tuple[int, int]:
        """[first, last) of ``total`` slots whose images this rank reads; empty on stages that read none.

        >>> ReadAssignment(index=1, count=4).slots(64), ReadAssignment(images=False).slots(64)
        ((16, 32), (0, 0))
        """
        if not self.images:
            return 0, 0
        if not self.split_images:
            return (0, total) if self.index == 0 else (0, 0)
        share = -(-total // self.count)
        return min(self.index * share, total), min((self.index + 1) * share, total)

    def reads_caption(self, number: int) -> bool:
        """Whether the micro-batch's sample ``number`` is this rank's to read and tokenise."""
        return self.captions and number % self.count == self.index

    def any_stops(self, stop: bool) -> bool:
        """Whether any rank stops before its next micro-batch; then all do, and none waits for one that has gone."""
        if self.group is None:
            return stop
        flag = torch.tensor([int(stop)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def add_up(self, values: Tensor) -> Tensor:
        """int32 ``values`` summed over the group, in place; each rank filled in what it read."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def send_patches(self, patches: Tensor | None, rows: int, width: int) -> Tensor | None:
        """uint8 [rows, width] patches on the CPU, from the first stage's first rank to the others of that stage."""
        if self.group is None or self.split_images or self.count == 1 or not self.images or not rows:
            return patches
        if self.index:
            patches = torch.empty(rows, width, dtype=torch.uint8)
            dist.recv(patches, self.sources[0], group=self.group)
            return patches
        assert patches is not None
        patches = patches.cpu()
        for target in self.sources[1:]:
            dist.send(patches, target, group=self.group)
        return patches
