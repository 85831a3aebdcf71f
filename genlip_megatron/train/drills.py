"""Faults that a drill injects into a step or a save; see ``faults/inject.py``."""

from __future__ import annotations

import errno
import math
import os

from genlip_megatron.faults.inject import flip_bit
from genlip_megatron.model.genlip import unwrap
from genlip_megatron.train.gradients import local_gradients
from genlip_megatron.train.state import Run


def spoils_loss(run: Run, step: int, second_pass: bool = False) -> bool:
    """Whether this rank's part of the model gives NaN: ``nan-loss``, and in the first pass ``transient-nan``."""
    return run.injector.fires("nan-loss", step) or (not second_pass and run.injector.fires("transient-nan", step))


def spoil_gradients(run: Run, step: int) -> None:
    """``nan-grad``, ``inf-grad`` and ``spike``: multiply this rank's gradients."""
    for kind, factor in (("nan-grad", math.nan), ("inf-grad", math.inf), ("spike", 1e4)):
        if run.injector.fires(kind, step):
            for gradient in local_gradients(run.optimizer):
                gradient.mul_(factor)


def flip_weight(run: Run, step: int) -> None:
    """``flip``: flip one bit of a weight after the step."""
    if run.injector.fires("flip", step):
        if run.saver is not None:
            run.saver.wait_for_copy()
        flip_bit(unwrap(run.model[0]).parameters())


def fail_save(run: Run, step: int) -> None:
    """Faults within a save; ``full-disk`` finds no space."""
    run.injector.at("save", step)
    if run.injector.fires("full-disk", step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
