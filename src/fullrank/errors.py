"""The errors a user can meet. Each message names the value, the bound and the remedy.

Every class is also a built-in kind, so that code which knows nothing of this package can catch it.
"""


class ConfigError(ValueError):
    """A setting that cannot work: wrong type, out of bounds, unknown name, or a contradiction."""


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or was written by another method, model or setting."""


class TrainingError(RuntimeError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


class UnsupportedError(RuntimeError):
    """A combination that this version refuses, with the reason and what to do instead."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message: the rest is its own advice, not ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
