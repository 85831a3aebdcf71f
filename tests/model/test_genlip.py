"""DropPath acts on whole samples: a dropped sample passes its layers unchanged and does not affect its neighbours.

A token id without a row in the embedding is an error, with sharded rows too.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import ModelConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import GOLDEN_DIR, golden_batch, golden_run, load_golden
from tests.model.builds import build

MODEL = ModelConfig(3, 32, 4, 48, 32, 61, (2, 1, 1), drop_path_rate=0.5)


def two_samples() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(torch.randint(0, 256, (rows * 2, 768), generator=generator, dtype=torch.uint8), rows, 2, [3, 4, 5])
        for rows in (2, 3)
    ]
    return pack_samples([samples], 18)


def outputs() -> dict[str, torch.Tensor]:
    """Hidden states of both samples: embedded, nothing dropped, and the first sample dropped in all layers."""
    model, batch = build(golden_run(MODEL, 18)), two_samples()
    kept = torch.ones(3, 2, len(batch.sample_starts))
    dropped = kept.clone()
    dropped[:, :, 0] = 0.0
    with torch.no_grad():
        return {
            "embedded": model.embed(batch, model.prepare(batch).images)[:, 0],
            "plain": model.hidden_states(batch)[:, 0],
            "kept": model.hidden_states(replace(batch, drop_path=kept))[:, 0],
            "dropped": model.hidden_states(replace(batch, drop_path=dropped))[:, 0],
            "evaluated": model.eval().hidden_states(replace(batch, drop_path=dropped))[:, 0],
        }


def test_drop_path_is_per_sample_and_off_in_evaluation() -> None:
    result = run_distributed(1, outputs)[0]
    first, second = slice(0, 7), slice(7, 16)
    torch.testing.assert_close(result["kept"], result["plain"])
    assert torch.equal(result["dropped"][first], result["embedded"][first])
    torch.testing.assert_close(result["dropped"][second], result["plain"][second])
    assert not torch.allclose(result["plain"][first], result["embedded"][first])
    assert torch.equal(result["evaluated"], result["plain"])


def prepare_with_an_id_too_large(tp: int) -> str:
    model, tensors = load_golden(GOLDEN_DIR / "tiny.safetensors")
    batch = golden_batch(tensors)
    built = build(golden_run(model, batch.num_tokens, parallel__tensor_model_parallel_size=tp))
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
