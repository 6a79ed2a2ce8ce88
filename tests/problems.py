"""Small deterministic problems: weights of every shape and gradient sequences with a decaying spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (24, 10),
    "wide": (10, 24),
    "square": (14, 14),
    "conv": (8, 3, 2, 2),
    "vector": (9,),
}
"""One shape a kind; ``conv`` is projected as 8 x 12, ``vector`` never."""

MATRICES = ("tall", "wide", "square")
RANK = 3
DECAY = 0.6
"""Ratio of a gradient's successive singular values: far apart, so that rounding does not turn them."""


def make_weight(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight with entries of size 0.1."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_gradients(
    shape: tuple[int, ...], count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """``count`` gradients: a constant part with singular values DECAY^k, turned a little at each step."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = shape[0]
    columns = max(1, torch.Size(shape[1:]).numel())
    short = min(rows, columns)
    spectrum = torch.diag(DECAY ** torch.arange(short, dtype=torch.float64))
    left, right = noise(rows, short), noise(short, columns)
    gradients = []
    for _ in range(count):
        turned_left, turned_right = left + 0.2 * noise(rows, short), right + 0.2 * noise(short, columns)
        gradients.append((0.05 * turned_left @ spectrum @ turned_right).reshape(shape).to(dtype))
    return gradients


def with_spikes(gradients: list[Tensor], every: int = 5, factor: float = 20.0) -> list[Tensor]:
    """The sequence with each ``every``-th gradient multiplied, so that a growth limiter has work."""
    return [factor * g if i % every == every - 1 else g for i, g in enumerate(gradients)]


def relative_error(found: Tensor, wanted: Tensor, start: Tensor | None = None) -> float:
    """|found - wanted| over |wanted - start|: for weights, an error relative to what training changed."""
    found, wanted = found.detach().double(), wanted.detach().double()
    moved = wanted if start is None else wanted - start.detach().double()
    return ((found - wanted).norm() / moved.norm().clamp(min=1e-300)).item()
