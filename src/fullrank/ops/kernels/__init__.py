"""Fast routines for the two products and the passes of a projected step, and the one switch for all of them.

Chosen by themselves where machine, shape and dtype fit; plain torch does the work everywhere else. Results agree
to rounding, not to the bit, and are the same from run to run on one machine.

    onednn   a CPU of AMD with AVX-512, float32: torch's products there run at half of what the machine can do
    gpu      CUDA, where ``triton`` is installed (it comes with torch): fewer passes and fewer launches

``FULLRANK_KERNELS=0`` in the environment turns them off, ``kernels(False)`` for a part of a program.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

OFF = ("0", "false", "off", "no")
_switch = {"on": os.environ.get("FULLRANK_KERNELS", "1").lower() not in OFF}


def kernels_on() -> bool:
    """Whether fast routines may be chosen."""
    return _switch["on"]


@contextlib.contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Turn fast routines on or off within a block; every process of a run must do the same."""
    before = _switch["on"]
    _switch["on"] = on
    try:
        yield
    finally:
        _switch["on"] = before
