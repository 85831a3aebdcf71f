"""The split of layers over pipeline stages: balanced with embedding and head, for any number of layers."""

from __future__ import annotations

import pytest

from genlip_megatron.config import ModelConfig, ParallelConfig
from genlip_megatron.model.pipeline import (
    chunk_costs,
    describe_split,
    layers_per_chunk,
    pipeline_layout,
)

SO16 = ModelConfig(27, 1152, 16, 3072, 1152)
TINY = ModelConfig(5, 32, 4, 48, 24, 61, (2, 1, 1))


def parallel(pp: int, vpp: int = 1, first: int = 0, last: int = 0) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (4, 2), (3, 3), (9, 3)])
def test_split_balances_layers_embedding_and_head(pp: int, vpp: int) -> None:
    counts = layers_per_chunk(SO16, parallel(pp, vpp))
    assert sum(counts) == 27 and len(counts) == pp * vpp and min(counts) >= 1
    costs = chunk_costs(SO16, counts)
    assert 2.0 < (head := chunk_costs(SO16, [0, 0])[1]) < 4.0
    stages = [sum(costs[stage::pp]) for stage in range(pp)]
    # No split beats the mean. Layers are whole, so the slowest stage is within one layer of it, unless the last chunk's
    # single layer and its head exceed that.
    assert max(stages) <= max(sum(costs) / pp + 1, 1 + head + (vpp - 1) * max(counts))


def test_split_is_the_best_of_all() -> None:
    """Against every split of 7 layers over 3 stages."""
    model = ModelConfig(7, 1152, 16, 3072, 1152)
    every = [[a, b, 7 - a - b] for a in range(1, 6) for b in range(1, 7 - a)]
    best = min(max(chunk_costs(model, counts)) for counts in every)
    assert max(chunk_costs(model, layers_per_chunk(model, parallel(3)))) == best


def test_interleaved_chunks_balance_their_stages() -> None:
    """The stage with the head's chunk has fewer layers in its other chunk."""
    model = ModelConfig(12, 1152, 16, 3072, 1152)
    assert layers_per_chunk(model, parallel(4, 2)) == [1, 1, 2, 1, 2, 2, 2, 1]


def test_first_and_last_stage_can_be_set() -> None:
    assert layers_per_chunk(SO16, parallel(4, first=8)) == [8, 7, 6, 6]
    assert layers_per_chunk(SO16, parallel(4, last=3)) == [8, 8, 8, 3]
    assert layers_per_chunk(SO16, parallel(4, first=7, last=4)) == [7, 8, 8, 4]
    assert layers_per_chunk(TINY, parallel(2, first=3, last=2)) == [3, 2]


def test_layout_has_embedding_first_and_loss_last() -> None:
    layout = pipeline_layout(TINY, parallel(2, 2))
    assert [row.count("decoder") for row in layout] == layers_per_chunk(TINY, parallel(2, 2))
    assert layout[0][0] == "embedding" and layout[-1][-1] == "loss"
    assert sum(row.count("embedding") + row.count("loss") for row in layout) == 2


def test_split_is_described() -> None:
    assert describe_split(SO16, parallel(1)) == "layers per stage 27"
    text = describe_split(SO16, parallel(2, 2))
    assert text == (
        "layers per stage 7+8, 7+5 | head counts as 2.54 layers, embedding as 0.02 | slowest stage 1.7% above the mean"
    )
