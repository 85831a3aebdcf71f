"""Which bytes of a micro-batch each rank reads, and how the ranks of one micro-batch exchange them.

The ranks of a model-parallel group work on the same micro-batches. The first pipeline stage reads images, each rank
those in its part of the sequence. The last stage reads captions, dealt to its ranks. Stages in between read nothing.
The group then exchanges token ids and the flags of bad samples, so every rank has the same micro-batch except for
pixels.

This happens in the loaders' threads, ahead of the step, over a CPU process group of its own. An error in a sample
becomes a flag, never an exception on one rank, so the ranks stay in step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ReadAssignment:
    """A rank's place among the ranks with the same micro-batches. The default is a single rank.

    Attributes:
        images: it reads images (first pipeline stage).
        captions: it reads captions (last pipeline stage).
        index, count: its place among the tensor- and context-parallel ranks of its stage.
        split_images: each of these ranks embeds its own part of the sequence and needs only its own pixels (sequence
            or context parallelism). Otherwise the first rank reads all patches and sends them to the others.
        group: gloo process group of the whole model-parallel group; None for a single rank.
        sources: global ranks of the ``count`` ranks of the first stage, in order; needed to send patches.
    """

    images: bool = True
    captions: bool = True
    index: int = 0
    count: int = 1
    split_images: bool = True
    group: Any = None
    sources: tuple[int, ...] = ()

    def slots(self, total: int) -> tuple[int, int]:
        """[first, last) of ``total`` slots whose images this rank reads; empty on stages without images.

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
        """Whether this rank reads and tokenises the caption of the micro-batch's sample ``number``."""
        return self.captions and number % self.count == self.index

    def any_stops(self, stop: bool) -> bool:
        """Whether any rank stops before its next micro-batch. Then all stop, so no rank waits for one that has left."""
        if self.group is None:
            return stop
        flag = torch.tensor([int(stop)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def add_up(self, values: Tensor) -> Tensor:
        """Sum int32 ``values`` over the group, in place; each rank has filled in what it read."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def send_patches(self, patches: Tensor | None, rows: int, width: int) -> Tensor | None:
        """Send uint8 [rows, width] patches from the first rank of the first stage to its other ranks, over the CPU."""
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
