"""One matrix at one step, whole or a process's part of it, and the sums that a method may ask for.

Shape legend as in ``ops.subspace``: an oriented matrix has M rows and N columns, of which the columns are projected,
R = G Q (M x r). A matrix that is spread over P processes is cut along one of the two:

    rows      G (M/P x N).   R, its moments and all norms of rows stay with the rows. Q is joined for a step.
    columns   G (M x N/P).   R is a sum: each process keeps M/P rows of it, with the moments. Q stays with the columns.

So "own rows" are M/P of the matrix in both, and M where it is whole; of Q each process keeps N/P rows. No process
ever sees G whole; what is sent has a side of length r or 1.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.ops import lowrank, subspace
from fullrank.sharding import Asking, Request, Split


@dataclass(frozen=True, slots=True)
class Cut:
    """How an oriented matrix is spread: ``side`` is rows or columns, or None where this process has all of it."""

    split: Split | None
    side: str | None
    num_rows: int
    """M of the whole matrix."""
    num_columns: int
    """N of the whole matrix."""
    transposed: bool
    """Whether the parameter was transposed to be oriented."""

    @classmethod
    def of(cls, shape: Sequence[int], split: Split | None, proj_type: str) -> Cut:
        """The cut of a parameter of this (whole) shape, as a matrix, first dimension x the rest, and oriented."""
        rows, columns = shape[0], math.prod(shape[1:])
        transposed = subspace.projects_rows((rows, columns), proj_type)
        if transposed:
            rows, columns = columns, rows
        side = None
        if split is not None and split.dim is not None and split.num > 1:
            side = "columns" if (split.dim == 0) == transposed else "rows"
        return cls(split, side, rows, columns, transposed)

    def flipped(self) -> Cut:
        """The cut of the transposed matrix."""
        other = {"rows": "columns", "columns": "rows", None: None}[self.side]
        return Cut(self.split, other, self.num_columns, self.num_rows, not self.transposed)

    def in_reach(self, own_Nr: Tensor) -> Asking:
        """Of something with a row for each column, what this process's columns need, from the rows that it keeps."""
        if self.side != "rows":
            return own_Nr
        return (yield Request("all_rows", own_Nr, num_rows=self.num_columns))

    def in_columns(self, whole_Nr: Tensor) -> Tensor:
        """Of something with a row for each column, those of this process's columns."""
        return self.split.rows(whole_Nr) if self.side == "columns" and self.split is not None else whole_Nr

    def kept(self, reach_Nr: Tensor) -> Tensor:
        """What of ``in_reach`` this process keeps."""
        return self.split.rows(reach_Nr) if self.side == "rows" and self.split is not None else reach_Nr

    def total(self, part: Tensor) -> Asking:
        """The sum over all processes' parts."""
        if self.side is None:
            return part
        return (yield Request("sum", part))


@dataclass(frozen=True, slots=True)
class MatrixStep:
    """One matrix at one step, oriented with its projected side last; this process's part of it, if it is cut."""

    weight: Tensor
    """W, a view of the parameter, or a copy that is written back."""
    grad: Tensor
    """G, of the same shape, read only."""
    low: Tensor
    """R = G Q (own rows x r), or P^T G Q (r x r), the same in all processes."""
    direction: Tensor
    """The adaptive direction of R, same shape."""
    basis: Tensor
    """Q (N x r), or those of its rows that belong to this process's columns."""
    basis_left: Tensor | None
    """P (M x r) of proj_type "full", or those of its rows that belong to this process's rows."""
    step_size: float
    """Learning rate with Adam's bias corrections."""
    keep: float
    """1 - lr * weight_decay, the factor that decoupled decay leaves of the updated weight."""
    cut: Cut
    row_norms_sq: Tensor | None = None
    """Squared norms of the rows of ``grad``, where projecting it found them on the way."""

    def low_norms(self, *, whole: bool) -> Generator[Request, Tensor, tuple[Tensor, Tensor]]:
        """Norms of R and of the direction: of each own row (own rows x 1), or whole (1 x 1)."""
        norms = lowrank.norms(self.low, whole=whole), lowrank.norms(self.direction, whole=whole)
        if not whole or self.cut.side is None or self.basis_left is not None:
            return norms
        low_norm, direction_norm = (yield from self.cut.total(torch.stack(norms).square())).sqrt()
        return low_norm, direction_norm

    def norms_sq(self, matrix: Tensor, *, whole: bool) -> Asking:
        """Squared norms of a matrix cut like G: of each own row (own rows x 1), or whole (1 x 1)."""
        if matrix is self.grad and self.row_norms_sq is not None:
            norms_sq = self.row_norms_sq.sum(0, keepdim=True) if whole else self.row_norms_sq
        else:
            norms_sq = lowrank.norms_sq(matrix, whole=whole)
        if whole:
            return (yield from self.cut.total(norms_sq))
        if self.cut.side == "columns":
            return (yield Request("to_rows", norms_sq))
        return norms_sq

    def all_rows(self, own: Tensor) -> Asking:
        """What own rows have (own rows x ...), for every row of ``grad``; of proj_type "full" there is but one R."""
        if self.cut.side != "columns" or self.basis_left is not None:
            return own
        return (yield Request("all_rows", own, num_rows=self.cut.num_rows))
