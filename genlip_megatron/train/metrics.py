"""What a run reports: the progress line, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genlip_megatron.checkpoint.collectives import from_rank_0
from genlip_megatron.config import RunConfig

WANDB_FILE = "wandb.json"  # in the run's folder: which W&B run it is
WANDB_STEP = "iteration"


@dataclass
class Progress:
    """One log interval, as the progress line and the writers show it."""

    iteration: int
    train_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float  # of one step
    consumed_samples: int
    consumed_tokens: int
    tokens_per_second: float
    tflops: float  # per rank
    mfu: float | None
    pack_fill: float
    memory_gib: float
    data_wait: float  # seconds of a step, on the rank that waited longest
    quarantined: int  # bad samples met so far
    truncated: int  # captions cut to what their image leaves of a pack
    skipped: int  # steps without an update
    spikes: int

    def line(self) -> str:
        """The progress line."""
        left = int((self.train_iters - self.iteration) * self.seconds)
        mfu = "-" if self.mfu is None else f"{100 * self.mfu:.1f}%"
        return (
            f"iteration {self.iteration:>7}/{self.train_iters} | samples {self.consumed_samples} | "
            f"tokens {self.consumed_tokens} | lm loss {self.loss:.4f} | learning rate {self.learning_rate:.3e} | "
            f"grad norm {self.grad_norm:.3f} | step {1000 * self.seconds:.0f} ms | "
            f"tokens/s {self.tokens_per_second:.0f} | TFLOP/s {self.tflops:.3f} | MFU {mfu} | "
            f"pack fill {100 * self.pack_fill:.1f}% | data wait {1000 * self.data_wait:.0f} ms | "
            f"quarantined {self.quarantined} | truncated {self.truncated} | "
            f"skipped {self.skipped} | spikes {self.spikes} | memory {self.memory_gib:.1f} GiB | "
            f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        )

    def scalars(self) -> dict[str, float]:
        """Values under Megatron's TensorBoard tag names."""
        values = {
            "lm loss": self.loss,
            "learning-rate": self.learning_rate,
            "grad-norm": self.grad_norm,
            "iteration-time": self.seconds,
            "throughput": self.tflops,
            "tokens-per-second": self.tokens_per_second,
            "pack-fill": self.pack_fill,
            "consumed-samples": float(self.consumed_samples),
            "mem-allocated-gib": self.memory_gib,
            "data-wait": self.data_wait,
            "quarantined-samples": float(self.quarantined),
            "truncated-captions": float(self.truncated),
            "skipped-steps": float(self.skipped),
            "spikes": float(self.spikes),
        }
        return values if self.mfu is None else {**values, "mfu": self.mfu}


class Writer:
    """TensorBoard and, when asked for, Weights & Biases; does nothing on ranks that do not write.

    Both show each step of a run once where they can, also after a crash or a rollback. TensorBoard hides the events of
    steps that are done again. W&B only ever adds to a run's history and drops what is logged for a step before its
    last, so steps are logged as a value of their own, "iteration", which its charts have as their x-axis.

    Making one checks that it can write, before anything expensive; ``begin`` opens the logs. Both are collectives over
    all ranks.

    Args:
        config: of the run.
        active: this rank writes.

    Raises:
        ValueError: on every rank, when the one that writes cannot.
    """

    def __init__(self, config: RunConfig, active: bool) -> None:
        self._config, self._active = config, active
        self._save = "" if config.log.eval_only else config.checkpoint.save
        self._folder = config.log.tensorboard_dir or (f"{self._save}/tensorboard" if self._save else "")
        self._wandb_file = Path(self._save) / WANDB_FILE if self._save else None
        self._board: Any = None
        self._wandb: Any = None
        self._where_it_writes(self._check)

    def begin(self, step: int) -> None:
        """Open the logs of a run that goes on after ``step``, 0 for one that begins.

        Raises:
            ValueError: on every rank, when the one that writes cannot.
        """
        self._where_it_writes(lambda: self._open(step))

    def _where_it_writes(self, function: Callable[[], None]) -> None:
        problem = ""
        if self._active:
            try:
                function()
            except ValueError as error:
                problem = str(error)
        if problem := from_rank_0(problem):
            raise ValueError(problem)

    def _check(self) -> None:
        log = self._config.log
        if self._folder:
            try:
                Path(self._folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder):
                    pass
            except OSError as error:
                raise self._not_writable(error) from None
        if log.wandb_project:
            if importlib.util.find_spec("wandb") is None:
                raise ValueError(
                    f"log.wandb_project = {log.wandb_project}: wandb is not installed; "
                    "pip install 'genlip-megatron[wandb]', or leave the setting out"
                )
            wandb = importlib.import_module("wandb")
            with self._wandb_errors():
                wandb.Settings(project=log.wandb_project)
                if wandb.setup().settings.mode == "online":
                    wandb.login(verify=True)

    def _open(self, step: int) -> None:
        if self._folder:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._board = SummaryWriter(self._folder)
            except OSError as error:
                raise self._not_writable(error) from None
            if not self._config.log.eval_only:  # it adds to the log, which may be that of a run
                self.rewind(step)
        if self._config.log.wandb_project:
            with self._wandb_errors():
                self._wandb = self._open_wandb()

    def _open_wandb(self) -> Any:
        """The W&B run of ``checkpoint.save``, else a new one."""
        wandb, project = importlib.import_module("wandb"), self._config.log.wandb_project
        # A copied folder goes on as another W&B run: two runs must not write to one.
        place = {"project": project, "folder": os.path.realpath(self._save)}
        known = {}
        if self._wandb_file is not None and self._wandb_file.is_file():
            with contextlib.suppress(ValueError):  # cut off by a crash
                known = json.loads(self._wandb_file.read_text())
        own = known.get("id") if place.items() <= known.items() else None
        run = wandb.init(
            project=project, id=os.environ.get("WANDB_RUN_ID") or own, resume="allow", config=self._config.to_dict()
        )
        run.define_metric("*", step_metric=WANDB_STEP)
        if self._wandb_file is not None:
            self._wandb_file.write_text(json.dumps({**place, "id": run.id}) + "\n")
        return run

    def _not_writable(self, error: OSError) -> ValueError:
        log, save = self._config.log.tensorboard_dir, self._save
        setting = f"log.tensorboard_dir = {log}" if log else f"checkpoint.save = {save}"
        return ValueError(f"{setting}: {error}; give a folder that can be written to")

    @contextlib.contextmanager
    def _wandb_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its own, and those of what it is built on
            text = " ".join(str(error).split()).rstrip(".")
            known = self._wandb_file is not None and self._wandb_file.is_file()
            other = f"delete {self._wandb_file} to begin another W&B run, " if known else ""
            raise ValueError(
                f"log.wandb_project = {self._config.log.wandb_project}: Weights & Biases does not start: {text}. Run "
                f"wandb login, set WANDB_MODE=offline, {other}or leave the setting out"
            ) from None

    def rewind(self, step: int) -> None:
        """Steps after ``step`` are done again: TensorBoard is to forget those it has."""
        if self._board is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # Validation before the first step is of step 0.
        start = Event(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))
        # The first of a folder means to TensorBoard that the run begins, not that it is resumed.
        for _ in range(2):
            self._board.file_writer.add_event(start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write named values of a step."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({**values, WANDB_STEP: step})

    def caption(self, number: int, image: Tensor, text: str, step: int) -> None:
        """A validation image uint8 [3, height, width] and its generated caption beside the true one."""
        if self._board is not None:
            self._board.add_image(f"validation/{number}", image, step)
            self._board.add_text(f"validation/{number}", text, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
