"""FP8 settings that contradict each other or do not fit the model are refused before anything is opened."""

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
        ({"train.fp8": "hybrid"}, "train.fp8 = hybrid: needs --transformer-impl transformer_engine, here is local"),
        ({"train.fp8_attention": True}, "train.fp8_attention: needs --fp8 hybrid"),
        ({"train.fp8_primary_weights": True}, "train.fp8_primary_weights: needs --fp8 hybrid"),
        ({**ENGINE, "train.precision": "fp32"}, "needs train.precision = bf16, here is fp32"),
        ({**ENGINE, "parallel.fsdp": True}, "not with parallel.fsdp"),
        ({**ENGINE, "train.fp8_attention": True, "train.attention_backend": "flex"}, "= auto or te, here is flex"),
        ({**ENGINE, "train.first_last_layers_bf16": True}, "not with delayed scaling.*--fp8-recipe current"),
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
            "not layernorm with delayed FP8 scaling; take --recompute-modules core_attn,mlp",
        ),
        (
            {
                **ENGINE,
                "train.fp8_attention": True,
                "parallel.recompute": "selective",
                "parallel.recompute_modules": ["mlp_act"],
            },
            "not mlp_act with delayed FP8 scaling; take --recompute-modules mlp, or",
        ),
        ({**ENGINE, "data.seq_length": 1000}, r"share of data\.seq_length .* = 1000 .*is 1000; nearest allowed: 992"),
        ({**ENGINE, **TP2, "data.seq_length": 1008}, r"= 1008 over .* = 2\) .* 16, is 504; nearest allowed: 1024"),
        ({**ENGINE, **TP2, "model.ffn_hidden_size": 3088}, "ffn_hidden_size = 3088 .* is 1544; nearest allowed: 3072"),
        ({"parallel.tp_comm_overlap": True}, "tp_comm_overlap: needs --transformer-impl transformer_engine, --tp 2"),
        ({**ENGINE, "parallel.tp_comm_overlap": True}, "here are transformer_engine, 1 and True"),
        (
            {**ENGINE, **TP2, "parallel.tp_comm_overlap": True, "data.valid_data": ["a.tar"]},
            "tp_comm_overlap: not with log.caption_samples = 4 .*--caption-samples 0",
        ),
        (
            {**ENGINE, "train.fp8_attention": True, "parallel.recompute": "selective"},
            "fp8_attention: not with core_attn in parallel.recompute_modules",
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
    # Without sequence parallelism a rank has all rows.
    check(override(RunConfig(), {**ENGINE, **TP2, "parallel.sequence_parallel": False, "data.seq_length": 1008}))
