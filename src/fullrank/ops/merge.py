"""The product of two factors, and the numbers that factors start with.

Shape legend: W (M x N), B (M x r), A (r x N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product(b_Mr: Tensor, a_rN: Tensor, scale: float | Tensor) -> Tensor:
    """The product scale * B A in float32 at least (M x N)."""
    dtype = torch.promote_types(b_Mr.dtype, torch.float32)
    return (b_Mr.to(dtype) * scale) @ a_rN.to(dtype)


def kaiming_uniform_(matrix: Tensor, generator: torch.Generator) -> None:
    """Fill A (r x N) as LoRA starts: uniform within 1 / sqrt(N), which is kaiming_uniform with a = sqrt(5).

    Drawn on the CPU in float32, so every rank and every device gets the same numbers.
    """
    bound = 1.0 / math.sqrt(matrix[0].numel())
    matrix.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))
