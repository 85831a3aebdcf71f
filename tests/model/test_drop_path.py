"""DropPath acts on whole samples: a dropped sample passes its layers unchanged and does not affect its neighbours."""

from __future__ import annotations

from dataclasses import replace

import torch

from genlip_megatron.batch import PackedBatch, Sample, pack_samples
from genlip_megatron.config import ModelConfig
from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.golden import golden_run

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
    from megatron.core import parallel_state

    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    run = golden_run(MODEL, 18)
    model = build_model(run, transformer_config(run))[0]
    batch = two_samples()
    kept = torch.ones(3, 2, len(batch.sample_starts))
    dropped = kept.clone()
    dropped[:, :, 0] = 0.0
    with torch.no_grad():
        return {
            "embedded": model.embed(batch)[:, 0],
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
