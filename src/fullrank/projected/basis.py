"""A new basis for a matrix, whole or cut: exact, by block power iteration, or at random; equal in all processes.

Of a cut matrix a power iteration sends one tensor with a side of length r for each half: rows cut, the product
G^T (G Q) is summed (N x r); columns cut, G Q is summed (M x r) and the parts of G^T (G Q) are joined (N x r).
The QR then sees the same numbers in every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.ops import subspace
from fullrank.projected.matrix import Cut
from fullrank.sharding import Asking, Request

Draw = Callable[[int, int], Tensor]
"""Makes a random basis (size x rank)."""


def new_basis(grad: Tensor, old: Tensor, cut: Cut, kind: str, *, first: bool, draw: Draw) -> Asking:
    """A basis for the columns of an oriented gradient (this process's part of it).

    Args:
        grad: G (M x N), or a process's part.
        old: The last basis (N x r), or the rows of it that belong to this process's columns; only power reads it.
        cut: How G is spread.
        kind: svd (whole matrices only), power, or random.
        first: Whether there was no basis yet.
        draw: Of the directions that random is, and that power starts from.
    """
    rank = old.shape[1]
    if kind == "svd":
        assert cut.side is None
        return subspace.svd_basis(grad, rank)
    if kind == "random":
        return cut.in_columns(draw(cut.num_columns, rank))
    if not first:
        return (yield from power_basis(grad, old, cut, iterations=1))
    start = cut.in_columns(draw(cut.num_columns, rank))
    return (yield from power_basis(grad, start, cut, iterations=subspace.FIRST_POWER_ITERATIONS))


def power_basis(grad: Tensor, start: Tensor, cut: Cut, *, iterations: int) -> Asking:
    """``ops.subspace.power_basis`` on a matrix that may be cut; sums in float32 at least."""
    if cut.side is None:
        return subspace.power_basis(grad, start, iterations=iterations)
    basis = start
    for _ in range(iterations):
        image = subspace.power_image(grad, basis)
        if cut.side == "columns":
            image = yield Request("sum", image.to(torch.promote_types(image.dtype, torch.float32)))
            size = subspace.largest(image)
            square = subspace.power_square(grad, image, size)
            square = yield Request("all_rows", square, num_rows=cut.num_columns)
        else:
            size = yield Request("max", subspace.largest(image))
            square = yield Request("sum", subspace.power_square(grad, image, size))
        basis = cut.in_columns(subspace.orthonormal(square))
    return basis
