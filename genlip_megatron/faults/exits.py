"""Exit codes of ``pretrain_genlip.py``, so that a launcher knows what to do next."""

from __future__ import annotations

EXIT_USER_ERROR = 2  # a setting or a file is wrong; starting again changes nothing
EXIT_PREEMPTED = 17  # told to stop, or out of time: saved; start again to go on
EXIT_DATA_FAILURE = 18  # too many bad samples in a row
EXIT_BAD_NUMBERS = 19  # NaN, Inf or spikes that rolling back did not cure
EXIT_HUNG = 20  # no step finished within faults.step_timeout
EXIT_REPLICAS_DIFFER = 21  # weights of data-parallel ranks differ
EXIT_NOT_SAVED = 22  # the last checkpoint could not be written


class LeaveRun(Exception):
    """All ranks leave together, and nothing is saved.

    Attributes:
        status: the exit status, one of those above.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
