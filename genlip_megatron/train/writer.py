"""Writers of a run's metrics: TensorBoard, Weights & Biases, and a file for Prometheus."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genlip_megatron import atomic_write
from genlip_megatron.checkpoint.collectives import from_rank_0
from genlip_megatron.checkpoint.paths import LATEST
from genlip_megatron.config import RunConfig
from genlip_megatron.log import log

WANDB_FILE = "wandb.json"  # in the run's folder: which W&B run it is
WANDB_STEP = "iteration"
_ROOM = 64 << 10  # free bytes for which TensorBoard's log is opened again after the disk was full


def prometheus_text(values: Mapping[str, float], save: str) -> str:
    """Values by TensorBoard tag as gauges in Prometheus' text format, labelled with the run's folder.

    >>> print(prometheus_text({"lm loss": 2.5}, "runs/so16"), end="")
    # TYPE genlip_lm_loss gauge
    genlip_lm_loss{save="runs/so16"} 2.5
    """
    label = save.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for tag, value in values.items():
        name = "genlip_" + re.sub(r"[^a-z0-9]+", "_", tag.lower())
        text = "NaN" if math.isnan(value) else "+Inf" if value == math.inf else repr(float(value))
        lines += [f"# TYPE {name} gauge", f'{name}{{save="{label}"}} {text}']
    return "\n".join([*lines, ""])


class Writer:
    """TensorBoard and, if configured, Weights & Biases and a file for Prometheus; only on the ``active`` rank.

    After a crash or a rollback TensorBoard hides the events of repeated steps. W&B only appends to a run's history and
    drops values of steps before its last; so the step is logged as a value, "iteration", the x-axis of its charts.

    The constructor checks early that the logs can be written; ``begin`` opens them. Both are collectives.

    Raises:
        ValueError: the logs cannot be written. Raised on every rank.
    """

    def __init__(self, config: RunConfig, active: bool) -> None:
        self._config, self._active = config, active
        self._save = "" if config.log.eval_only else config.checkpoint.save
        self._folder = config.log.tensorboard_dir or (f"{self._save}/tensorboard" if self._save else "")
        self._wandb_file = Path(self._save) / WANDB_FILE if self._save else None
        self._board: Any = None
        self._lost = False  # whether writing failed
        self._wandb: Any = None
        self._prometheus = config.log.prometheus_file
        self._latest: dict[str, float] = {}  # what the file for Prometheus has
        self._where_it_writes(self._check)

    def begin(self, step: int) -> None:
        """Open the logs of a run that continues after ``step``; 0 for a new run.

        Raises:
            ValueError: the logs cannot be opened. Raised on every rank.
        """
        self._where_it_writes(lambda: self._open(step))

    def _where_it_writes(self, function: Callable[[], None]) -> None:
        problem = ""
        if self._active:
            try:
                function()
            except OSError as error:
                folder, save = self._config.log.tensorboard_dir, self._save
                setting = f"log.tensorboard_dir = {folder}" if folder else f"checkpoint.save = {save}"
                problem = f"{setting}: {error}. Choose a folder that can be written to"
            except ValueError as error:
                problem = str(error)
        if problem := from_rank_0(problem):
            raise ValueError(problem)

    def _check(self) -> None:
        log = self._config.log
        if self._folder:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        if self._prometheus:
            try:
                Path(self._prometheus).parent.mkdir(parents=True, exist_ok=True)
                atomic_write.write(self._prometheus, "")
            except OSError as error:
                raise ValueError(
                    f"log.prometheus_file = {self._prometheus}: {error}. Choose a file that can be written to"
                ) from None
        if log.wandb_project:
            if importlib.util.find_spec("wandb") is None:
                raise ValueError(
                    f"log.wandb_project = {log.wandb_project}: wandb is not installed. "
                    "Run pip install '.[wandb]' in the checkout, or remove the setting"
                )
            wandb = importlib.import_module("wandb")
            with self._wandb_errors():
                wandb.Settings(project=log.wandb_project)
                if wandb.setup().settings.mode == "online":
                    wandb.login(verify=True)

    def _open(self, step: int) -> None:
        if self._folder:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._folder)
            if not self._config.log.eval_only:  # a validation only appends to the log of a run
                self.rewind(step)
                # Not at ``step``, where a second resume from there would repeat it.
                first, text = step + 1 if step else 0, textwrap.indent(self._config.to_yaml(), "    ")
                self._board.add_text("configuration", text, first)
        if self._config.log.wandb_project:
            with self._wandb_errors():
                self._wandb = self._open_wandb()

    def _open_wandb(self) -> Any:
        """The W&B run of ``checkpoint.save``, else a new one."""
        wandb, project = importlib.import_module("wandb"), self._config.log.wandb_project
        # A copied folder continues as another W&B run, because two runs must not write to one.
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

    @contextlib.contextmanager
    def _wandb_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # W&B's own errors and those of its libraries
            text = " ".join(str(error).split()).rstrip(".")
            known = self._wandb_file is not None and self._wandb_file.is_file()
            other = f"delete {self._wandb_file} to start another W&B run, " if known else ""
            raise ValueError(
                f"log.wandb_project = {self._config.log.wandb_project}: Weights & Biases does not start: {text}. Run "
                f"wandb login, set WANDB_MODE=offline, {other}or remove the setting"
            ) from None

    def rewind(self, step: int) -> None:
        """Make TensorBoard hide its events after ``step``, because these steps are repeated."""
        if self._board is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # Validation before the first step is step 0.
        start = Event(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))
        # TensorBoard takes the first such event in a folder for the start of the run, not for a resume.
        for _ in range(2):
            self._board.file_writer.add_event(start)

    def _on_board(self, write: Callable[[Any], None]) -> None:
        """Write to TensorBoard. What a full disk loses is lost; the next values go to a new file."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._lost and shutil.disk_usage(self._folder).free > _ROOM:
                self._board, self._lost = SummaryWriter(self._folder), False
            if self._board is not None:
                write(self._board)
                self._board.flush()
        except OSError as error:
            log(f"WARNING: {self._folder}: {error.strerror}: TensorBoard lacks these values; training continues")
            self._board, self._lost = None, True

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write a step's values by name."""

        def write(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._on_board(write)
        if self._wandb is not None:
            self._wandb.log({**values, WANDB_STEP: step})
        if self._prometheus and self._active:
            self._write_prometheus(values, step)

    def _write_prometheus(self, values: dict[str, float], step: int) -> None:
        """Replace the file. A full disk must not end the run; the file's own time then shows that it is old."""
        self._latest |= {**values, "iteration": float(step), "last-report-timestamp-seconds": time.time()}
        with contextlib.suppress(OSError):  # no checkpoint yet
            saved = (Path(self._save) / LATEST).stat().st_mtime
            self._latest["last-checkpoint-timestamp-seconds"] = saved
        with contextlib.suppress(OSError):
            atomic_write.write(self._prometheus, prometheus_text(self._latest, self._save), sync=False)

    def caption(self, number: int, image: Tensor, text: str, step: int) -> None:
        """Write a validation image, uint8 [3, height, width], with its generated and true captions."""

        def write(board: Any) -> None:
            board.add_image(f"validation/{number}", image, step)
            board.add_text(f"validation/{number}", text, step)

        self._on_board(write)
        if self._wandb is not None:
            picture = importlib.import_module("wandb").Image(image.permute(1, 2, 0).numpy(), caption=text)
            self._wandb.log({f"validation/{number}": picture, WANDB_STEP: step})

    def close(self) -> None:
        """Flush and close the logs."""
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
