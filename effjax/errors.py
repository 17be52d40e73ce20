"""The refusals: one typed, one-line error for each way a run can be refused, with its exit code.

A message names what, where, got, wanted and, where a name was meant, the nearest valid one.
"""

import difflib
from collections.abc import Iterable


class EffjaxError(Exception):
    """A refusal that a user can act on; `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(EffjaxError, ValueError):
    """An option, a hyperparameter or a requested shape is wrong: nothing was compiled."""

    exit_code = 2


class DataError(EffjaxError):
    """A corpus or a file of it cannot be used."""

    exit_code = 3


class CheckpointError(EffjaxError):
    """A checkpoint cannot be read into what was asked for, or could not be written."""

    exit_code = 3


class Preempted(EffjaxError):
    """The run was interrupted and what it had finished is saved: the same command goes on."""

    exit_code = 75


def near(name: str, candidates: Iterable[str]) -> str:
    """Ends a message with the nearest valid name: `; did you mean 'learning_rate'?`, or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
