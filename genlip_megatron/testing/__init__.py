"""What the tests and some tools need: golden tensors compared, runs of many processes, the parity of layouts.

It works on a checkout: ``tests/golden`` and ``examples`` are read from there.
"""

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
