"""The fused low-rank plus scaled-residual update, without ever forming the residual.

Shape legend as in ``subspace``: G, W (M x N), Q (N x r), R = G Q and the direction D (M x r).
The residual is E = G - k R Q^T with k = alpha (authors' code) or 1 (Algorithm 1 of arXiv:2410.01623).
Because Q is orthonormal, |E_i|^2 = |G_i|^2 - (2 k - k^2) |R_i|^2 for every row i, so norms of E
come from two vectors; and W -= step (a D Q^T + e S), S = c s E, is one product and one scaled add:

    W -= step * ((a D - k e c s R) Q^T + e c s G)

The closed form loses digits where the residual is a small part of the gradient. Where r is at least
half of N the product is as large as G anyway, so the residual is formed directly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fullrank.ops.kernels import gpu, onednn

BLOCK = 1 << 18
"""Numbers that are squared at a time for the row norms of a transposed matrix on a CPU (a megabyte) ..."""
ROWS = 128
"""... and rows of them at most: few enough for a cache, many enough that adding them up costs little."""


def uses_direct_residual(projected_side: int, rank: int) -> bool:
    """Whether the residual is formed (r at least half of N) instead of taken from the closed form."""
    return 2 * rank >= projected_side


def norms(matrix_MN: Tensor, *, whole: bool = False) -> Tensor:
    """Norm of each row (M x 1), or of the whole matrix (1 x 1); float32 at least."""
    return norms_sq(matrix_MN, whole=True).sqrt_() if whole else _row_norms(matrix_MN)


def norms_sq(matrix_MN: Tensor, *, whole: bool = False) -> Tensor:
    """Squared norm of each row (M x 1), or of the whole matrix (1 x 1); float32 at least."""
    if _is_transposed_on_cpu(matrix_MN):
        rows = _transposed_norms_sq(matrix_MN)
    else:
        rows = _row_norms(matrix_MN).square_()
    return rows.sum(0, keepdim=True) if whole else rows


def residual_norms_sq(grad_norms_sq: Tensor, low_norms: Tensor, *, kept: float) -> Tensor:
    """Squared norms of E = G - kept * R Q^T from those of G and the norms of R, by row or whole alike; at least 0."""
    removed = 2.0 * kept - kept * kept
    return torch.addcmul(grad_norms_sq, low_norms, low_norms, value=-removed).clamp_(min=0.0)


def lift(low: Tensor, basis_Nr: Tensor, basis_left_Mr: Tensor | None = None) -> Tensor:
    """X Q^T (M x N), or P X Q^T with a left basis."""
    if basis_left_Mr is not None:
        low = basis_left_Mr.to(low.dtype) @ low
    return onednn.matmul(low, basis_Nr.to(low.dtype).t())


def add_lifted_(
    weight_MN: Tensor,
    low: Tensor,
    basis_Nr: Tensor,
    basis_left_Mr: Tensor | None = None,
    *,
    scale: float,
    keep: float = 1.0,
    rest_MN: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """W = keep * W + scale * (X Q^T + factor * rest) in place, or P X Q^T; without a ``rest`` the product alone.

    ``factor`` is a column (M x 1) or a single number (1 x 1). Torch's own way reads and writes W twice, the first time
    inside the product, and rounds it twice; the kernel for CUDA does both once.
    """
    if basis_left_Mr is not None:
        low = basis_left_Mr.to(low.dtype) @ low
    if gpu.takes_update(weight_MN, low, basis_Nr, rest_MN):
        gpu.update_(weight_MN, low, basis_Nr, scale=scale, keep=keep, rest_MN=rest_MN, factor=factor)
        return
    dtype = weight_MN.dtype
    low, basis_Nr = low.to(dtype), basis_Nr.to(dtype)
    factor = None if factor is None else factor.to(dtype)
    if onednn.takes(low, basis_Nr.t()):
        onednn.update_(weight_MN, low, basis_Nr, scale=scale, keep=keep, rest_MN=rest_MN, factor=factor)
        return
    weight_MN.addmm_(low, basis_Nr.t(), beta=keep, alpha=scale)
    if rest_MN is not None and factor is not None:
        weight_MN.addcmul_(rest_MN, factor, value=scale)


def add_scaled_(weight_MN: Tensor, matrix_MN: Tensor, factor: Tensor, *, scale: float) -> None:
    """W += scale * factor * G in place; ``factor`` is a column (M x 1) or a single number (1 x 1)."""
    weight_MN.addcmul_(matrix_MN, factor.to(weight_MN.dtype), value=scale)


def limit_growth_(norm: Tensor, previous: Tensor, *, gamma: float, floor: float) -> Tensor:
    """Fira's norm-growth limiter (section 4.2): the factor c, and ``previous`` updated in place.

    c = 1 while ``previous`` is not above ``floor`` (so also at the first call, where it is 0), else
    gamma / max(norm / (previous + 1e-8), gamma). All are 0-d tensors: nothing waits for the device.
    Without a floor a first norm near zero would allow growth from there by 1% a step for ever.
    """
    if gpu.takes_limit(norm, previous):
        return gpu.limit_growth_(norm, previous, gamma=gamma, floor=floor)
    # A norm whose squares overflowed: the update is dropped, and the memory stays.
    norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
    growth = (norm / (previous + 1e-8)).clamp_(min=gamma)
    factor = torch.where(previous > floor, gamma / growth, 1.0)
    previous.copy_(torch.where(norm < math.inf, norm * factor, previous))
    return factor


def _row_norms(matrix_MN: Tensor) -> Tensor:
    if _is_transposed_on_cpu(matrix_MN):
        return _transposed_norms_sq(matrix_MN).sqrt_()
    dtype = torch.promote_types(matrix_MN.dtype, torch.float32)
    made: Tensor = torch.linalg.vector_norm(matrix_MN, dim=1, keepdim=True, dtype=dtype)
    return made


def _is_transposed_on_cpu(matrix_MN: Tensor) -> bool:
    return matrix_MN.device.type == "cpu" and onednn.lies_in_columns(matrix_MN)


def _transposed_norms_sq(matrix_MN: Tensor) -> Tensor:
    """Torch's CPU norm walks a transposed matrix with long strides: add up the squares of blocks of rows instead."""
    blocks = matrix_MN.t().split(max(1, min(ROWS, BLOCK // max(1, matrix_MN.shape[0]))))
    squares = blocks[0].to(torch.promote_types(matrix_MN.dtype, torch.float32)).square()
    for block in blocks[1:]:
        squares[: block.shape[0]].addcmul_(block, block)
    summed: Tensor = squares.sum(0)
    return summed.unsqueeze(1)
