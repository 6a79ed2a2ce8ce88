"""The Triton kernels behind ordinary functions: when they may be used, and how they are launched.

They run where tensors are on a CUDA device, triton can be imported, ``kernels_on()`` holds, and shape and dtype are
ones that the kernel is good for (each ``takes_...``). Under ``TRITON_INTERPRET=1`` they take CPU tensors: for tests.

Bytes that a step of Fira moves for a matrix of bfloat16 (M x N, rank r), O((M + N) r) aside: the gradient twice, the
weight in and out, 8 M N; three times the gradient, 10 M N, where the rank is too large for the accumulator or the
matrix has few rows. torch's AdamW in bfloat16 moves 14 M N, in float32 28 M N.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fullrank.ops.kernels import kernels_on

HALF = (torch.bfloat16, torch.float16)
LARGEST_RANK = 256
"""Whose accumulator, BLOCK_M x r numbers of float32, still fits into registers."""
FEWEST_ROWS = 4096
"""Rows from which on blocks of them keep a GPU busy; the library splits the sum for fewer."""
ELEMENTS = 1024
"""Numbers that one program of an elementwise kernel takes."""


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_reachable(*tensors: Tensor) -> bool:
    """Whether kernels may be launched on these tensors."""
    if not (kernels_on() and has_triton()):
        return False
    return all(type(t) in _PLAIN and (t.is_cuda or (is_interpreted() and t.device.type == "cpu")) for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)
"""A fake or traced tensor has no memory to point at."""


def takes_projection(grad_MN: Tensor, basis_Nr: Tensor) -> bool:
    """Whether ``project`` is for these: few ranks, many rows, half precision."""
    return (
        basis_Nr.shape[1] <= LARGEST_RANK
        and grad_MN.numel() > 0
        and (grad_MN.shape[0] >= FEWEST_ROWS or is_interpreted())
        and _is_good_at(grad_MN.dtype)
        and is_reachable(grad_MN, basis_Nr)
    )


def project(grad_MN: Tensor, basis_Nr: Tensor) -> tuple[Tensor, Tensor]:
    """R = G Q (M x r) and the squared norms of G's rows (M x 1), both float32, in one pass over G."""
    from fullrank.ops.kernels import triton_source as source

    num_rows, num_columns = grad_MN.shape
    rank = basis_Nr.shape[1]
    basis_Nr = basis_Nr.to(grad_MN.dtype).contiguous()
    low = torch.empty((num_rows, rank), dtype=torch.float32, device=grad_MN.device)
    norms_sq = torch.empty((num_rows, 1), dtype=torch.float32, device=grad_MN.device)
    block_m = 16 if is_interpreted() else 64
    with torch.cuda.device_of(grad_MN):
        source.project_kernel[(-(-num_rows // block_m),)](
            grad_MN, basis_Nr, low, norms_sq, num_rows, num_columns, *grad_MN.stride(), rank,
            BLOCK_M=block_m, BLOCK_N=64, BLOCK_R=_power_of_two(rank), **_product_options(grad_MN.dtype),
            num_warps=8 if rank > 128 else 4, num_stages=2 if rank > 128 else 3,
        )  # fmt: skip
    return low, norms_sq


def takes_update(weight_MN: Tensor, low_Mr: Tensor, basis_Nr: Tensor, rest_MN: Tensor | None) -> bool:
    """Whether ``update_`` is for these: half precision, and a rest of the same type."""
    rest = weight_MN if rest_MN is None else rest_MN
    return (
        _is_good_at(weight_MN.dtype)
        and weight_MN.numel() > 0
        and rest.dtype == weight_MN.dtype
        and is_reachable(weight_MN, low_Mr, basis_Nr, rest)
    )


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
    """W = keep * W + scale * (X Q^T + factor * rest) in place: W read and written once, the rest read once.

    ``factor`` is a column (M x 1) or a single number (1 x 1), float32. The sum is rounded to W's type once.
    """
    from fullrank.ops.kernels import triton_source as source

    num_rows, num_columns = weight_MN.shape
    dtype = weight_MN.dtype
    low_Mr, basis_Nr = low_Mr.to(dtype).contiguous(), basis_Nr.to(dtype).contiguous()
    has_rest = rest_MN is not None and factor is not None
    rest = rest_MN if rest_MN is not None and has_rest else weight_MN
    factors = factor.contiguous() if factor is not None and has_rest else low_Mr
    block = 32 if is_interpreted() else 128
    with torch.cuda.device_of(weight_MN):
        source.update_kernel[(-(-num_rows // block), -(-num_columns // block))](
            weight_MN, low_Mr, basis_Nr, rest, factors, num_rows, num_columns, low_Mr.shape[1], *weight_MN.stride(),
            *rest.stride(), int(factors.shape[0] > 1), keep, scale, HAS_REST=has_rest,
            BLOCK_M=block, BLOCK_N=block, BLOCK_R=32, **_product_options(dtype), num_warps=8, num_stages=3,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight_MN)  # as any in-place function of torch does


def takes_direction(low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether ``direction_`` is for these: float32, of one layout without gaps."""
    tensors = low, exp_avg, exp_avg_sq
    fits = all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() for t in tensors)
    return fits and is_reachable(*tensors)


def direction_(exp_avg: Tensor, exp_avg_sq: Tensor, low: Tensor, *, betas: tuple[float, float], eps: float) -> Tensor:
    """``ops.adam.adam_direction_`` in one pass."""
    from fullrank.ops.kernels import triton_source as source

    direction = torch.empty_like(low)
    grid = (-(-low.numel() // ELEMENTS),)
    with torch.cuda.device_of(low):
        source.direction_kernel[grid](
            low, exp_avg, exp_avg_sq, direction, low.numel(), 1.0 - betas[0], betas[1], 1.0 - betas[1], eps,
            BLOCK=ELEMENTS, num_warps=4,
        )  # fmt: skip
    return direction


def takes_limit(norm: Tensor, previous: Tensor) -> bool:
    """Whether ``limit_growth_`` is for these: single numbers of float32."""
    return norm.dtype == torch.float32 == previous.dtype and is_reachable(norm, previous)


def limit_growth_(norm: Tensor, previous: Tensor, *, gamma: float, floor: float) -> Tensor:
    """``ops.lowrank.limit_growth_`` in one launch."""
    from fullrank.ops.kernels import triton_source as source

    factor = torch.empty_like(norm)
    with torch.cuda.device_of(norm):
        source.limit_kernel[(1,)](norm, previous, factor, gamma, floor, math.inf, num_warps=1)
    return factor


def _is_good_at(dtype: torch.dtype) -> bool:
    """Half precision; float32 where torch itself may take tensor cores for it: without them its library is faster."""
    return dtype in HALF or (dtype == torch.float32 and (torch.backends.cuda.matmul.allow_tf32 or is_interpreted()))


def _product_options(dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"DOT": tl.float32 if is_interpreted() else types[dtype], "PRECISION": "tf32" if allowed else "ieee"}


def _power_of_two(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())
