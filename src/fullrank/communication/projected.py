"""What GaLore, Fira and APOLLO send under FSDP2, in a step and in a refresh: the requests of ``fullrank.projected``."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.communication.layout import Collective, Kind, Layout, Matrix, padded
from fullrank.ops.lowrank import uses_direct_residual
from fullrank.ops.subspace import FIRST_POWER_ITERATIONS
from fullrank.projected.training import WAVE
from fullrank.sharding import BUCKET, ORDER

Projected = Literal["fira", "galore", "apollo"]

KINDS: dict[str, Kind] = {
    "to_rows": "reduce_scatter",
    "max": "all_reduce",
    "sum": "all_reduce",
    "all_rows": "all_gather",
}
"""Kind of request -> the collective that answers it."""


def step_traffic(
    method: Projected,
    matrices: Sequence[Matrix],
    layout: Layout,
    *,
    by_row: bool = True,
    limiter: bool = True,
    itemsize: int = 4,
) -> list[Collective]:
    """What the step of a projected method sends between refreshes. Nothing under ddp: gradients are whole there.

    Under fsdp2, for each matrix, in numbers:

    | method | tall: all-reduce | wide: reduce-scatter | wide: all-reduce | wide: all-gather |
    | --- | --- | --- | --- | --- |
    | galore | 0 | m r | 0 | m r |
    | fira | 1 | m (r + 1) | 1 | m (r + 1) |
    | apollo | 1 | m (r + 1) | 1 | m |

    The 1 is the norm that the limiter needs; without the limiter it is not sent, nor APOLLO's m norms of the
    gradient's rows. With one factor for a matrix (``scaling`` matrix or tensor) norms are sums: 3 numbers all-reduced
    by Fira, 2 by APOLLO and 1 more with its limiter; then no norms of rows, and no factors but for the one. Where r is
    at least n / 2 Fira forms the residual itself, which of a wide matrix takes R of all rows: another m r gathered.

    Args:
        method: fira, galore or apollo.
        matrices: The projected weights.
        layout: Of the processes.
        by_row: Whether there is a factor for each row of R (``scaling`` column or channel), not one for the matrix.
        limiter: Whether there is a limiter (``limiter_gamma``); GaLore has none.
        itemsize: Bytes of a number of R.
    """
    asked = []
    for matrix in matrices:
        m, r, wide = matrix.m, matrix.rank, matrix.is_wide
        asks = [_Ask("to_rows", m, r)] if wide else []
        if method != "galore":
            if not by_row:
                asks.append(_Ask("sum", 2, 1))
            if method == "fira" and wide and uses_direct_residual(matrix.n, r):
                asks.append(_Ask("all_rows", m, r))
            if not by_row and (method == "fira" or limiter):
                asks.append(_Ask("sum", 1, 1))
            elif by_row:
                asks += [_Ask("to_rows", m, 1)] if wide and (method == "fira" or limiter) else []
                asks += [_Ask("sum", 1, 1)] if limiter else []
        if wide:
            asks += [_Ask("all_rows", m, r)] if method != "apollo" else []
            asks += [_Ask("all_rows", m, 1)] if method != "galore" and by_row else []
        asked.append(asks)
    return _answered(asked, matrices, layout, itemsize)


def refresh_traffic(
    matrices: Sequence[Matrix],
    layout: Layout,
    *,
    basis: Literal["power", "random"] = "power",
    first: bool = False,
    rotate_moments: bool = False,
    itemsize: int = 4,
) -> list[Collective]:
    """What new bases for all matrices cost, once in ``update_proj_gap`` steps. Nothing under ddp.

    Under fsdp2 each power iteration (3 at the first refresh, 1 at others) all-reduces n r + 1 numbers of a tall matrix
    (G^T (G Q) and the largest entry of G Q); of a wide one it all-reduces m r (G Q) and gathers n r. A random basis
    is drawn from the seed by every process: nothing is sent. To rotate the moments a wide matrix all-reduces r r.

    Args:
        matrices: The projected weights.
        layout: Of the processes.
        basis: How a basis is found.
        first: Whether these are the first ones.
        rotate_moments: Whether the moments are carried over.
        itemsize: Bytes of a number.
    """
    iterations = 0 if basis == "random" else FIRST_POWER_ITERATIONS if first else 1
    asked = []
    for matrix in matrices:
        m, n, r = matrix.m, matrix.n, matrix.rank
        if matrix.is_wide:
            asks = [_Ask("sum", m, r), _Ask("all_rows", n, r)] * iterations
            asks += [_Ask("sum", r, r)] if rotate_moments and not first else []
        else:
            asks = [_Ask("max", 1, 1), _Ask("sum", n, r)] * iterations
        asked.append(asks)
    return _answered(asked, matrices, layout, itemsize)


@dataclass(frozen=True, slots=True)
class _Ask:
    """What one matrix asks of all processes (``sharding.Request``): of so many rows and columns as a whole."""

    kind: str
    rows: int
    columns: int

    def buffer(self, shards: int) -> int:
        """Numbers that count against a bucket."""
        if self.kind == "all_rows":
            return padded(self.rows, shards) // shards * self.columns
        return self.rows * self.columns

    def payload(self, shards: int) -> int:
        """Numbers of the tensor that the collective is about."""
        return (padded(self.rows, shards) if self.kind in ("to_rows", "all_rows") else self.rows) * self.columns


def _answered(
    asked: Sequence[list[_Ask]], matrices: Sequence[Matrix], layout: Layout, itemsize: int
) -> list[Collective]:
    """The collectives that ``sharding.run_together`` makes of what matrices ask, in waves as the optimizers run."""
    shards = layout.shards
    if shards == 1:
        return []
    numbers, calls = dict.fromkeys(ORDER, 0), dict.fromkeys(ORDER, 0)
    shares = [padded(matrix.m, shards) // shards * matrix.rank for matrix in matrices]
    for wave in waves(shares):
        left = [deque(asked[number]) for number in wave]
        while waiting := {asks[0].kind for asks in left if asks}:
            kind = next(kind for kind in ORDER if kind in waiting)
            answered = [asks.popleft() for asks in left if asks and asks[0].kind == kind]
            numbers[kind] += sum(ask.payload(shards) for ask in answered)
            calls[kind] += num_buckets([ask.buffer(shards) for ask in answered])
    return [Collective(KINDS[kind], numbers[kind], itemsize, shards, calls[kind]) for kind in ORDER if calls[kind]]


def num_buckets(sizes: Sequence[int], bound: int = BUCKET) -> int:
    """Buffers for requests of these sizes, filled in their order up to a bound; a larger one goes by itself."""
    made, held = 0, bound
    for size in sizes:
        if not made or held + size > bound:
            made, held = made + 1, 0
        held += size
    return made
