"""Prefix-LM core attention over packed samples: several backends, one rule (``model/mask.py``), any cut of a sequence.

``core.py`` has the modules that stand in Megatron-Core's layer and ``plan.py`` what a micro-batch's layers share;
``backend.py`` is the interface of ``dense.py``, ``grouped.py``, ``varlen.py``, ``flex.py`` and ``fp8.py``, and
``context.py`` what context-parallel ranks exchange.
"""

from genlip_megatron.model.attention.core import GenLIPSelfAttention, PrefixLMAttention
from genlip_megatron.model.attention.plan import BACKENDS, FP8_BACKEND, PackedAttention, choose_backend, plan_attention

__all__ = [
    "BACKENDS",
    "FP8_BACKEND",
    "GenLIPSelfAttention",
    "PackedAttention",
    "PrefixLMAttention",
    "choose_backend",
    "plan_attention",
]
