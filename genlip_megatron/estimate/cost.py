"""Arithmetic, traffic and time of a step. Time is computed from a given MFU, never measured."""

from __future__ import annotations

from dataclasses import dataclass

from genlip_megatron.config import RunConfig
from genlip_megatron.estimate.activations import Activations
from genlip_megatron.estimate.memory import Memory, memory, stage_parameters
from genlip_megatron.estimate.sample import (
    GPUS_PER_NODE,
    Machine,
    SampleMix,
    data_parallel_size,
    default_mix,
    micro_batches,
    sample_flops,
)
from genlip_megatron.model.pipeline import imbalance, layers_per_chunk
from genlip_megatron.model.state_dict import layer_matrix_size, parameter_count


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in one step, by kind."""

    data_parallel: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float


@dataclass(frozen=True)
class Estimate:
    """Everything that the tool prints about one layout; times in seconds."""

    config: RunConfig
    world_size: int
    parameters: int
    rank_parameters: int  # of the largest stage
    memory: Memory
    flops_per_sample: float
    flops_per_step: float  # useful FLOPs of all ranks
    samples_per_step: float
    micro_batches: int
    bubble: float  # fraction of a step that a stage waits for others
    imbalance: float  # slowest stage over the mean, minus 1
    recomputed: float  # recomputed arithmetic over useful arithmetic
    recompute_seconds: float  # memory traffic of recomputing LINEAR_INPUTS
    traffic: Traffic
    communication_seconds: float  # not overlapped with arithmetic
    step_seconds: float
    days: float
    mfu: float  # of the whole step


def traffic(config: RunConfig, world_size: int, device: str = "cuda", mix: SampleMix | None = None) -> Traffic:
    """Bytes that the busiest rank sends in a step; a ring over n ranks sends (n - 1) / n of a tensor.

    Data: float32 gradients are scattered and weights gathered; under FSDP for every micro-batch. Tensor: with sequence
    parallelism a layer gathers or scatters [S, D] four times forward and six times backward (two inputs are gathered
    again for the weight gradient); without it, a layer reduces [S, D] four times. Context: a2a sends queries, keys,
    values and output; all_gather sends keys and values; both send the gradients too. Pipeline: hidden states forward,
    their gradients back.
    """
    sizes, parallel = Activations(config, device, mix or default_mix(config)), config.parallel
    stages, tp, cp = parallel.pipeline_model_parallel_size, sizes.tp, sizes.cp
    counts, number = layers_per_chunk(config.model, parallel), micro_batches(config, world_size)
    trained = max(trained for trained, _ in stage_parameters(config.model, parallel))
    layers = max(sum(counts[stage::stages]) for stage in range(stages))
    ranks = data_parallel_size(config, world_size) * cp
    data = trained * (4 + sizes.e) * (ranks - 1) / ranks
    if parallel.fsdp:
        # Every micro-batch gathers the weights for each pass and scatters the gradients.
        data = number * trained * (4 + 2 * sizes.e) * (ranks - 1) / ranks
    passes = 10 if sizes.shards_sequence else 8
    tensor = number * (passes * layers + 3) * sizes.gathered * (tp - 1) / tp
    if cp > 1 and parallel.cp_comm_type == "a2a":
        context = number * layers * 8 * sizes.heads * (cp - 1) / cp
    else:
        context = number * layers * 4 * sizes.heads * (cp - 1)
    chunks = len(counts)
    sends = [sum((i < chunks - 1) + (i > 0) for i in range(stage, chunks, stages)) for stage in range(stages)]
    return Traffic(data, tensor, context, number * max(sends) * sizes.hidden if stages > 1 else 0.0)


def bubble_fraction(config: RunConfig, world_size: int) -> float:
    """Fraction of a step that a stage waits: (P - 1) / (vpp M + P - 1) for M micro-batches (Narayanan et al. 2021)."""
    parallel = config.parallel
    waits = parallel.pipeline_model_parallel_size - 1
    return waits / (parallel.virtual_pipeline_model_parallel_size * micro_batches(config, world_size) + waits)


def recomputed_fraction(config: RunConfig, mix: SampleMix) -> float:
    """Forward arithmetic that recomputation repeats, over the useful arithmetic of training."""
    model, parallel = config.model, config.parallel
    image, text, layers = mix.image_tokens, mix.text_tokens, model.num_layers
    pairs = 4 * model.hidden_size * layers * (image**2 + image * text + text * (text + 1) / 2)
    linears = 2 * mix.tokens * layers * layer_matrix_size(model)
    mlp = 2 * mix.tokens * layers * layer_matrix_size(model, part="mlp.")
    if parallel.recompute == "full":
        counts = layers_per_chunk(model, parallel)
        recomputed = sum(min(parallel.recompute_num_layers or count, count) for count in counts)
        repeated = (pairs + linears) * recomputed / layers
    else:
        repeated = pairs * ("core_attn" in parallel.recomputed) + mlp * ("mlp" in parallel.recomputed)
    return repeated / sample_flops(model, mix)


def _communication_seconds(config: RunConfig, moved: Traffic, world_size: int, machine: Machine) -> float:
    """Seconds of a step's traffic that is not overlapped, at data-sheet rates."""
    parallel = config.parallel

    def rate(inner: int, ranks: int) -> float:
        """GB/s of one rank in a group of ``ranks`` ranks that are ``inner`` ranks apart."""
        if inner * ranks <= min(GPUS_PER_NODE, world_size):
            return machine.link_gbs
        # A ring leaves a node once, over the network cards of all its members in that node.
        return min(machine.link_gbs, machine.network_gbs * max(1, GPUS_PER_NODE // inner))

    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    shards = data_parallel_size(config, world_size)
    data = moved.data_parallel
    if parallel.overlap_grad_reduce and parallel.overlap_param_gather:
        data = 0.0
    seconds = moved.tensor_parallel / rate(1, tp) + moved.context_parallel / rate(tp, cp)
    seconds += data / rate(tp, cp * shards)
    seconds += moved.pipeline / (machine.link_gbs if world_size <= GPUS_PER_NODE else machine.network_gbs)
    return seconds / 1e9


def estimate(
    config: RunConfig, world_size: int, machine: Machine, mfu: float, mix: SampleMix | None = None, device: str = "cuda"
) -> Estimate:
    """Memory, traffic and time of a layout.

    Args:
        mfu: fraction of the machine's peak while a GPU computes, without waiting, transfers or recomputation.
    """
    mix = mix or default_mix(config)
    model, data, train = config.model, config.data, config.train
    per_sample = sample_flops(model, mix)
    samples = train.global_batch_size * data.seq_length / mix.tokens
    bubble, uneven = bubble_fraction(config, world_size), imbalance(config.model, config.parallel)
    recomputed = recomputed_fraction(config, mix)
    moved = traffic(config, world_size, device, mix)
    ideal = per_sample * samples / (world_size * machine.peak_tflops * 1e12)
    waiting = _communication_seconds(config, moved, world_size, machine)
    layers = micro_batches(config, world_size) * model.num_layers / config.parallel.pipeline_model_parallel_size
    recomputing = layers * Activations(config, device, mix).recomputed_bytes() / (machine.memory_gbs * 1e9)
    seconds = (ideal / mfu * (1 + recomputed) + recomputing) * (1 + uneven) / (1 - bubble) + waiting
    return Estimate(
        config=config,
        world_size=world_size,
        parameters=parameter_count(model),
        rank_parameters=max(sum(counts) for counts in stage_parameters(model, config.parallel)),
        memory=memory(config, world_size, device, mix),
        flops_per_sample=per_sample,
        flops_per_step=per_sample * samples,
        samples_per_step=samples,
        micro_batches=micro_batches(config, world_size),
        bubble=bubble,
        imbalance=uneven,
        recomputed=recomputed,
        recompute_seconds=recomputing,
        traffic=moved,
        communication_seconds=waiting,
        step_seconds=seconds,
        days=seconds * train.train_iters / 86400,
        mfu=ideal / seconds,
    )
