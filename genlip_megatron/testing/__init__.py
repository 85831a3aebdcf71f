"""Helpers of the tests and some tools: golden tensors, runs of many processes, parity of layouts.

They need a checkout, because they read ``tests/golden`` and ``examples``.
"""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
