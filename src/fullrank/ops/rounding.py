"""Rounding at random into a shorter type, so that what is too small for it arrives on average.

In bfloat16 a weight near 0.02 moves in steps of 1e-4: rounded to nearest, most entries of a smaller update vanish.
Rounded at random, up or down with the probability that keeps the mean (https://arxiv.org/abs/1502.02551), they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that the type does not have."""


def round_stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Values in a shorter type, each rounded up or down at random so that its mean is the value.

    A type that is not shorter takes them as they are. float16 below its normal range is rounded to
    nearest in its last bits. What nearest would round to the largest number of the type does not go beyond it.
    """
    if dtype not in DROPPED_BITS:
        return values.to(dtype)
    bits, values = DROPPED_BITS[dtype], values.to(torch.float32)
    noise = torch.randint(0, 1 << bits, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    noise.add_(values.view(torch.int32)).bitwise_right_shift_(bits).bitwise_left_shift_(bits)
    nearest, largest = values.to(dtype), torch.finfo(dtype).max
    rounded = noise.view(torch.float32).clamp_(-largest, largest).to(dtype)
    return torch.where(nearest.isfinite(), rounded, nearest)
