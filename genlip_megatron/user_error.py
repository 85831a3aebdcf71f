"""The error that a user can fix."""

from __future__ import annotations


class UserError(ValueError):
    """A setting or a file is wrong: the run ends with one line and exit status 2.

    Other ValueErrors are crashes: a restart may help, and they keep their traceback.
    """
