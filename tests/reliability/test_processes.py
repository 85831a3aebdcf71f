"""The process harness that the fault tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from genlip_megatron.testing.distributed import run_distributed
from genlip_megatron.testing.processes import Zygote


def describe() -> int:
    """Print a rank's arguments and environment."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "EXTRA")
    print(*(os.environ[name] for name in names), *sys.argv[1:])
    print("threads", len(os.listdir("/proc/self/task")))
    return 7 if os.environ["RANK"] == "1" else 0


def leave_a_helper() -> str:
    """Exit with a message as status. Leave a helper process, and a thread that the exit waits for."""
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    return "a message"


def linger() -> None:
    """Rank 0 fails; the others report SIGTERM and stay."""
    if os.environ["RANK"] == "0":
        raise RuntimeError("rank 0 failed")
    signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM received", flush=True))
    print("waiting", flush=True)
    while True:
        time.sleep(0.01)


def place_in_group() -> tuple[int, int, float, int]:
    """(process, ranks of the default group, sum over them, hash of a text)."""
    total = torch.ones(())
    torch.distributed.all_reduce(total)
    return os.getpid(), torch.distributed.get_world_size(), total.item(), hash("text")


@pytest.mark.slow
def test_processes_of_run_distributed_join_a_new_group_for_every_job() -> None:
    first, single, again = (run_distributed(size, place_in_group) for size in (2, 1, 2))
    assert first == again and single[0][0] == first[0][0] and first[0][0] != first[1][0]
    assert [rank[1:3] for rank in (*first, *single)] == [(2, 2.0), (2, 2.0), (1, 1.0)]
    assert first[0][3] != first[1][3], "the order of a set would be the same on all ranks"
    run_distributed(2, torch.distributed.destroy_process_group)
    assert run_distributed(2, place_in_group) == first


def test_each_rank_is_a_separate_process(zygote: Zygote) -> None:
    first, second = zygote.run(
        2, ["--flag"], {"EXTRA": "more"}, target="tests.reliability.test_processes:describe", restart=3
    )
    port = first.output.split()[3]
    assert first == (0, f"0 0 2 {port} 3 more --flag\nthreads 1\n")
    assert second == (7, f"1 1 2 {port} 3 more --flag\nthreads 1\n")
    assert "EXTRA" not in os.environ


def test_a_rank_ends_like_a_script_and_leaves_nothing_running(zygote: Zygote) -> None:
    (ended,) = zygote.run(1, [], target="tests.reliability.test_processes:leave_a_helper")
    assert ended.code == 1 and "a message" in ended.output and "thread done" in ended.output
    helper = Path(f"/proc/{ended.output.split()[0]}/stat")
    deadline = time.monotonic() + 5
    while helper.exists() and helper.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the helper of a rank outlives it"


def test_the_other_ranks_of_a_failed_one_are_ended(zygote: Zygote) -> None:
    """Like torchrun: SIGTERM, then SIGKILL for processes that ignore it."""
    job = zygote.start(2, [], target="tests.reliability.test_processes:linger")
    job.wait_for("waiting", rank=1)
    first, second = job.wait(end_others=1)
    assert first.code == 1 and "RuntimeError: rank 0 failed" in first.output
    assert second == (-signal.SIGKILL, "waiting\nSIGTERM received\n")


def test_a_run_that_does_not_end_is_killed_and_its_output_shown(zygote: Zygote) -> None:
    job = zygote.start(2, [], target="tests.reliability.test_processes:linger")
    job.wait_for("waiting", rank=1)
    while 0 not in job.codes:
        zygote.receive(0.1)
    with pytest.raises(AssertionError, match=r"ranks \[1\] still run after 0\.1 s(.|\n)*rank 0 failed"):
        job.wait(timeout=0.1)
    assert job.wait()[1].code == -signal.SIGKILL
