"""The Transformer layer as Megatron-Core specs, and the TransformerConfig that goes with them.

``local`` layers need no Transformer Engine and run on a CPU; ``transformer_engine`` layers use its linears, with the
norms before them fused in. Transformer Engine is imported only for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from genlip_megatron.config import LINEAR_INPUTS, RunConfig
from genlip_megatron.device import current_device
from genlip_megatron.model.attention import (
    BACKENDS,
    FP8_BACKEND,
    GenLIPSelfAttention,
    PrefixLMAttention,
    choose_backend,
)
from genlip_megatron.model.attention.backend import Place
from genlip_megatron.model.fusion import fusion_choice
from genlip_megatron.model.linear import ColumnLinear, RowLinear
from genlip_megatron.model.mlp import SwiGLU
from genlip_megatron.model.norm import LayerNorm
from genlip_megatron.model.pipeline import pipeline_layout
from genlip_megatron.model.regularize import GenLIPLayer, ScaledResidual
from genlip_megatron.model.state_dict import FUSED_NORMS
from genlip_megatron.model.te_support import RECIPES, choose_fp8, fused_norms, why_no_engine


def compute_dtype(config: RunConfig) -> torch.dtype:
    """bfloat16 or float32, by ``train.precision``; auto is bfloat16 on a GPU."""
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_machine(config: RunConfig) -> str:
    """Check that this machine can run ``config``; returns log lines: the attention backend and why, after warnings.

    Raises:
        ValueError: the run needs something that this machine does not have.
    """
    if config.train.transformer_impl == "transformer_engine" and (reason := why_no_engine()):
        raise ValueError(
            f"train.transformer_impl = transformer_engine: {reason}. Install it, or use --transformer-impl local"
        )
    if config.parallel.offload_modules and not HAVE_TE:
        raise ValueError(
            f"parallel.offload_modules = {','.join(config.parallel.offload_modules)}: Megatron-Core offloads with "
            "Transformer Engine, which is not installed. Run pip install '.[te]' in the checkout on a CUDA machine, or "
            "recompute instead (--recompute selective --recompute-modules core_attn,mlp)"
        )
    fusion_choice(config.train.fusion)
    backend, reason = attention_choice(config)
    if config.train.cuda_graph and not torch.cuda.is_available():
        raise ValueError("train.cuda_graph = True: needs a CUDA device, and this machine has none. Remove --cuda-graph")
    if config.train.cuda_graph and not (backend in BACKENDS and BACKENDS[backend].has_fixed_shapes):
        fixed = " or ".join(name for name, kind in BACKENDS.items() if kind.has_fixed_shapes)
        raise ValueError(
            f"train.cuda_graph = True: needs the attention backend {fixed}, not {backend} ({reason}). Remove "
            "--cuda-graph"
        )
    fp8 = choose_fp8(config)
    warnings = [f"WARNING: {note}" for note in fp8.notes]
    return "\n".join([*warnings, f"attention backend {backend}: {reason}"])


def attention_choice(config: RunConfig) -> tuple[str, str]:
    """(attention backend of a run on this machine, why).

    Raises:
        ValueError: the configured backend cannot run here.
    """
    place = Place(current_device(), compute_dtype(config), config.model.head_dim)
    if choose_fp8(config).images:
        return FP8_BACKEND, "image queries in FP8, as set"
    layers_are_te = config.train.transformer_impl == "transformer_engine"
    return choose_backend(config.train.attention_backend, place, layers_are_te)


def _same(section: Any, *names: str) -> dict[str, Any]:
    """Settings that Megatron-Core's configuration has under the same name."""
    return {name: getattr(section, name) for name in names}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the layers, from the run's."""
    model, parallel, train = config.model, config.parallel, config.train
    dtype = compute_dtype(config)
    vpp, full = parallel.virtual_pipeline_model_parallel_size, parallel.recompute == "full"
    fp8 = choose_fp8(config)
    # ``layer_spec`` tells the modules of LINEAR_INPUTS to recompute themselves.
    recomputed = [name for name in parallel.recomputed if name not in LINEAR_INPUTS]
    # The product adds weight gradients to DDP's buffer itself: Transformer Engine's linears, or others with Apex.
    adds_gradients = (
        train.transformer_impl == "transformer_engine"
        or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )
    return TransformerConfig(
        **_same(model, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "layernorm_epsilon"),
        attention_output_gate=model.attention_output_gate != "none",
        **_same(parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        **_same(parallel, "cp_comm_type", "tp_comm_overlap", "tp_comm_overlap_ag", "tp_comm_overlap_rs"),
        **_same(parallel, "tp_comm_overlap_rs_dgrad"),
        **_same(train, "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=adds_gradients and torch.cuda.is_available() and not parallel.fsdp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights are filled after construction (weights.py), the same on every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(model, parallel)
        if parallel.pipeline_model_parallel_size > 1
        else None,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        # Interleaved stages send while they compute. Batched sends cannot overlap, and gloo does not support them.
        overlap_p2p_comm=vpp > 1,
        batch_p2p_comm=torch.cuda.is_available() and vpp == 1,
        # Streams wait for each other; Megatron-Core also makes the host wait, to work around a bug of old torch.
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        fp8=train.fp8 if fp8.linears else None,
        fp8_recipe=RECIPES[train.fp8_recipe],
        # Delayed scaling takes the maximum over this many passes, Transformer Engine's default.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        fp8_param=fp8.linears and train.fp8_primary_weights,
        fp8_dot_product_attention=fp8.images,
        recompute_granularity="full" if full else "selective" if recomputed else None,
        recompute_method="block" if full else None,
        recompute_num_layers=(parallel.recompute_num_layers or model.num_layers) if full else None,
        recompute_modules=recomputed or None,
        fine_grained_activation_offloading=bool(parallel.offload_modules),
        offload_modules=list(parallel.offload_modules),
    )


def layer_spec(config: RunConfig, transformer: TransformerConfig) -> ModuleSpec:
    """The spec of every layer; ``check_machine`` has checked that its modules are available. A layer computes::

        h = x + drop1 * scale1 * out_proj(sigmoid(gate) * attention(q, k, v)),  (q, k, v, gate) = qkv(norm1(x))
        out = h + drop2 * scale2 * mlp(norm2(h))

    ``scale`` is LayerScale and ``drop`` the DropPath factor (``regularize.py``). ``model.attention_output_gate`` gives
    each channel or each head a value of the gate, or leaves it out.
    """
    column, row, norm, fused = ColumnLinear, RowLinear, LayerNorm, fused_norms(config)
    if config.train.transformer_impl == "transformer_engine":
        extension = importlib.import_module("megatron.core.extensions.transformer_engine")
        column, row = extension.TEColumnParallelLinear, extension.TERowParallelLinear
        if fused:
            column, norm = extension.TELayerNormColumnParallelLinear, IdentityOp
    # Megatron-Core would ask for as many rows as an elementwise gate needs.
    rows = config.model.num_attention_heads * (3 * config.model.head_dim + config.model.gate_rows)
    recomputed = config.parallel.recomputed
    if "layernorm" in recomputed:
        norm = ModuleSpec(module=LayerNorm, params={"recompute": True})
    residual = ModuleSpec(
        module=ScaledResidual,
        params={
            "hidden_size": config.model.hidden_size,
            "init": config.model.layer_scale_init,
            "sequence_parallel": transformer.sequence_parallel,
            "dtype": transformer.params_dtype,
            "fusion": fusion_choice(config.train.fusion),
        },
    )
    return ModuleSpec(
        module=GenLIPLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=GenLIPSelfAttention,
                params={
                    "attn_mask_type": AttnMaskType.no_mask,
                    "recompute_gate": "output_gate" in recomputed,
                    "gate_rows": config.model.gate_rows,
                },
                submodules=SelfAttentionSubmodules(
                    linear_qkv=lambda inputs, _, **more: column(inputs, rows, **more),
                    core_attention=PrefixLMAttention,
                    linear_proj=row,
                ),
            ),
            self_attn_bda=residual,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=SwiGLU,
                params={"recompute_act": "mlp_act" in recomputed},
                submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row),
            ),
            mlp_bda=residual,
            sharded_state_dict_keys_map=FUSED_NORMS if fused else {},
        ),
    )
