"""The Triton kernels themselves; imported where one is launched, so that triton stays optional.

Shape legend as in ``ops.lowrank``: G, W (M x N) in any layout, Q (N x r), R, X and moments (M x r, row by row).
Half-precision numbers are brought to float32 right after they are loaded: Triton's interpreter, which the tests use,
computes wrongly in bfloat16 and says nothing. ``DOT`` is the type that products take, float32 under the interpreter.

Block sizes follow from shapes and types by rule. They are not tuned by the clock: two processes that chose
differently would round differently, and the copies of a weight under DDP would part.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    grad_ptr, basis_ptr, low_ptr, norms_ptr, num_rows, num_columns, stride_row, stride_column, rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R = G Q and |G_i|^2 of BLOCK_M rows; all of their columns are read once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    row_ok, rank_ok = rows < num_rows, ranks < rank
    row_starts = grad_ptr + rows.to(tl.int64)[:, None] * stride_row
    low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    norms = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_ok = columns < num_columns
        offsets = columns.to(tl.int64)[None, :] * stride_column
        grad = tl.load(row_starts + offsets, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        basis = tl.load(
            basis_ptr + columns.to(tl.int64)[:, None] * rank + ranks[None, :],
            mask=column_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )
        exact = grad.to(tl.float32)
        norms += tl.sum(exact * exact, axis=1)
        low = tl.dot(grad.to(DOT), basis.to(DOT), low, input_precision=PRECISION)
    places = low_ptr + rows.to(tl.int64)[:, None] * rank + ranks[None, :]
    tl.store(places, low, mask=row_ok[:, None] & rank_ok[None, :])
    tl.store(norms_ptr + rows, norms, mask=row_ok)


@triton.jit
def update_kernel(
    weight_ptr, low_ptr, basis_ptr, rest_ptr, factor_ptr, num_rows, num_columns, rank, weight_row, weight_column,
    rest_row, rest_column, factor_row, keep, scale, HAS_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = keep W + scale (X Q^T + factor * rest) of one tile, summed in float32 and rounded once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < num_rows, columns < num_columns
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    step = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        rank_ok = ranks < rank
        low_places = low_ptr + wide_rows[:, None] * rank + ranks[None, :]
        low = tl.load(low_places, mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
        basis_places = basis_ptr + wide_columns[None, :] * rank + ranks[:, None]
        basis = tl.load(basis_places, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
        step = tl.dot(low.to(DOT), basis.to(DOT), step, input_precision=PRECISION)
    mask = row_ok[:, None] & column_ok[None, :]
    if HAS_REST:
        factor = tl.load(factor_ptr + rows * factor_row, mask=row_ok, other=0.0).to(tl.float32)
        rest_places = rest_ptr + wide_rows[:, None] * rest_row + wide_columns[None, :] * rest_column
        step += factor[:, None] * tl.load(rest_places, mask=mask, other=0.0).to(tl.float32)
    places = weight_ptr + wide_rows[:, None] * weight_row + wide_columns[None, :] * weight_column
    weight = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, (keep * weight + scale * step).to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def direction_kernel(
    low_ptr, mean_ptr, square_ptr, direction_ptr, num, new1, keep2, new2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam's moments in place, and m / (sqrt(v) + eps); new1 = 1 - beta1, keep2 = beta2, new2 = 1 - beta2."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num
    low = tl.load(low_ptr + places, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + places, mask=mask, other=0.0)
    square = tl.load(square_ptr + places, mask=mask, other=0.0)
    mean += new1 * (low - mean)
    square = keep2 * square + new2 * low * low
    tl.store(mean_ptr + places, mean, mask=mask)
    tl.store(square_ptr + places, square, mask=mask)
    tl.store(direction_ptr + places, mean / (tl.sqrt(square) + eps), mask=mask)


@triton.jit
def limit_kernel(norm_ptr, previous_ptr, factor_ptr, gamma, floor, infinity):
    """Fira's limiter on three single numbers: ``ops.lowrank.limit_growth_`` in one launch instead of eleven."""
    norm = tl.load(norm_ptr)
    previous = tl.load(previous_ptr)
    is_number = norm < infinity  # false for NaN too
    growth = tl.where(is_number, norm, infinity) / (previous + 1e-8)
    growth = tl.where(growth > gamma, growth, gamma)
    factor = tl.where(previous > floor, gamma / growth, 1.0)
    tl.store(factor_ptr, factor)
    tl.store(previous_ptr, tl.where(is_number, norm * factor, previous))
