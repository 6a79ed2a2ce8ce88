"""Float32 products by oneDNN, where torch's own are slow: on CPUs of AMD with AVX-512.

torch hands float32 products to Intel's MKL, which uses vectors of half the length on them (measured on Zen 5:
205 against 455 GFLOP/s on two cores). oneDNN is part of torch; its linear layer X W^T is what torch.compile calls.
It wants X row by row, and takes W in any order.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fullrank.ops.kernels import kernels_on

LEAST_WORK = 1 << 22
"""Multiplications below which the call costs more than the product gains."""
BLOCK = 1 << 20
"""Numbers of a product that is added to a weight at a time (4 MB, a part of a last-level cache)."""
LEAST_ROWS = 256
"""Rows of such a product at least: fewer are slower."""


@cache
def is_faster_here() -> bool:
    """Whether this machine's CPU is one on which oneDNN beats what torch calls."""
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (has_op and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """A B (M x N), by oneDNN where that is faster, else by torch."""
    return product(a_MK, b_KN) if takes(a_MK, b_KN) else a_MK @ b_KN


def takes(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether the product of these two is for oneDNN."""
    return (
        a_MK.dtype == torch.float32 == b_KN.dtype
        and a_MK.device.type == "cpu" == b_KN.device.type
        and a_MK.numel() * b_KN.shape[1] >= LEAST_WORK
        and is_faster_here()
        and kernels_on()
    )


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """A B (M x N) by oneDNN, row by row.

    An A that lies column by column is taken as (B^T A^T)^T: what is copied then is B and the result, not A.
    """
    if lies_in_columns(a_MK) and not lies_in_columns(b_KN):
        return _linear(b_KN.t().contiguous(), a_MK).t().contiguous()
    return _linear(a_MK.contiguous(), b_KN.t())


def update_(
    weight_MN: Tensor,
    low_Mr: Tensor,
    basis_Nr: Tensor,
    *,
    scale: float,
    keep: float,
    rest_MN: Tensor | None,
    factor: Tensor | None,
) -> None:
    """W = keep * W + scale * (X Q^T + factor * rest) in place, a block of rows at a time.

    The product is a tensor of its own here, of at most ``BLOCK`` numbers or ``LEAST_ROWS`` rows.
    """
    if lies_in_columns(weight_MN):
        weight_MN, low_Mr, basis_Nr = weight_MN.t(), basis_Nr, low_Mr
        rest_MN = None if rest_MN is None else rest_MN.t()
        factor = None if factor is None else factor.t()
    step = max(LEAST_ROWS, BLOCK // max(1, weight_MN.shape[1]))
    for start in range(0, weight_MN.shape[0], step):
        rows = slice(start, start + step)
        part = _linear(low_Mr[rows].contiguous(), basis_Nr)
        if rest_MN is not None and factor is not None:
            part.addcmul_(rest_MN[rows], factor if factor.shape[0] == 1 else factor[rows])
        weight = weight_MN[rows]
        if keep != 1.0:
            weight.mul_(keep)
        weight.add_(part, alpha=scale)


def lies_in_columns(matrix: Tensor) -> bool:
    """Whether a matrix is stored column by column, as a transposed one is."""
    return matrix.stride(0) == 1 and matrix.stride(1) > 1


def _linear(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_MK, w_NK, None, "none", [], "")
    return made
