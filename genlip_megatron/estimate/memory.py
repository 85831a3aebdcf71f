"""Memory of the fullest rank at its peak.

The peak is what the micro-batches in flight keep under Megatron-Core's 1F1B and interleaved schedules, and the largest
temporaries beside them. Tests compare it with measured peaks, on a CPU (``tools/estimate.py --measure``) and for a GPU
(``tests/null_gpu/memory.py``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from genlip_megatron.config import ModelConfig, ParallelConfig, RunConfig
from genlip_megatron.estimate.activations import Activations
from genlip_megatron.estimate.sample import GIB, SampleMix, data_parallel_size, default_mix, micro_batches
from genlip_megatron.model.pipeline import layers_per_chunk
from genlip_megatron.model.state_dict import LAYER, find, layer_matrix_size, rank_sizes

# CUDA context, cuBLAS and NCCL buffers, fragmentation of the caching allocator. Assumed, not measured.
_OVERHEAD = {"cuda": 2 * GIB, "cpu": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, by part; the parts add up to the peak.

    Attributes:
        weights: parameters in the compute dtype, and with FP8 the linears' copies; FSDP's shards are float32.
        gradients: the float32 gradient buffer, or FSDP's shard of it.
        optimizer: two moments and, in bf16, float32 master weights; sharded over data and context parallelism.
        activations: what micro-batches in flight keep for their backward pass, the batch included.
        head: logits and gradients of the LM head, if the peak falls there.
        temporaries: gradients of activations and of one weight, if the peak falls in the backward pass.
        overhead: context, communication buffers and fragmentation; assumed.
        stage: the pipeline stage of the rank.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    temporaries: float
    overhead: float
    stage: int

    def parts(self) -> dict[str, float]:
        """Name and bytes of every part."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stage"}

    @property
    def total(self) -> float:
        """The peak in bytes."""
        return sum(self.parts().values())


@functools.cache  # a search asks for the same few layouts many times
def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[int, int]]:
    """(trained, frozen) parameters of one rank of each pipeline stage."""
    stages, counts = parallel.pipeline_model_parallel_size, layers_per_chunk(model, parallel)
    totals = [[0, 0] for _ in range(stages)]
    for name, size in rank_sizes(model, parallel.tensor_model_parallel_size).items():
        setting = find(name.format(i=0))[1].frozen_by
        frozen = bool(setting) and getattr(model, setting)
        for stage in range(stages):
            copies = (
                sum(counts[stage::stages])
                if name.startswith(LAYER)
                else stage == (0 if name.startswith("embed.") else stages - 1)
            )
            totals[stage][frozen] += copies * size
    return [(trained, frozen) for trained, frozen in totals]


def in_flight(parallel: ParallelConfig, stage: int, count: int, kept: list[float]) -> float:
    """The most bytes that a stage keeps at once in Megatron-Core's schedule of ``count`` micro-batches.

    A stage runs ahead by P - 1 - stage micro-batches (1F1B), with ``vpp`` chunks by 2 (P - 1 - stage) + (vpp - 1) P
    chunk passes; then it frees one for each that it adds (Narayanan et al. 2021, section 2.2).

    Args:
        kept: bytes of a micro-batch in each of the stage's chunks.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, len(kept)
    total = min(count, 4 * stages) * chunks
    ahead = stages - 1 - stage if chunks == 1 else 2 * (stages - 1 - stage) + (chunks - 1) * stages
    ahead = min(ahead, total)
    order = [(i % (stages * chunks)) // stages for i in range(total)]
    now = most = sum(kept[chunk] for chunk in order[:ahead])
    for added, freed in zip(order[ahead:], order, strict=False):
        now += kept[added]
        most = max(most, now)
        now -= kept[chunks - 1 - freed]
    return most


def memory(config: RunConfig, world_size: int, device: str = "cuda", mix: SampleMix | None = None) -> Memory:
    """The fullest rank's peak in steady state, by part. ``device`` is "cuda" or "cpu"."""
    mix = mix or default_mix(config)
    model, parallel = config.model, config.parallel
    sizes = Activations(config, device, mix)
    stages, counts = parallel.pipeline_model_parallel_size, layers_per_chunk(model, parallel)
    shards, number = data_parallel_size(config, world_size) * sizes.cp, micro_batches(config, world_size)
    layer, vocabulary = layer_matrix_size(model, sizes.tp), rank_sizes(model, sizes.tp)["embed.tokens.weight"]
    found = []
    for stage, (trained, frozen) in enumerate(stage_parameters(model, parallel)):
        own = range(stage, len(counts), stages)
        kept = [sizes.chunk(counts[i], i == 0) for i in own]
        passes = in_flight(parallel, stage, number, [1.0, *[0.0] * (len(kept) - 1)])
        alive = in_flight(parallel, stage, number, kept) + passes * sizes.shared()
        if stage == 0:
            # A CPU keeps the pixels of the whole step, to rerun it.
            alive += sizes.pixels() * (number if device == "cpu" and config.faults.rerun_bad_steps else passes)
        # (activations, head, temporaries) at the moments that can be the peak: a layer, the head, the gradients.
        moments = [(alive, 0.0, max(sizes.temporaries(counts[i]) for i in own))]
        if stage == stages - 1:
            moments.append((alive, sizes.head(), vocabulary * sizes.e if parallel.fsdp else 0.0))
        if device == "cpu" and shards > 1 and not parallel.fsdp:
            moments.append((passes * sizes.shared(), 0.0, 4.0 * trained))  # gloo reduces a copy of the gradients
        activations, head, temporaries = max(moments, key=sum)
        # An FP8 linear holds its weight in FP8 and transposed, in place of the bf16 weight or beside it.
        copies = 0.0
        if config.train.fp8 != "none" and not config.train.fp8_primary_weights:
            copies = 2.0 * layer * sum(counts[i] for i in own)
        sharded = shards if parallel.fsdp else 1
        found.append(
            Memory(
                # FSDP's shards are float32 and need no master copy.
                weights=(trained + frozen) * (4 if parallel.fsdp else sizes.e) / sharded + copies,
                gradients=4.0 * trained / sharded,
                optimizer=trained * (12 if sizes.e == 2 and not parallel.fsdp else 8) / shards,
                activations=activations,
                head=head,
                temporaries=temporaries,
                overhead=_OVERHEAD[device],
                stage=stage,
            )
        )
    return max(found, key=lambda part: part.total)
