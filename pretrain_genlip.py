#!/usr/bin/env python3
"""Train GenLIP.

torchrun --nproc-per-node 2 pretrain_genlip.py --config demo --tp 2
torchrun pretrain_genlip.py --help

Ctrl-C, SIGTERM, SIGUSR1 or the file <save>/stop: the run finishes the step in flight, saves and exits with status 17.
A second signal, more than a second later, ends it at once.

Exit status: 0 done, 2 a setting or a file is wrong, 17 stop requested (saved, if --save is given), 18 too many bad
samples, 19 NaN, Inf or spikes after all rollbacks, 20 hung, 21 replicas' weights differ, 22 the last checkpoint could
not be written, 128 + n ended at once by a second signal n. See docs/reliability.md.
"""

from __future__ import annotations

import genlip_megatron.command  # noqa: F401  first: it handles Ctrl-C during the other imports

# isort: split
import os
import sys

from genlip_megatron.config import RunConfig
from genlip_megatron.config.command_line import parse_args
from genlip_megatron.faults.exits import (
    EXIT_DATA_FAILURE,
    EXIT_USER_ERROR,
    final_exit,
    mark_final,
    say_error,
    tell_torchrun,
)
from genlip_megatron.faults.stop import leave_on_signal


def main() -> int:
    """Parse, check, train; returns the exit status."""
    config, action = parse_args()
    if action == "print_config":
        print(config.to_yaml(), end="")
        return 0
    if action == "dry_run":
        return check_only(config)
    # A validation must not record its status in the folder of the run that it validates.
    save = "" if config.log.eval_only else config.checkpoint.save
    status = final_exit(save)
    if status is not None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(
                f"this launch ended with status {status}: the workers do not start again", file=sys.stderr, flush=True
            )
        return status
    leave_on_signal(save)
    warn_of_shared_store()
    status = run(config)
    if status:
        tell_torchrun(f"ended with status {status}; see the log and docs/reliability.md")
    mark_final(save, status)
    return status


def check_only(config: RunConfig) -> int:
    """Check the run without starting it, for WORLD_SIZE processes; returns the exit status. One process prints it."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.command import FILE_ERRORS, one_line
    from genlip_megatron.train.dry_run import dry_run

    first = os.environ.get("RANK", "0") == "0"
    try:
        line = dry_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, *FILE_ERRORS) as error:
        say_error(one_line(error), first)
        return EXIT_USER_ERROR
    if first:
        print(line)
    return 0


def warn_of_shared_store() -> None:
    """Warn that restarts may fail. torch 2.13's torchrun keeps one store for all restarts, and restarted workers may
    read the addresses of dead workers from it (pytorch issues 135712, 167288). A worker cannot change this."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared and int(os.environ.get("RANK", "0")) == 0:
        print(
            "warning: after a restart by --max-restarts workers may fail to connect to each other. To prevent it, "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
            file=sys.stderr,
            flush=True,
        )


def describe(config: RunConfig) -> str:
    """One line about the run. ``--print-config`` and ``config.yaml`` in checkpoints show the whole configuration."""
    parallel, data, train = config.parallel, config.data, config.train
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    world_size = os.environ.get("WORLD_SIZE", "1")
    facts = {
        "train_data": ",".join(data.train_data) or "none",
        "valid_data": ",".join(data.valid_data) or "none",
        "train_iters": train.train_iters,
        "global_batch_size": train.global_batch_size,
        "seq_length": data.seq_length,
        "layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "layout": f"tp {tp} pp {pp} cp {parallel.context_parallel_size} world_size {world_size}",
        "save": config.checkpoint.save or "none",
    }
    return " | ".join(f"{name} {value}" for name, value in facts.items())


def run(config: RunConfig) -> int:
    """Train; returns the exit status."""
    from genlip_megatron import megatron_patches

    megatron_patches.install()
    from genlip_megatron.command import UserError
    from genlip_megatron.data.quarantine import DataFailure
    from genlip_megatron.faults.watchdog import Watchdog
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.loop import train

    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(config), flush=True)
    Watchdog.listen()
    watchdog = Watchdog(config.faults.step_timeout)
    try:
        status = train(config, watchdog)
        groups.finalize()
        return status
    except (UserError, DataFailure, ConnectionError) as error:
        # All ranks may find the same error, or only those of a node that lacks a file or that read the bad samples;
        # torchrun ends the others when these leave.
        say_error(str(error), groups.first_to_say(str(error)))
        # After a restart a store or another process may answer.
        if isinstance(error, UserError):
            return EXIT_USER_ERROR
        return EXIT_DATA_FAILURE if isinstance(error, DataFailure) else 1
    finally:
        watchdog.close()


if __name__ == "__main__":
    sys.exit(main())
