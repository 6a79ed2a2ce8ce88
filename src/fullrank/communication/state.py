"""Numbers of optimizer state that a process keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fullrank.communication.layout import Layout, Matrix
from fullrank.communication.projected import Projected
from fullrank.partition import divide_fairly


def state_numbers(
    method: Projected | Literal["full"],
    matrices: Sequence[Matrix],
    layout: Layout,
    *,
    plain: Sequence[int] = (),
    limiter: bool = True,
) -> int:
    """Numbers of optimizer state in the process that keeps most, without counters of steps and scales of 8-bit moments.

    | method | one process, ddp | fsdp2 over S |
    | --- | --- | --- |
    | full | 2 m n | 2 m n / S |
    | galore | 2 m r + n r | (2 m r + n r) / S |
    | fira, apollo | 2 m r + n r + 1 | (2 m r + n r) / S + 1 |

    A parameter that is not projected has 2 numbers for each of its own, or 2 / S. With ``partition_states`` ddp's are
    divided by parameters, the largest first, to whoever has least: no process has less than the largest.

    Args:
        method: fira, galore, apollo or full.
        matrices: The projected weights (full: any).
        layout: Of the processes.
        plain: Numbers of every parameter that is not projected.
        limiter: Whether there is a limiter (``limiter_gamma``).
    """
    sizes = [_state_of(method, matrix, layout.shards, limiter=limiter) for matrix in matrices]
    sizes += [2 * -(-numel // layout.shards) for numel in plain]
    if not layout.partition_states:
        return sum(sizes)
    loads = [0] * layout.world
    divide_fairly(sizes, loads)
    return max(loads)


def _state_of(method: Projected | Literal["full"], matrix: Matrix, shards: int, *, limiter: bool) -> int:
    """Numbers of state of one matrix in the first process, which has the longest part."""
    if method == "full":
        return 2 * -(-matrix.rows // shards) * matrix.columns
    held = (2 * -(-matrix.m // shards) + -(-matrix.n // shards)) * matrix.rank
    return held + (1 if limiter and method != "galore" else 0)
