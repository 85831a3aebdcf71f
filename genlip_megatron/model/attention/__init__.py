"""Prefix-LM attention over packed samples: one rule (``model/mask.py``), several backends, any split of a sequence.

``core.py`` holds the modules of Megatron-Core's layer; ``packed.py`` the data that layers share; ``backend.py``
the interface of a backend; ``registry.py`` the list of backends: ``dense.py``, ``grouped.py``, ``flex.py``,
``varlen.py`` and ``te.py``. ``varlen.py``, ``te.py`` and ``fp8.py`` run ``two_calls.py`` with their kernels.
``context.py`` is the exchange between context-parallel ranks.
"""

from genlip_megatron.model.attention.core import GenLIPSelfAttention, PrefixLMAttention
from genlip_megatron.model.attention.packed import PackedAttention, prepare_attention
from genlip_megatron.model.attention.registry import BACKENDS, FP8_BACKEND, choose_backend

__all__ = [
    "BACKENDS",
    "FP8_BACKEND",
    "GenLIPSelfAttention",
    "PackedAttention",
    "PrefixLMAttention",
    "choose_backend",
    "prepare_attention",
]
