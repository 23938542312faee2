"""Errors that are the user's to act on, and the exit codes they become at the command line's boundary."""

from __future__ import annotations


class UserError(Exception):
    """Something the user must change: one line that names the thing and the remedy; exit code 2."""

    exit_code = 2


class CheckFailed(UserError):
    """A check ran and found a difference or passed a limit; exit code 1."""

    exit_code = 1
