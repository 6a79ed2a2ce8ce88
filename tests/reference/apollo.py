"""APOLLO (arXiv:2412.05270), plain: the raw gradient times a factor learnt in a random subspace.

Algorithm 1: R = P G with P random of variance 1 / rank, Adam's direction on R, one factor per channel
(APOLLO, equation 5) or per tensor (APOLLO-Mini) from the norms of the direction and of R, Fira's
limiter on the scaled gradient (equation 4), then alpha. ``alpha`` is the paper's multiplier, 1 for
APOLLO and sqrt(128) for APOLLO-Mini; the authors' package calls its square ``scale``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.reference.fira import limit
from tests.reference.galore import GaLore, Memory
from tests.reference.projection import Basis, channel_factors, matrix_factor


class Apollo(GaLore):
    """APOLLO on a list of tensors, which change in place; ``scaling`` is "channel" or "tensor"."""

    def __init__(
        self,
        weights: list[Tensor],
        *,
        scaling: str = "channel",
        gamma: float | None = 1.01,
        floor: float = 1e-3,
        **galore: Any,
    ) -> None:
        super().__init__(weights, **galore)
        self.scaling, self.gamma, self.floor = scaling, gamma, floor

    def update(self, grad: Tensor, memory: Memory, basis: Basis) -> Tensor:
        """alpha S G: what is subtracted from the weight, before the step size."""
        low = basis.down(grad)
        psi = self.direction(low, memory)
        if self.scaling == "tensor":
            factor = matrix_factor(psi, low)
        else:
            factor = channel_factors(psi, low, basis)
        return self.alpha * limit(factor * grad, memory, self.gamma, self.floor)
