"""A token id without a row in the embedding is an error, with sharded rows too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import GOLDEN_DIR, golden_batch, golden_run, load_golden


def prepare_with_an_id_too_large(tp: int) -> str:
    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config
    from genlip_megatron.parallel import groups

    model, tensors = load_golden(GOLDEN_DIR / "tiny.safetensors")
    batch = golden_batch(tensors)
    config = golden_run(model, batch.num_tokens, tp)
    groups.initialize(config)
    built = build_model(config, transformer_config(config))[0]
    built.prepare(batch)
    ids = batch.token_ids.clone()
    ids[int(torch.nonzero(~batch.is_image)[0])] = model.vocab_size
    try:
        built(replace(batch, token_ids=ids))
    except ValueError as error:
        return str(error)
    return "computed"


@pytest.mark.parametrize("tp", [1, 2])
def test_a_token_id_without_a_row_is_refused(tp: int) -> None:
    for message in run_distributed(tp, prepare_with_an_id_too_large, tp):
        assert "has no row in the embedding" in message
