"""Retention: which checkpoints of a run are kept. Only good checkpoints count, and only good ones are deleted."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from genlip_megatron.checkpoint import manifest, paths
from genlip_megatron.checkpoint.manifest import FULLY_RESHARDABLE
from genlip_megatron.config import CheckpointConfig


def kept(
    checkpoints: Sequence[tuple[int, float | None]],
    keep_last: int,
    keep_every: int,
    keep_best: int,
    any_layout: Collection[int] = (),
) -> dict[int, str]:
    """step -> why its checkpoint is kept.

    Args:
        checkpoints: (step, validation loss or None) of every good checkpoint.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        keep_every: keep steps that are a multiple of this; 0: none.
        keep_best: number of checkpoints with the lowest finite validation loss to keep; the newest of equal ones.
        any_layout: steps that any layout can resume from; the newest is kept.

    >>> kept([(10, 3.5), (20, 3.1), (30, 3.3), (40, None)], keep_last=1, keep_every=30, keep_best=1)
    {20: 'best', 30: 'every 30', 40: 'last'}
    """
    by_age = sorted((step for step, _ in checkpoints), reverse=True)
    reasons = {step: "last" for step in (by_age[:keep_last] if keep_last else by_age)}
    for step in by_age:
        if keep_every and step % keep_every == 0:
            reasons.setdefault(step, f"every {keep_every}")
    validated = sorted((loss, -step) for step, loss in checkpoints if loss is not None and math.isfinite(loss))
    for _, negative in validated[:keep_best]:
        reasons.setdefault(-negative, "best")
    if any_layout:
        reasons.setdefault(max(any_layout), "any layout")
    return dict(sorted(reasons.items()))


class Keeper:
    """Prunes the checkpoints of a run; remembers the good ones, so each is read once.

    Attributes:
        reading: whether files are being read, which may take a long time.
        left: why the last ``prune`` did not delete some checkpoints: they hold other files as well.
    """

    def __init__(self) -> None:
        self.reading = False
        self.left: list[str] = []
        self._good: set[tuple[str, tuple[tuple[str, int, int], ...]]] = set()

    def trust(self, place: Path, facts: manifest.Manifest) -> None:
        """Remember a checkpoint as good that this process has written and hashed."""
        self._good.add((str(place), _state(place, facts)))

    def good(self, root: str | Path) -> tuple[dict[int, manifest.Manifest], list[str]]:
        """(step -> manifest of the good checkpoints, damage of the others)."""
        found, wrong = {}, []
        for step in paths.steps(root):
            place = paths.step_folder(root, step)
            try:
                facts = manifest.read(place)
            except manifest.Damaged as error:
                wrong.append(str(error))
                continue
            state = (str(place), _state(place, facts))
            if state not in self._good:
                self.reading = True
                damage = manifest.problems(place, facts)
                self.reading = False
                if damage:
                    wrong += damage
                    continue
                self._good.add(state)
            found[step] = facts
        return found, wrong

    def prune(self, root: str | Path, options: CheckpointConfig, dry_run: bool = False) -> tuple[list[int], list[str]]:
        """(deleted steps, damage of damaged checkpoints, which are not deleted).

        Before anything is deleted, every kept checkpoint is verified, unless this process wrote it.
        """
        found, wrong = self.good(root)
        checkpoints = [(step, facts.validation_loss) for step, facts in found.items()]
        whole = [step for step, facts in found.items() if facts.kind == FULLY_RESHARDABLE]
        whole = whole if options.fully_reshardable_every else []  # 0 disables periodic reshardable saves
        stay = kept(checkpoints, options.keep_last, options.keep_every, options.keep_best, whole)
        gone, self.left = deletable(root, sorted(step for step in found if step not in stay))
        for step in () if dry_run else gone:
            paths.remove(root, step)
        return gone, wrong


def deletable(root: str | Path, steps: Sequence[int]) -> tuple[list[int], list[str]]:
    """(those of ``steps`` whose folders hold nothing but a checkpoint, a line for each of the others)."""
    others = {step: manifest.foreign(paths.step_folder(root, step)) for step in steps}
    lines = [
        f"{paths.step_folder(root, step)}: not deleted, because it holds other files ({other}). Move them away, or "
        "delete the folder by hand"
        for step, other in others.items()
        if other
    ]
    return [step for step in steps if not others[step]], lines


def _state(place: Path, facts: manifest.Manifest) -> tuple[tuple[str, int, int], ...]:
    """(name, size, time of change) of each file, to see whether one was written to; size -1 if missing."""
    states = []
    for name in [manifest.MANIFEST, *sorted(facts.files)]:
        try:
            status = (place / name).stat()
            states.append((name, status.st_size, status.st_mtime_ns))
        except OSError:
            states.append((name, -1, 0))
    return tuple(states)
