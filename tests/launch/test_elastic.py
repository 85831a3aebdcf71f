"""``examples/multi_node.sh`` on a range of nodes: the run goes on when a node joins and when one is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_table import FaultRow
from tests.launch.lab import Lab, wait_for

pytestmark = pytest.mark.slow


def losses(output: str) -> dict[int, tuple[str, str]]:
    """(epoch, loss) of each step in the output of rank 0."""
    lines = re.findall(r"iteration +(\d+)/\d+ \| epoch (\S+) \| lm loss (\S+)", output)
    return {int(step): (epoch, loss) for step, epoch, loss in lines}


def test_a_node_joins_and_is_lost(
    lab: Lab, checkout: Path, demo_data: Path, tiny: Path, tmp_path: Path, fault_row: FaultRow
) -> None:
    def launch(node: str, nodes: str, run: str, *flags: str) -> subprocess.Popen[bytes]:
        data = (f"{demo_data}/tokenizer.model", f"{demo_data}/train-*.tar", f"{demo_data}/val-*.tar")
        words = ["n1", nodes, *data, str(tmp_path / run), "--config", str(tiny), "--micro-batch-size", "1", *flags]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # The first start waits 5 s for others, not 30 s. A dead node is noticed after 12 s.
            "PET_RDZV_CONF": "last_call_timeout=5,keep_alive_interval=3,keep_alive_max_attempt=4",
        }
        with open(tmp_path / f"{run}.log", "ab") as output:
            return subprocess.Popen(
                [*lab.enter(node), str(checkout / "examples" / "multi_node.sh"), *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def text() -> str:
        return (tmp_path / "run.log").read_text()

    def step_on(hosts: int, more: int) -> int:
        """Wait until ``more`` steps were made since the last start, which must be on ``hosts`` hosts."""

        def made() -> bool:
            begun = list(re.finditer(r"data-parallel ranks (\d+)", text()))
            return bool(begun) and begun[-1][1] == str(hosts) and len(losses(text()[begun[-1].end() :])) >= more

        wait_for(f"{more} steps on {hosts} hosts", made, 180)
        return max(losses(text()))

    flags = ("--train-iters", "100000", "--save-interval", "2", "--keep-last", "2")
    first = launch("n1", "1:2", "run", *flags)
    on_one = step_on(1, 3)
    second = launch("n2", "1:2", "run", *flags)
    together = step_on(2, 3)
    lab.kill("n2")
    second.wait()
    lab.boot("n2")
    last = step_on(1, 3)
    assert on_one < together < last and first.poll() is None
    (tmp_path / "run" / "stop").touch()
    assert first.wait(60)
    seen = losses(text())
    # The same samples and losses as on one host all the time.
    assert launch("n1", "1", "whole", "--exit-interval", str(last), *flags).wait(240) == 0
    whole = losses((tmp_path / "whole.log").read_text())
    assert {step: epoch for step, (epoch, _) in whole.items()} == {
        step: epoch for step, (epoch, _) in seen.items() if step <= last
    }
    for step in whole:
        assert float(whole[step][1]) == pytest.approx(float(seen[step][1]), abs=2e-4)
    fault_row("hosts of torchrun --nnodes 1:2", "1, then 2, then 1 again", "goes on; same samples and losses")
