# ruff: noqa: F401  what is imported here is what others use
"""Estimates for a layout: parameters, memory of the fullest rank, traffic, step time. Pure, allocates no tensors.

``sample.py`` defines samples and machines; ``activations.py`` and ``memory.py`` count bytes; ``cost.py`` counts
arithmetic, traffic and time; ``layouts.py`` searches for layouts that fit and refuses those that do not.
"""

from genlip_megatron.estimate.cost import Estimate, Traffic, bubble_fraction, estimate, recomputed_fraction, traffic
from genlip_megatron.estimate.layouts import (
    LAYOUT_FLAGS,
    best_layouts,
    changes,
    check_fits,
    layout_flags,
    layouts,
    nearest_fit,
    recompute_sets,
)
from genlip_megatron.estimate.memory import Memory, in_flight, memory, stage_parameters
from genlip_megatron.estimate.sample import GIB, MACHINES, Machine, SampleMix, default_mix, micro_batches, sample_flops
