"""The texts of errors about settings: ``setting = value: what is wrong. What to do.``"""

from __future__ import annotations

from genlip_megatron.config.schema import SETTINGS, RunConfig


def with_values(config: RunConfig, problem: str) -> str:
    """``problem`` with the values of the settings that it begins with.

    >>> with_values(RunConfig(), "train.lr, parallel.fsdp: do not fit. Change one of them.")
    'train.lr = 0.001, parallel.fsdp = false: do not fit. Change one of them.'
    """
    names, _, sentences = problem.partition(": ")
    shown = [f"{name} = {_show(config, name)}" if name in SETTINGS else name for name in names.split(", ")]
    return f"{', '.join(shown)}: {sentences}"


def _show(config: RunConfig, name: str) -> str:
    value = config.value(name)
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(number: int) -> str:
    """The divisors of a number up to 64, as a list in words.

    >>> divisors(12)
    '1, 2, 3, 4, 6, 12'
    """
    return ", ".join(str(divisor) for divisor in range(1, min(number, 64) + 1) if number % divisor == 0)


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of ``of`` nearest to ``number``, at least ``of``.

    >>> nearest_multiple(1001, 2), nearest_multiple(1, 4)
    (1000, 4)
    """
    return max(round(number / of), 1) * of
