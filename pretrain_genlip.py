#!/usr/bin/env python3
"""Train GenLIP.

torchrun --nproc-per-node 2 pretrain_genlip.py --config demo --tp 2
torchrun pretrain_genlip.py --help

Exit status: 0 done, 2 a setting or a file is wrong, 17 told to stop and saved (start again to go on), 18 too many bad
samples, 19 bad numbers that did not go away, 20 hung, 21 replicas' weights differ, 22 the last checkpoint could not be
written. See ``genlip_megatron/faults/exits.py``.
"""

from __future__ import annotations

import os
import sys

from genlip_megatron.arguments import parse_args


def main() -> int:
    """Parse, check, train; returns the exit status."""
    config, print_config = parse_args()
    first = int(os.environ.get("RANK", "0")) == 0
    if print_config:
        print(config.to_yaml(), end="")
        return 0
    from genlip_megatron import host

    host.install()
    from genlip_megatron.data.quarantine import DataFailure
    from genlip_megatron.faults.exits import EXIT_DATA_FAILURE, EXIT_USER_ERROR
    from genlip_megatron.parallel import groups
    from genlip_megatron.train.loop import train

    if first:
        print(config.to_yaml(), flush=True)
    try:
        status = train(config)
    except ValueError as error:
        # A user's mistake: most often every rank finds the same one, but a node may lack a file.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"pretrain_genlip.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except DataFailure as error:
        # Only the ranks that share the samples know; torchrun ends the others when these leave.
        print(f"pretrain_genlip.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_DATA_FAILURE
    groups.finalize()
    return status


if __name__ == "__main__":
    sys.exit(main())
