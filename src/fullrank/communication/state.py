"""Numbers of optimizer state that a process keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fullrank.communication.layout import Layout, Matrix
from fullrank.communication.projected import Projected
from fullrank.sharding import fair_owners


def state_numbers(
    method: Projected | Literal["full"], matrices: Sequence[Matrix], layout: Layout, *, limiter: bool = True
) -> int:
    """Numbers of optimizer state for these matrices in the process that keeps most, without counters of steps.

    | method | one process, ddp | fsdp2 over S, tall | fsdp2 over S, wide |
    | --- | --- | --- | --- |
    | full | 2 m n | 2 m n / S | 2 m n / S |
    | galore | 2 m r + n r | 2 m r / S + n r | (2 m r + n r) / S |
    | fira, apollo | 2 m r + n r + 1 | 2 m r / S + n r + 1 | (2 m r + n r) / S + 1 |

    With ``partition_states`` ddp's are divided by matrices, the largest first, to whoever has least.
    """
    sizes = [_state_of(method, matrix, layout.shards, limiter=limiter) for matrix in matrices]
    if not layout.partition_states:
        return sum(sizes)
    loads = [0] * layout.world
    for size, owner in zip(sizes, fair_owners(sizes, layout.world), strict=True):
        loads[owner] += size
    return max(loads)


def _state_of(method: Projected | Literal["full"], matrix: Matrix, shards: int, *, limiter: bool) -> int:
    """Numbers of state of one matrix in the first process, which has the longest part."""
    if method == "full":
        return 2 * -(-matrix.rows // shards) * matrix.columns
    basis_rows = -(-matrix.n // shards) if matrix.is_wide else matrix.n
    held = (2 * -(-matrix.m // shards) + basis_rows) * matrix.rank
    return held + (1 if limiter and method != "galore" else 0)
