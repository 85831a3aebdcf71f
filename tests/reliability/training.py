"""Training runs of the fault tests: start them and compare their results.

A run is the real ``pretrain_genlip.py`` on a tiny model. After each step of a rank, a line with its loss, its samples
and a digest of its weights is added to a file. So the steps of a run that was killed and restarted can be compared
with those of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from genlip_megatron.data.loader import Prefetcher
from genlip_megatron.testing.processes import Ended, Job, Zygote
from genlip_megatron.testing.runs import tiny_config
from genlip_megatron.train import loop
from tests import crash

TARGET = "tests.reliability.training:train"
_HISTORY = "TEST_HISTORY"
T = TypeVar("T")


class Step(NamedTuple):
    """One training step of one rank, exact to the bit."""

    loss: str
    grad_norm: str
    samples: tuple[str, ...]
    weights: str


def train() -> int:
    """``pretrain_genlip.py`` in a rank, with ``watch`` and the environment's crash plan."""
    crash.install_from_environment()
    watch(Path(os.environ[_HISTORY]))
    import pretrain_genlip

    return pretrain_genlip.main()


def watch(folder: Path) -> None:
    """Add a line to ``folder``/rank<n>.jsonl after every training step of this process."""
    step, take = loop.train_step, Prefetcher.__next__
    taken: list[str] = []
    file = folder / f"rank{os.environ['RANK']}.jsonl"

    def watched_take(self: Any) -> Any:
        batch = take(self)
        taken.extend(batch.keys)
        return batch

    def watched_step(run: Any, *args: Any, **kwargs: Any) -> Any:
        taken.clear()  # drops the batches of validation
        outcome = step(run, *args, **kwargs)
        line = [outcome.loss.hex(), outcome.grad_norm.hex(), taken, digest(run.model)]
        with open(file, "ab", buffering=0) as stream:
            stream.write(json.dumps([run.iteration, *line]).encode() + b"\n")
        return outcome

    Prefetcher.__next__ = watched_take  # type: ignore[method-assign]
    loop.train_step = watched_step


def digest(model: Iterable[Any]) -> str:
    """A digest of all bits of this rank's weights."""
    sha = hashlib.sha256()
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            sha.update(name.encode())
            sha.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@dataclass
class Training:
    """A run that can be started repeatedly in the same folder.

    Attributes:
        folder: holds ``run`` (its checkpoints), ``history`` and the configuration.
        flags: settings beside those of ``tiny_config``.
    """

    zygote: Zygote
    data: Path
    folder: Path
    world_size: int = 1
    flags: dict[str, Any] = field(default_factory=dict)
    starts: int = 0

    @property
    def run(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "run"

    def start(
        self,
        *arguments: str,
        plan: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        target: str = TARGET,
        **flags: Any,
    ) -> Job:
        """Start the ranks, from the newest checkpoint if there is one.

        Args:
            arguments: more of the command line.
            plan: crash points in the folder of checkpoints, see ``crash.Plan``.
            flags: settings of this start only.
        """
        history = self.folder / "history"
        history.mkdir(parents=True, exist_ok=True)
        settings = {
            "checkpoint__save": str(self.run),
            "checkpoint__save_interval": 2,
            "data__valid_data": (),
            "data__num_workers": 1,
            "log__log_interval": 1,
            # Not below the folder that crash points watch.
            "log__tensorboard_dir": str(self.folder / "tensorboard"),
            **self.flags,
            **flags,
        }
        file = self.folder / f"config{self.starts}.yaml"
        file.write_text(tiny_config(self.data, **settings).to_yaml())
        variables = {_HISTORY: str(history), **(env or {}), **(self.plan(**plan).env() if plan else {})}
        words = ["--config", str(file), *arguments]
        self.starts += 1
        return self.zygote.start(self.world_size, words, variables, target, restart=self.starts - 1)

    def go(self, *arguments: str, timeout: float = 180, **kwargs: Any) -> list[Ended]:
        """Start the ranks and wait for their end; see ``start``."""
        return self.start(*arguments, **kwargs).wait(timeout, end_others=0.5)

    def plan(self, **plan: Any) -> crash.Plan:
        """Crash points in the folder of checkpoints; the last start's operations."""
        return crash.Plan(str(self.run), str(self.folder / "operations.jsonl"), **plan)

    def copy(self, folder: Path) -> Training:
        """A copy of the run in its current state."""
        shutil.copytree(self.folder, folder)
        return Training(self.zygote, self.data, folder, self.world_size, dict(self.flags), self.starts)

    def history(self) -> dict[tuple[int, int], Step]:
        """The steps by (rank, step). AssertionError if a repeated step differs."""
        steps: dict[tuple[int, int], Step] = {}
        for rank in range(self.world_size):
            file = self.folder / "history" / f"rank{rank}.jsonl"
            for line in file.read_text().splitlines() if file.is_file() else ():
                number, loss, norm, samples, weights = json.loads(line)
                step = Step(loss, norm, tuple(samples), weights)
                before = steps.setdefault((rank, number), step)
                assert before == step, f"rank {rank} trained step {number} twice, differently: {before} and {step}"
        return steps


def all_of(items: Iterable[T], start: Callable[[T], Job], at_once: int = 2) -> Iterator[tuple[T, list[Ended]]]:
    """Start a job per item, ``at_once`` in parallel; yields (item, how the job ended)."""
    running: list[tuple[T, Job]] = []
    for item in items:
        running.append((item, start(item)))
        if len(running) == at_once:
            done, job = running.pop(0)
            yield done, job.wait(end_others=0.5)
    for done, job in running:
        yield done, job.wait(end_others=0.5)
