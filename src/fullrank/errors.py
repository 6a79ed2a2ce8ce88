"""The errors a user can meet. Each message names the value, the bound and the remedy.

Every class is also a built-in kind, so that code which knows nothing of this package can catch it. A command that
ends with one has its exit status.
"""


class ConfigError(ValueError):
    """A setting that cannot work: wrong type, out of bounds, unknown name, or a contradiction."""

    exit_status = 2


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or was written by another method, model or setting."""

    exit_status = 1


class TrainingError(RuntimeError):
    """A run that cannot go on, such as one whose loss is no longer finite."""

    exit_status = 3


class DisconnectedError(TrainingError):
    """A run whose other processes are gone, or do not answer in time."""

    exit_status = 1


class UnsupportedError(RuntimeError):
    """A combination that this version refuses, with the reason and what to do instead."""

    exit_status = 1


def first_line(error: BaseException) -> str:
    """The first line of a library's message: the rest is its own advice, not ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
