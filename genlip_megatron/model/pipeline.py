"""Which layers each pipeline stage holds (pure).

With interleaving each of the ``pp`` stages holds ``vpp`` model chunks: chunk i of the ``pp * vpp`` is on stage
``i % pp``. The first chunk also embeds; the last one also computes the head, which costs as much as two to three
layers.
"""

from __future__ import annotations

import math

from genlip_megatron.config import ModelConfig, ParallelConfig
from genlip_megatron.model.state_dict import layer_matrix_size, rank_sizes

# Fractions of a stage-1 sample's tokens that are image patches and answer rows: 196 and 68 of 270.
_IMAGE_SHARE, _ANSWER_SHARE = 0.73, 0.25


def chunk_costs(model: ModelConfig, counts: list[int]) -> list[float]:
    """Cost of each chunk of ``counts`` layers, in layers: its matrix arithmetic, with patch embedding and LM head.

    The patch embedding counts 2/3, since its input needs no gradient.
    """
    sizes, layer = rank_sizes(model), layer_matrix_size(model)
    costs = [float(count) for count in counts]
    costs[0] += _IMAGE_SHARE * sizes["embed.patch_weight"] * (2 / 3) / layer
    costs[-1] += _ANSWER_SHARE * sizes["head.weight"] / layer
    return costs


def stage_costs(model: ModelConfig, parallel: ParallelConfig, counts: list[int]) -> list[float]:
    """Cost of each stage, in layers, for chunks of ``counts`` layers."""
    costs, stages = chunk_costs(model, counts), parallel.pipeline_model_parallel_size
    return [sum(costs[stage::stages]) for stage in range(stages)]


def imbalance(model: ModelConfig, parallel: ParallelConfig) -> float:
    """How much longer the slowest pipeline stage takes than the mean, as a fraction."""
    totals = stage_costs(model, parallel, layers_per_chunk(model, parallel))
    return max(totals) / (sum(totals) / len(totals)) - 1


def layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each of the ``pp * vpp`` chunks, in the order of the forward pass; each holds at least one.

    The largest chunk is as small as possible, then the stages as equal as possible, unless the layers of the first or
    last stage are set. Any number of layers works: ``--pp 4`` splits the 27 layers of so16.
    """
    stages = parallel.pipeline_model_parallel_size
    chunks = stages * parallel.virtual_pipeline_model_parallel_size
    assert chunks <= model.num_layers, "checks.check refuses it"
    if parallel.num_layers_in_first_pipeline_stage or parallel.num_layers_in_last_pipeline_stage:
        return _split_as_set(model, parallel)
    edges = chunk_costs(model, [0] * chunks)
    for cap in sorted(edge + count for edge in {0.0, *edges} for count in range(1, model.num_layers + 1)):
        counts = [max(1, math.floor(cap - edge + 1e-9)) for edge in edges]
        if sum(counts) >= model.num_layers:
            break
    while sum(counts) > model.num_layers:
        costs, totals = chunk_costs(model, counts), stage_costs(model, parallel, counts)
        # Take a layer from the fullest stage that has one to give; the earlier stage of a tie, which also embeds.
        givers = [i for i in range(chunks) if counts[i] > 1]
        counts[max(givers, key=lambda i: (totals[i % stages], costs[i], -i))] -= 1
    return counts


def _split_as_set(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """The split for numbers of layers that the user set for the first or last stage."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    counts = [first, *[0] * (stages - 2), last]
    free = [i for i, count in enumerate(counts) if not count]
    base, extra = divmod(model.num_layers - sum(counts), len(free) or 1)
    for place, i in enumerate(free):
        counts[i] = base + (place < extra)
    return counts


def pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """The split as Megatron-Core's pipeline layout: one list of layer types per chunk."""
    layout = [["decoder"] * count for count in layers_per_chunk(model, parallel)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def describe_split(model: ModelConfig, parallel: ParallelConfig) -> str:
    """One line: layers of every stage (chunks joined by +), and how far the slowest stage is above the mean."""
    counts, stages = layers_per_chunk(model, parallel), parallel.pipeline_model_parallel_size
    by_stage = ["+".join(str(count) for count in counts[stage::stages]) for stage in range(stages)]
    text = f"layers per stage {', '.join(by_stage)}"
    if stages == 1:
        return text
    embedding, head = chunk_costs(model, [0, 0])
    return (
        f"{text} | head counts as {head:.2f} layers, embedding as {embedding:.2f} | "
        f"slowest stage {100 * imbalance(model, parallel):.1f}% above the mean"
    )
