"""Greedy generation repeats the authors' tokens and logits, on one process and over tensor and pipeline parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.golden_files import golden_run, load_golden


def run_generate(path: str, tp: int, pp: int) -> list[int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from genlip_megatron.batch import Sample
    from genlip_megatron.infer.generate import generate
    from genlip_megatron.model.genlip import build_model
    from genlip_megatron.model.specs import transformer_config
    from genlip_megatron.parallel.initial import fill_weights

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1)
    model, golden = load_golden(Path(path))
    run = golden_run(model, 96, tp, pp)
    chunks = build_model(run, transformer_config(run))
    fill_weights(chunks[0], lambda name: golden[f"weights/{name}"])
    _, rows, columns = golden["generation/grid"][0].tolist()
    request = Sample(
        golden["generation/pixel_values"].flatten(1),
        rows,
        columns,
        golden["generation/prompt_ids"][0, rows * columns :].tolist(),
    )
    return generate(chunks, [request], stop_ids=(), max_new_tokens=len(golden["generation/tokens"]))[0]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 3)])
def test_greedy_tokens_equal_the_authors(golden_file: Path, tp: int, pp: int) -> None:
    _, golden = load_golden(golden_file)
    for tokens in run_distributed(tp * pp, run_generate, str(golden_file), tp, pp):
        assert tokens == golden["generation/tokens"].tolist()
