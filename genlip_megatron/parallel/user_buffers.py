"""Transformer Engine's user buffers, which overlap tensor-parallel communication with matrix products."""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig


def prepare_user_buffers(transformer: TransformerConfig, tokens: int) -> None:
    """Allocate the buffers if ``tp_comm_overlap`` is on; call before the first forward pass. A collective.

    Args:
        tokens: slots of a micro-batch on one context-parallel rank.
    """
    if not transformer.tp_comm_overlap:
        return
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = base.UserBufferQuantizationMode
    used = [modes.FP8 if transformer.fp8 else modes.NONE]
    if transformer.fp8 and transformer.first_last_layers_bf16:
        used.append(modes.NONE)
    base.initialize_ub(
        shape=[tokens, transformer.hidden_size],
        tp_size=transformer.tensor_model_parallel_size,
        quantization_modes=used,
        dtype=transformer.params_dtype,
        bootstrap_backend="nccl",
    )
