"""Train a head on a frozen encoder: a killed training resumes, and all ranks make the same updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from genlip_megatron.evaluate import ranks
from genlip_megatron.evaluate.probe_state import ProbeFolder, progress_bar

Batch = TypeVar("Batch")


class HeadOptimizer(Protocol):
    """What updates the parameters of a head."""

    @property
    def parameters(self) -> list[Tensor]:
        """Those that it updates."""

    def state(self) -> dict[str, Tensor]:
        """What the next update depends on, besides the number of updates."""

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from the state after ``steps`` updates."""

    def step(self, rate: Any) -> None:
        """Update with a learning rate, then drop the gradients."""


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
        head: in any state.
        optimizer: of the head's parameters.
        folder: a killed training resumes from it, and keeps its state in it.
        steps: number of updates.
        save_interval: steps between two saved states.
        batches: this rank's batches of all steps from the given one on, from 0.
        loss: of a step and its batch, the mean over this rank's part.
        rate: learning rate of a step.
        device: of the head.
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
