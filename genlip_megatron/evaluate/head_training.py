"""Train a head on a frozen encoder. A killed training resumes, and all ranks make the same updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from genlip_megatron.evaluate import ranks
from genlip_megatron.evaluate.probe_state import ProbeFolder, progress_bar

Batch = TypeVar("Batch")


class HeadOptimizer(Protocol):
    """Updates the parameters of a head."""

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that it updates."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that the next update depends on, without the number of updates."""

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from the state after ``steps`` updates."""

    def step(self, rate: Any) -> None:
        """Update with the learning rate ``rate``, then clear the gradients."""


def train_head(
    head: nn.Module,
    optimizer: HeadOptimizer,
    folder: ProbeFolder,
    *,
    steps: int,
    save_interval: int,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[int, Batch], Tensor],
    rate: Callable[[int], Any],
    device: torch.device,
    what: str,
) -> None:
    """Train ``head`` in place; it ends in evaluation mode.

    Args:
        head: in training or evaluation mode.
        optimizer: updates the head's parameters.
        folder: where the state is saved; a killed training resumes from it.
        steps: number of updates.
        save_interval: steps between two saved states.
        batches: takes the first step, counted from 0; returns this rank's batches from that step on.
        loss: takes a step and its batch; returns the mean loss over this rank's part of the batch.
        rate: takes a step; returns its learning rate.
        device: device of the head.
        what: text of the progress bar.
    """
    first, tensors = folder.load(device)
    if tensors:
        try:
            head.load_state_dict(_below("head.", tensors))
            optimizer.restore(_below("optimizer.", tensors), first)
        except (RuntimeError, KeyError):
            raise ValueError(
                f"{folder.folder}: holds the state of another version. Remove its state.pt; the training starts again."
            ) from None
    head.train()
    with progress_bar(steps, first, what, "step") as bar:
        for step, batch in zip(range(first, steps), batches(first), strict=True):
            loss(step, batch).backward()
            ranks.average_gradients(optimizer.parameters)
            optimizer.step(rate(step))
            bar.update()
            if (step + 1) % save_interval == 0 or step + 1 == steps:
                state = {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()}
                folder.save(step + 1, {f"head.{name}": tensor for name, tensor in head.state_dict().items()} | state)
    head.eval()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
