"""Embed image patches and text tokens into one stream of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from genlip_megatron.batch import PATCH_VALUES, PackedBatch
from genlip_megatron.config import ModelConfig
from genlip_megatron.device import to_device
from genlip_megatron.model.state_dict import has_projections, padded_vocab_size
from genlip_megatron.parallel.sequence import local_slots, slot_share


@dataclass(frozen=True)
class ImageSlots:
    """The slots of a rank that hold image patches.

    Attributes:
        slots: int64 [P_local], on the device: image slots, counted from the rank's first slot.
        first_patch: row of ``PackedBatch.patches`` that goes into the first image slot; the others follow.
        spare: the index one past the rank's last slot collects padding patches.
    """

    slots: Tensor
    first_patch: int
    spare: bool = False

    @classmethod
    def of(cls, batch: PackedBatch, slots: slice, device: torch.device, fixed_shapes: bool = False) -> ImageSlots:
        """For a rank that holds ``slots``. The host waits for a batch that is not on the CPU.

        Args:
            fixed_shapes: the batch has one patch for each slot, the last ones padding.
        """
        is_image = batch.is_image.cpu().numpy()
        found = torch.from_numpy(np.flatnonzero(is_image[slots]))
        if fixed_shapes:
            found = F.pad(found, (0, len(is_image) - len(found)), value=len(is_image))
            return cls(to_device(found, device), 0, spare=True)
        before = int(np.count_nonzero(is_image[: slots.start]))
        return cls(to_device(found, device), before - batch.first_patch)


class Embedding(MegatronModule):
    """Patch and token embedding.

    Every rank embeds only its own slots. Under sequence parallelism each rank's replicated parameters see only its
    shard of the tokens, so they are marked ``sequence_parallel``: their gradients are summed over the group.

    Args:
        context: context-parallel group; None when its ranks do not share the sequence.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, tp_group: Any, context: Any = None) -> None:
        super().__init__(config=config)
        self.tp_group, self.context = tp_group, context
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.patch_weight = torch.nn.Parameter(torch.empty(model.hidden_size, PATCH_VALUES, **options))
        self.patch_bias = torch.nn.Parameter(torch.empty(model.hidden_size, **options))
        self.tokens = tensor_parallel.VocabParallelEmbedding(
            padded_vocab_size(model.vocab_size, tp_group.size()),
            model.text_hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )
        self.in_proj: torch.nn.Linear | None = None
        if has_projections(model):
            self.in_proj = torch.nn.Linear(model.text_hidden_size, model.hidden_size, **options)
        shared = [self.patch_weight, self.patch_bias, *(self.in_proj.parameters() if self.in_proj else ())]
        for parameter in shared:
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, batch: PackedBatch, images: ImageSlots) -> Tensor:
        """Hidden states [S_local, 1, D] of the slots that this rank holds."""
        assert batch.patches is not None
        sequence = self.tp_group if self.config.sequence_parallel else None
        slots = local_slots(batch.num_tokens, self.context, sequence)
        pixels = batch.patches
        if sequence is not None or self.context is not None:
            pixels = pixels[images.first_patch : images.first_patch + len(images.slots)]
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(torch.float32).mul_(1 / 127.5).sub_(1.0)  # (x / 255 - 0.5) / 0.5

        token_ids = batch.token_ids[slot_share(batch.num_tokens, self.context)]
        text = self.tokens(token_ids[None])  # [1, S / C, E], or [S_local, 1, E] when it scatters
        text = text.reshape(slots.stop - slots.start, -1)
        if self.in_proj is not None:
            text = self.in_proj(text)
        # A batch without images carries one blank patch, so that the weight still gets a gradient (of zero).
        image = F.linear(pixels.to(self.patch_weight.dtype), self.patch_weight, self.patch_bias)[: len(images.slots)]
        if images.spare:
            return F.pad(text, (0, 0, 0, 1))[:, None].index_copy(0, images.slots, image[:, None])[:-1]
        # A new tensor, not a view: FSDP attaches its backward hook to the result.
        return text[:, None].index_copy(0, images.slots, image[:, None])
