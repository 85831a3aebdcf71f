"""GenLIP as a Megatron-Core module: one pipeline stage of it, or all of it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
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
from genlip_megatron.model.attention import plan_attention
from genlip_megatron.model.embed import Embedding
from genlip_megatron.model.head import Head
from genlip_megatron.model.specs import layer_spec
from genlip_megatron.parallel.initial import fill_initial_weights


class GenLIP(MegatronModule):
    """One pipeline stage of GenLIP.

    Args:
        config: the run's configuration.
        transformer: Megatron-Core's configuration, from ``specs.transformer_config``.
        pre_process: this stage embeds patches and tokens.
        post_process: this stage holds the head.
        attention_backend: force a backend of ``attention.py``; None chooses.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__(config=transformer)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = config.model
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = False
        self.attention_backend = attention_backend
        self.tp_group = groups.tp
        self.embed = Embedding(config.model, transformer, groups.tp) if pre_process else None
        layers = get_num_layers_to_build(transformer, vp_stage=None, pp_rank=groups.pp.rank())
        self.decoder = TransformerBlock(
            transformer,
            TransformerBlockSubmodules(layer_specs=[layer_spec(config, transformer)] * layers),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
        )
        self.head = Head(config.model, transformer, groups.tp) if post_process else None

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The hidden states [S_local, 1, D] that came from the stage before (None on the first stage)."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Output of this stage's layers, [S_local, 1, D]; S_local is this rank's share under sequence parallelism."""
        plan = plan_attention(batch, self.model_config, self.config.params_dtype, self.attention_backend)
        if self.training and batch.drop_path is not None:
            plan.drop_path = self._drop_path_rows(batch)
        hidden = self.embed(batch) if self.embed is not None else None
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=plan)

    def forward(self, batch: PackedBatch) -> Tensor:
        """The answer rows' summed loss (float32 scalar) on the last stage, hidden states [S_local, 1, D] before it."""
        hidden = self.hidden_states(batch)
        if self.head is None:
            return hidden
        return self.head(hidden, batch.loss_rows, batch.labels, batch.loss_weights)

    def _drop_path_rows(self, batch: PackedBatch) -> Tensor:
        """[L, 2, S_local, 1, 1]: the residual factor of every token of this rank; padding keeps its branches."""
        assert batch.drop_path is not None
        sample_ids = batch.sample_ids
        if self.config.sequence_parallel:
            sample_ids = sample_ids.chunk(self.tp_group.size())[self.tp_group.rank()]
        return batch.drop_path[:, :, sample_ids.clamp(min=0)][..., None, None]


def build_model(
    config: RunConfig, transformer: TransformerConfig, attention_backend: str | None = None
) -> list[GenLIP]:
    """This rank's model chunks, on its device, with initial weights that do not depend on the layout."""
    model = GenLIP(
        config,
        transformer,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        attention_backend=attention_backend,
    )
    fill_initial_weights(model, config)
    model.to(torch.cuda.current_device())
    return [model]


def unwrap(model: Any) -> GenLIP:
    """The GenLIP inside Megatron-Core's wrappers."""
    while not isinstance(model, GenLIP):
        model = model.module
    return model
