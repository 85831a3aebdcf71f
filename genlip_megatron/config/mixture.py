"""How often each entry of ``data.train_data`` is sampled: ``data.train_weights`` and ``data.train_epochs``."""

from __future__ import annotations

import math

from genlip_megatron.config.schema import DataConfig


def source_weights(data: DataConfig) -> list[tuple[int, tuple[float, ...]]]:
    """(first step, weight of each entry of train_data) of every phase; empty without ``train_weights``.

    Raises:
        ValueError: a phase is not W1:W2:...[@STEP] with a weight for each entry, or phases are out of order.
    """
    phases: list[tuple[int, tuple[float, ...]]] = []
    for text in data.train_weights:
        weights, _, step = text.partition("@")
        start = int(step) if step.isdigit() else 0 if not step and not phases else -1
        if start < 0 or (phases and start <= phases[-1][0]) or (not phases and start):
            raise ValueError(
                f"data.train_weights = {','.join(data.train_weights)!r}: {text!r} has a wrong step. The first weights "
                "apply from step 0 and need no @STEP; each later entry needs a later step, as in 7:3,5:5@20000."
            )
        phases.append((start, _numbers("data.train_weights", weights, len(data.train_data))))
    return phases


def source_epochs(data: DataConfig) -> tuple[float, ...]:
    """Repeats of each entry of train_data in one epoch; empty without ``train_epochs``.

    Raises:
        ValueError: not one number for each entry.
    """
    return _numbers("data.train_epochs", data.train_epochs, len(data.train_data)) if data.train_epochs else ()


def _numbers(setting: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(
            f"{setting} = {text!r}: expected {count} numbers, one for each entry of data.train_data. Separate them by "
            "colons (in YAML in quotes: '7:3'); none may be negative, and one must be above 0."
        )
    return numbers
