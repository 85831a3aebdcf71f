#!/usr/bin/env python3
"""Train GenLIP.

torchrun --nproc-per-node 2 pretrain_genlip.py --config demo --tp 2
torchrun pretrain_genlip.py --help

Exit status: 0 done, 2 a setting or a file is wrong, 17 told to stop (saved, if --save is given), 18 too many bad
samples, 19 bad numbers that did not go away, 20 hung, 21 replicas' weights differ, 22 the last checkpoint could not be
written. See ``genlip_megatron/faults/exits.py``.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from genlip_megatron.arguments import parse_args
from genlip_megatron.config import RunConfig
from genlip_megatron.faults.exits import EXIT_DATA_FAILURE, EXIT_PREEMPTED, EXIT_USER_ERROR, final_exit, mark_final


def main() -> int:
    """Parse, check, train; returns the exit status."""
    config, print_config = parse_args()
    if print_config:
        print(config.to_yaml(), end="")
        return 0
    # A validation says nothing about the training whose folder it may be given.
    save = "" if config.log.eval_only else config.checkpoint.save
    status = final_exit(save)
    if status is not None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"this launch is over with status {status}: not starting again", file=sys.stderr, flush=True)
        return status
    leave_if_told(save)
    warn_of_shared_store()
    status = run(config)
    mark_final(save, status)
    return status


def leave_if_told(save: str) -> None:
    """Until training listens to it, SIGUSR1 ends this process as preempted: there is nothing to save yet, and torchrun
    must not take it for a crash. Not so SIGTERM, by which torchrun itself ends the others after one has crashed."""

    def leave(number: int, frame: FrameType | None) -> None:
        mark_final(save, EXIT_PREEMPTED)
        os._exit(EXIT_PREEMPTED)

    signal.signal(signal.SIGUSR1, leave)


def warn_of_shared_store() -> None:
    """torch 2.13's torchrun keeps one store over all restarts, with the addresses of dead workers in it, which those
    started again may read first (pytorch issues 135712, 167288). It cannot be changed from inside a worker."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared and int(os.environ.get("RANK", "0")) == 0:
        print(
            "warning: after a restart by --max-restarts the workers may fail to find each other; to prevent it, "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
            file=sys.stderr,
            flush=True,
        )


def run(config: RunConfig) -> int:
    """Train; returns the exit status."""
    from genlip_megatron import host

    host.install()
    from genlip_megatron.data.quarantine import DataFailure
    from genlip_megatron.faults.exits import Mistake
    from genlip_megatron.faults.watchdog import Watchdog
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.loop import train

    if int(os.environ.get("RANK", "0")) == 0:
        print(config.to_yaml(), flush=True)
    Watchdog.listen()
    watchdog = Watchdog(config.faults.step_timeout)
    try:
        status = train(config, watchdog)
        groups.finalize()
        return status
    except Mistake as error:
        # Most often every rank finds the same one, but a node may lack a file.
        if groups.first_to_say(str(error)):
            print(f"pretrain_genlip.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except DataFailure as error:
        # Only the ranks that share the samples know; torchrun ends the others when these leave.
        print(f"pretrain_genlip.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_DATA_FAILURE
    finally:
        watchdog.close()


if __name__ == "__main__":
    sys.exit(main())
