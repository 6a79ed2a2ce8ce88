"""What GaLore, Fira and APOLLO send under FSDP2, in a step and in a refresh: the requests of ``fullrank.projected``."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fullrank.communication.layout import Collective, Kind, Layout, Matrix, filled, padded
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
    refreshes: bool = False,
    itemsize: int = 4,
    gradient_itemsize: int = 4,
) -> list[Collective]:
    """What the step of a projected method sends, beside a refresh. Nothing under ddp: gradients are whole there.

    Under fsdp2, for each matrix, in numbers:

    | method | tall: all-gather | all-reduce | wide: reduce-scatter | all-reduce | all-gather |
    | --- | --- | --- | --- | --- | --- |
    | galore | n r | 0 | m r | 0 | m r |
    | fira | n r | 1 | m (r + 1) | 1 | m (r + 1) |
    | apollo | n r | 1 | m (r + 1) | 1 | m |

    n r is the basis, in the gradient's dtype (in float32 where the residual is formed); a refresh joins it, or draws
    all of it, so that step does not. The 1 is the norm that the limiter needs; without the limiter it is not sent, nor
    APOLLO's m norms of the gradient's rows. With one factor for a matrix (``scaling`` matrix or tensor) norms are sums:
    3 numbers all-reduced by Fira, 2 by APOLLO and 1 more with its limiter; then no norms of rows, and no factors but
    for the one. Where r is at least n / 2 Fira forms the residual itself, which of a wide matrix takes R of all rows:
    another m r gathered.

    Args:
        method: fira, galore or apollo.
        matrices: The projected weights.
        layout: Of the processes.
        by_row: Whether there is a factor for each row of R (``scaling`` column or channel), not one for the matrix.
        limiter: Whether there is a limiter (``limiter_gamma``); GaLore has none.
        refreshes: Whether bases are renewed in this step.
        itemsize: Bytes of a number of R.
        gradient_itemsize: Bytes of an entry of the gradient.
    """
    asked = []
    for matrix in matrices:
        m, n, r, wide = matrix.m, matrix.n, matrix.rank, matrix.is_wide
        is_direct = uses_direct_residual(n, r)
        asks = [_Ask("to_rows", m, r, itemsize)] if wide else []
        if not (wide or refreshes):
            asks.append(_Ask("all_rows", n, r, itemsize if is_direct else gradient_itemsize))
        if method != "galore":
            if not by_row:
                asks.append(_Ask("sum", 2, 1, itemsize))
            if method == "fira" and wide and is_direct:
                asks.append(_Ask("all_rows", m, r, itemsize))
            if not by_row and (method == "fira" or limiter):
                asks.append(_Ask("sum", 1, 1, itemsize))
            elif by_row:
                asks += [_Ask("to_rows", m, 1, itemsize)] if wide and (method == "fira" or limiter) else []
                asks += [_Ask("sum", 1, 1, itemsize)] if limiter else []
        if wide:
            asks += [_Ask("all_rows", m, r, itemsize)] if method != "apollo" else []
            asks += [_Ask("all_rows", m, 1, itemsize)] if method != "galore" and by_row else []
        asked.append(asks)
    return _answered(asked, matrices, layout)


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
    (G^T (G Q) and the largest entry of G Q); of a wide one it all-reduces m r (G Q) and gathers n r. But for the first
    time the old basis of a tall matrix is joined before, n r. A random basis is drawn from the seed by every process:
    nothing is sent. To rotate the moments the old basis is joined in any case, and a wide matrix all-reduces r r.

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
        old = [_Ask("all_rows", n, r, itemsize)] if not first and (rotate_moments or basis == "power") else []
        if matrix.is_wide:
            asks = [_Ask("sum", m, r, itemsize), _Ask("all_rows", n, r, itemsize)] * iterations
            asks += [_Ask("sum", r, r, itemsize)] if rotate_moments and not first else []
        else:
            asks = old + [_Ask("max", 1, 1, itemsize), _Ask("sum", n, r, itemsize)] * iterations
        asked.append(asks)
    return _answered(asked, matrices, layout)


@dataclass(frozen=True, slots=True)
class _Ask:
    """What one matrix asks of all processes (``sharding.Request``): of so many rows and columns as a whole."""

    kind: str
    rows: int
    columns: int
    itemsize: int

    def buffer(self, shards: int) -> int:
        """Numbers that count against a bucket."""
        if self.kind == "all_rows":
            return padded(self.rows, shards) // shards * self.columns
        return self.rows * self.columns

    def payload(self, shards: int) -> int:
        """Numbers of the tensor that the collective is about."""
        return (padded(self.rows, shards) if self.kind in ("to_rows", "all_rows") else self.rows) * self.columns


def _answered(asked: Sequence[list[_Ask]], matrices: Sequence[Matrix], layout: Layout) -> list[Collective]:
    """The collectives that ``sharding.run_together`` makes of what matrices ask, in waves as the optimizers run."""
    shards = layout.shards
    if shards == 1:
        return []
    numbers: Counter[tuple[str, int]] = Counter()
    calls: Counter[tuple[str, int]] = Counter()
    held = [(padded(matrix.m, shards) // shards + matrix.n) * matrix.rank for matrix in matrices]
    for wave in filled(held, WAVE):
        waiting = [deque(asked[number]) for number in wave]
        while kinds := {asks[0].kind for asks in waiting if asks}:
            kind = next(kind for kind in ORDER if kind in kinds)
            answered = [asks.popleft() for asks in waiting if asks and asks[0].kind == kind]
            for itemsize in {ask.itemsize for ask in answered}:  # a buffer holds numbers of one dtype
                alike = [ask for ask in answered if ask.itemsize == itemsize]
                numbers[kind, itemsize] += sum(ask.payload(shards) for ask in alike)
                calls[kind, itemsize] += len(filled([ask.buffer(shards) for ask in alike], BUCKET))
    return [
        Collective(KINDS[kind], numbers[kind, itemsize], itemsize, shards, calls[kind, itemsize])
        for kind, itemsize in sorted(calls, key=lambda key: (ORDER.index(key[0]), key[1]))
    ]
