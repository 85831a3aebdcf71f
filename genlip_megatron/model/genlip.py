"""GenLIP as a Megatron-Core module: the whole model, a pipeline stage, or one chunk of an interleaved stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from genlip_megatron.batch import PackedBatch
from genlip_megatron.config import RunConfig
from genlip_megatron.device import current_device, to_device
from genlip_megatron.model.attention import PackedAttention, prepare_attention
from genlip_megatron.model.embed import Embedding, ImageSlots
from genlip_megatron.model.fp8_state import prepare_fp8_state, set_fp8_state
from genlip_megatron.model.fusion import fusion_choice
from genlip_megatron.model.head import Head
from genlip_megatron.model.recompute import keep_no_copies
from genlip_megatron.model.regularize import fuse_norms
from genlip_megatron.model.specs import attention_choice, layer_spec
from genlip_megatron.model.state_dict import freeze, is_fp8_state
from genlip_megatron.model.weights import fill_initial_weights
from genlip_megatron.parallel.sequence import local_slots


class GenLIP(MegatronModule):
    """One pipeline stage of GenLIP, or one chunk of a stage with interleaving.

    Args:
        transformer: from ``specs.transformer_config``.
        vp_stage: index of the chunk in this pipeline stage; None without interleaving.
    """

    def __init__(self, config: RunConfig, transformer: TransformerConfig, vp_stage: int | None = None) -> None:
        super().__init__(config=transformer)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = config.model
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = False
        self.attention_backend = attention_choice(config)[0]
        self.fusion = fusion_choice(config.train.fusion)
        self.gather_keys = config.parallel.cp_comm_type == "all_gather"
        self.tp_group = groups.tp
        self.context = groups.cp if groups.cp.size() > 1 else None
        edges = (config.model, transformer, groups.tp, self.context)
        self.embed = Embedding(*edges) if self.pre_process else None
        layers = get_num_layers_to_build(transformer, vp_stage=vp_stage, pp_rank=groups.pp.rank())
        self.decoder = TransformerBlock(
            transformer,
            TransformerBlockSubmodules(layer_specs=[layer_spec(config, transformer)] * layers),
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if transformer.fp8:
            keep_no_copies(self.decoder.layers, config.parallel.recomputed)
        if config.train.fusion == "norms":
            fuse_norms(self.decoder.layers, across=config.parallel.recompute != "full" and not config.parallel.fsdp)
        self.head = Head(*edges) if self.post_process else None
        freeze(self, config.model)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states [S_local, 1, D] of the previous chunk; None on the first chunk."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, with the FP8 state of ``sharded_state_dict``; missing FP8 state is reset."""
        scales = {name: value for name, value in state_dict.items() if is_fp8_state(name)}
        weights = {name: value for name, value in state_dict.items() if name not in scales}
        # Loading FP8 weights quantises them by the scales and changes the amax history: set the state before and after.
        set_fp8_state(self, scales)
        result = super().load_state_dict(weights, False, assign)
        if scales:
            set_fp8_state(self, scales)
        wrong = [name for name in result.missing_keys if not name.endswith("._extra_state")] + result.unexpected_keys
        if strict and wrong:
            raise RuntimeError(f"the model and its state differ in {', '.join(wrong)}")
        return result

    def prepare(self, batch: PackedBatch, fixed_shapes: bool = False) -> PackedAttention:
        """The data of ``batch`` that this rank's layers share, the same for all chunks. The host waits for a batch that
        is not on the CPU.

        Args:
            fixed_shapes: for a batch ``with_fixed_shapes``; the result has fixed shapes too, for CUDA graphs.

        Raises:
            ValueError: a token id has no row in the embedding.
        """
        # Megatron-Core's sharded embedding returns zeros for an id that no rank holds.
        if (largest := int(batch.token_ids.max())) >= self.model_config.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.model_config.vocab_size}: token id {largest} has no row in the embedding. "
                "Use the tokenizer that the model was trained with, or raise --vocab-size"
            )
        device = current_device()
        packed = prepare_attention(
            batch,
            self.model_config,
            self.config.params_dtype,
            self.attention_backend,
            device,
            self.context,
            self.gather_keys,
            self.fusion,
            fixed_shapes,
        )
        slots = local_slots(batch.num_tokens, self.context, self.tp_group if self.config.sequence_parallel else None)
        drop_path = None
        if batch.drop_path is not None:
            # Padding has no sample; it takes the factors of sample 0, and no token sees it.
            samples = batch.sample_ids[slots].clamp(min=0)
            drop_path = to_device(batch.drop_path, device)[:, :, to_device(samples, device)][..., None, None]
        return replace(packed, drop_path=drop_path, images=ImageSlots.of(batch, slots, device, fixed_shapes))

    def hidden_states(self, batch: PackedBatch, packed: PackedAttention | None = None) -> Tensor:
        """Output of this chunk's layers, [S_local, 1, D], for the slots that this rank holds.

        Args:
            packed: from ``prepare``; None prepares it here.
        """
        packed = packed or self.prepare(batch)
        if self.config.fine_grained_activation_offloading:
            self._begin_offloading()
        if not self.training:
            packed = replace(packed, drop_path=None)
        hidden = self.embed(batch, packed.images) if self.embed is not None else None
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)

    def _begin_offloading(self) -> None:
        """Tell Megatron-Core that a micro-batch of this chunk begins, and not to offload weights."""
        offloader = offloading.FineGrainedActivationOffloadingInterface
        offloader.init_chunk_handler(
            vp_size=self.config.virtual_pipeline_model_parallel_size,
            vp_stage=self.vp_stage,
            min_offloaded_tensor_size=self.config.min_offloaded_tensor_size,
        )
        for parameter in self.parameters():
            offloader.mark_not_offloadable(parameter)

    def forward(self, batch: PackedBatch, packed: PackedAttention | None = None) -> Tensor:
        """On the last chunk the summed loss of this rank's answer rows (float32 scalar), else hidden states
        [S_local, 1, D]."""
        hidden = self.hidden_states(batch, packed)
        if self.head is None:
            return hidden
        return self.head(hidden, batch.loss_rows, batch.labels, batch.loss_weights)


def build_model(config: RunConfig, transformer: TransformerConfig) -> list[GenLIP]:
    """This rank's model chunks, on its device, with initial weights that do not depend on the layout."""
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    models = []
    for vp_stage in range(chunks) if chunks else (None,):
        model = GenLIP(config, transformer, vp_stage)
        fill_initial_weights(model, config)
        prepare_fp8_state(model.decoder.layers, transformer)
        models.append(model.to(torch.cuda.current_device()))
    return models


def unwrap(model: Any) -> GenLIP:
    """The GenLIP inside Megatron-Core's wrappers."""
    while not isinstance(model, GenLIP):
        model = model.module
    return model
