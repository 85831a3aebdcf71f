"""FP8 settings that contradict each other or do not fit the model are refused."""

from __future__ import annotations

from typing import Any

import pytest

from genlip_megatron.config import LINEAR_INPUTS, RunConfig, override
from genlip_megatron.config.checks import check

ENGINE = {"train.transformer_impl": "transformer_engine", "train.fp8": "hybrid"}
TP2 = {"parallel.tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"train.fp8": "hybrid"},
            "train.fp8 = hybrid, train.transformer_impl = local: FP8 needs Transformer Engine. Use",
        ),
        ({"train.fp8_attention": True}, "train.fp8_attention = true: it needs FP8 linears. Add --fp8 hybrid"),
        (
            {"train.fp8_primary_weights": True},
            "train.fp8_primary_weights = true: it needs FP8 linears. Add --fp8 hybrid",
        ),
        ({**ENGINE, "train.precision": "fp32"}, "train.fp8 = hybrid, train.precision = fp32: FP8 needs bf16"),
        ({**ENGINE, "parallel.fsdp": True}, "train.fp8 = hybrid, parallel.fsdp = true: FSDP's float32 shards"),
        (
            {**ENGINE, "train.fp8_attention": True, "train.attention_backend": "flex"},
            "train.attention_backend = flex: only Transformer Engine has FP8 attention. Use --attention-backend auto",
        ),
        (
            {**ENGINE, "train.first_last_layers_bf16": True},
            "train.fp8_recipe = delayed: delayed scaling needs all layers in FP8. Use --fp8-recipe current",
        ),
        (
            {
                **ENGINE,
                "train.fp8_recipe": "current",
                "train.first_last_layers_bf16": True,
                "train.num_layers_at_end_in_bf16": 28,
            },
            r"num_layers_at_end_in_bf16 = 28: must be from 0 to .* = 27",
        ),
        (
            {**ENGINE, "parallel.recompute": "selective", "parallel.recompute_modules": ["layernorm"]},
            "cannot recompute layernorm. Use --recompute-modules core_attn,mlp or --fp8-recipe current",
        ),
        (
            {
                **ENGINE,
                "train.fp8_attention": True,
                "parallel.recompute": "selective",
                "parallel.recompute_modules": ["mlp_act"],
            },
            "cannot recompute mlp_act. Use --recompute-modules mlp or --fp8-recipe current",
        ),
        (
            {**ENGINE, "data.seq_length": 1000},
            r"data.seq_length = 1000, .*multiple of 16 on each rank, and 1000 / 1 = 1000. The nearest .* size is 992",
        ),
        ({**ENGINE, **TP2, "data.seq_length": 1008}, r"and 1008 / 2 = 504. The nearest allowed size is 1024"),
        (
            {**ENGINE, **TP2, "model.ffn_hidden_size": 3088},
            r"ffn_hidden_size = 3088: .* 3088 / 2 = 1544. The nearest allowed size is 3072",
        ),
        (
            {"parallel.tp_comm_overlap": True},
            "train.transformer_impl = local, .*overlap needs Transformer Engine, .* Use --transformer-impl .* --tp 2",
        ),
        (
            {**ENGINE, "parallel.tp_comm_overlap": True},
            "parallel.tensor_model_parallel_size = 1, parallel.sequence_parallel = true: overlap needs",
        ),
        (
            {**ENGINE, **TP2, "parallel.tp_comm_overlap": True, "data.valid_data": ["a.tar"]},
            "log.caption_samples = 4: the overlap buffers .* Add --caption-samples 0",
        ),
        (
            {**ENGINE, "train.fp8_attention": True, "parallel.recompute": "selective"},
            "parallel.recompute_modules = core_attn: core_attn would be recomputed outside FP8",
        ),
    ],
)
def test_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(override(RunConfig(), flags))


def test_accepted() -> None:
    overlap = {**ENGINE, **TP2, "parallel.tp_comm_overlap": True}
    check(override(RunConfig(), overlap))
    check(override(RunConfig(), {**overlap, "data.valid_data": ["a.tar"], "log.caption_samples": 0}))
    for recompute in ({"parallel.recompute": "selective", "parallel.recompute_modules": ["mlp"]},
                      {"parallel.recompute": "full"}, {}):  # fmt: skip
        check(override(RunConfig(), {**ENGINE, "train.fp8_attention": True, **recompute}))
    check(override(RunConfig(), {**ENGINE, "train.fp8_recipe": "current", "train.first_last_layers_bf16": True}))
    cheap = {"parallel.recompute": "selective", "parallel.recompute_modules": list(LINEAR_INPUTS)}
    check(override(RunConfig(), {**ENGINE, "train.fp8_recipe": "current", **cheap}))
    check(override(RunConfig(), {**ENGINE, "parallel.recompute": "selective"}))
    check(
        override(
            RunConfig(), {**cheap, "parallel.recompute_modules": ["mlp_act"], "parallel.offload_modules": ["attn_norm"]}
        )
    )
    # Without sequence parallelism each rank has all tokens.
    check(override(RunConfig(), {**ENGINE, **TP2, "parallel.sequence_parallel": False, "data.seq_length": 1008}))
