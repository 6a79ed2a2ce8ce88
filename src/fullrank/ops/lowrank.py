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

BLOCK = 1 << 17
"""Elements summed at a time for the row norms of a transposed matrix on a CPU (half a megabyte)."""


def uses_direct_residual(projected_side: int, rank: int) -> bool:
    """Whether the residual is formed (r at least half of N) instead of taken from the closed form."""
    return 2 * rank >= projected_side


def norms(matrix_MN: Tensor, *, whole: bool = False) -> Tensor:
    """Norm of each row (M x 1), or of the whole matrix (1 x 1); float32 at least."""
    dtype = torch.promote_types(matrix_MN.dtype, torch.float32)
    if matrix_MN.device.type == "cpu" and matrix_MN.stride(0) == 1 < matrix_MN.stride(1):
        # torch's CPU norm walks a transposed matrix with long strides: sum blocks of its columns instead.
        blocks = matrix_MN.t().split(max(1, BLOCK // max(1, matrix_MN.shape[0])))
        rows = torch.zeros(matrix_MN.shape[0], dtype=dtype)
        for block in blocks:
            rows += block.to(dtype).square().sum(0)
        rows = rows.sqrt_().unsqueeze(1)
    else:
        rows = torch.linalg.vector_norm(matrix_MN, dim=1, keepdim=True, dtype=dtype)
    return torch.linalg.vector_norm(rows, dim=0, keepdim=True) if whole else rows


def residual_norms_sq(grad_norms_sq: Tensor, low_norms: Tensor, *, kept: float) -> Tensor:
    """Squared norms of E = G - kept * R Q^T from those of G and the norms of R, by row or whole alike; at least 0."""
    removed = 2.0 * kept - kept * kept
    return torch.addcmul(grad_norms_sq, low_norms, low_norms, value=-removed).clamp_(min=0.0)


def lift(low: Tensor, basis_Nr: Tensor, basis_left_Mr: Tensor | None = None) -> Tensor:
    """X Q^T (M x N), or P X Q^T with a left basis."""
    if basis_left_Mr is not None:
        low = basis_left_Mr.to(low.dtype) @ low
    return low @ basis_Nr.to(low.dtype).t()


def add_lifted_(
    weight_MN: Tensor,
    low: Tensor,
    basis_Nr: Tensor,
    basis_left_Mr: Tensor | None = None,
    *,
    scale: float,
    keep: float = 1.0,
) -> None:
    """W = keep * W + scale * X Q^T (or P X Q^T) in place, the sum taken inside the product."""
    if basis_left_Mr is not None:
        low = basis_left_Mr.to(low.dtype) @ low
    dtype = weight_MN.dtype
    weight_MN.addmm_(low.to(dtype), basis_Nr.to(dtype).t(), beta=keep, alpha=scale)


def add_scaled_(weight_MN: Tensor, matrix_MN: Tensor, factor: Tensor, *, scale: float) -> None:
    """W += scale * factor * G in place; ``factor`` is a column (M x 1) or a single number (1 x 1)."""
    weight_MN.addcmul_(matrix_MN, factor.to(weight_MN.dtype), value=scale)


def limit_growth_(norm: Tensor, previous: Tensor, *, gamma: float, floor: float) -> Tensor:
    """Fira's norm-growth limiter (section 4.2): the factor c, and ``previous`` updated in place.

    c = 1 while ``previous`` is not above ``floor`` (so also at the first call, where it is 0), else
    gamma / max(norm / (previous + 1e-8), gamma). All are 0-d tensors: nothing waits for the device.
    Without a floor a first norm near zero would allow growth from there by 1% a step for ever.
    """
    # A norm whose squares overflowed: the update is dropped, and the memory stays.
    norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
    growth = (norm / (previous + 1e-8)).clamp_(min=gamma)
    factor = torch.where(previous > floor, gamma / growth, 1.0)
    previous.copy_(torch.where(norm < math.inf, norm * factor, previous))
    return factor
