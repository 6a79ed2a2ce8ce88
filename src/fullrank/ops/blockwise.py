"""Moments as 8-bit codes with one scale for each block, after 8-bit Adam (arXiv:2110.02861, sections 2 and 3).

A block's numbers, divided by its largest, become places in bitsandbytes' dynamic table, whose steps are fine near
zero; relative errors are about 1%. Where the paper encodes a second moment, its root is encoded here: it spans half
as many powers of ten, so that small entries beside large ones do not become zero, which Adam divides by, and what it
divides by is as exact as the first moment.

Blocks never straddle rows, so that rows may be cut apart and joined again. Shape legend: codes as the numbers,
R rows of C numbers; scales R x ceil(C / block). Of numbers taken as one vector ("flat"), scales have one dimension.
All zeros, codes and scales, stand for zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.errors import ConfigError

BLOCKS = (256, 128, 64)
"""Numbers in a block, the largest first: 256 as in the paper's code, less where that divides a row and 256 does not."""


def library_problems() -> list[str]:
    """One sentence if bitsandbytes cannot be imported, and how to get it."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or its libraries do not load
        return [
            f"8-bit moments need bitsandbytes, which cannot be imported ({error}). Install the extra, pip install "
            '"fullrank[quant]", or use state_dtype float32 or bfloat16.'
        ]
    return []


def block_of(columns: int) -> int:
    """Size of the blocks of rows of so many numbers: the one with the least padding, the largest of these."""
    return min(BLOCKS, key=lambda block: (-(-columns // block) * block, -block))


def scales_shape(shape: Sequence[int], *, flat: bool = False) -> tuple[int, ...]:
    """Shape of the scales of codes of this shape."""
    if flat:
        return (-(-math.prod(shape) // BLOCKS[0]),)
    columns = math.prod(shape[1:])
    return (shape[0], -(-columns // block_of(columns)))


def encode(values: Tensor, *, squared: bool, flat: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (uint8, same shape) and scales (float32) of numbers; of those of a second moment the roots are coded.

    A block with a number that is not finite decodes to NaN.
    """
    scales_like = scales_shape(values.shape, flat=flat)
    if not values.numel():
        return torch.empty_like(values, dtype=torch.uint8), values.new_zeros(scales_like, dtype=torch.float32)
    numbers = values.float()
    rows = (numbers.sqrt() if squared else numbers).reshape(1 if flat else len(values), -1)
    columns = rows.shape[1]
    block = BLOCKS[0] if flat else block_of(columns)
    padded = F.pad(rows, (0, -columns % block))
    codes, scales = _kernels().quantize_blockwise.default(padded, _table(squared, values.device), block)
    scales = scales.masked_fill(~padded.isfinite().view(-1, block).all(1), torch.nan)  # the kernels pass over it
    codes = codes.view(padded.shape)[:, :columns].reshape(values.shape).contiguous()
    return codes, scales.view(scales_like)


def decode(codes: Tensor, scales: Tensor, *, squared: bool) -> Tensor:
    """Float32 numbers from what ``encode`` returned."""
    flat = scales.ndim == 1
    if not codes.numel():
        return torch.empty_like(codes, dtype=torch.float32)
    rows = codes.reshape(1 if flat else len(codes), -1)
    columns = rows.shape[1]
    block = BLOCKS[0] if flat else block_of(columns)
    padded = F.pad(rows, (0, -columns % block))
    table = _table(squared, codes.device)
    values: Tensor = _kernels().dequantize_blockwise.default(padded, scales.reshape(-1), table, block, torch.float32)
    values = values.view(padded.shape)[:, :columns].reshape(codes.shape).contiguous()
    return values.square_() if squared else values


def zero_code(*, squared: bool) -> int:
    """The code that stands for zero in any block."""
    return int(_table(squared, torch.device("cpu")).abs().argmin())


def _kernels() -> Any:
    """The operators of bitsandbytes.

    Raises:
        ConfigError: Where they cannot be had.
    """
    if problems := library_problems():
        raise ConfigError(problems[0])
    return torch.ops.bitsandbytes


@functools.cache
def _table(squared: bool, device: torch.device) -> Tensor:
    """The dynamic table of bitsandbytes, of the values that codes stand for (256): unsigned for second moments."""
    from bitsandbytes.functional import create_dynamic_map

    # In a thread of its own: a mode of this one, such as a planner's tensors without content, would stay in the cache.
    with ThreadPoolExecutor(1) as pool:
        table: Tensor = pool.submit(lambda: create_dynamic_map(signed=not squared).to(device)).result()
    return table
