"""Fira (arXiv:2410.01623), plain: GaLore's update plus the scaled rest of the gradient.

Section 4.1 (norm-based scaling, equations 10 and 11), section 4.2 (norm-growth limiter) and Algorithm 1
in appendix A.1. ``alpha_on`` chooses between the algorithm's alpha (on the whole update) and the
authors' code (on what comes back from the subspace: the low-rank update and the part taken out of the
gradient). As in the code, the limiter sees the residual before Adam's bias corrections, which the paper
has inside the scaling factors and so inside the limited norm.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tests.reference.galore import GaLore, Memory
from tests.reference.projection import Basis, channel_factors, matrix_factor


class Fira(GaLore):
    """Fira on a list of tensors, which change in place.

    ``scaling`` is "column" (equation 11, Fira) or "matrix" (equation 10, the paper's Fira-matrix).
    ``gamma`` None turns the limiter off. ``floor`` is the norm per root element under which a
    remembered residual is too small to be a reference and the next one passes unchanged; the first
    update always passes, and 0 is the authors' code.
    """

    def __init__(
        self,
        weights: list[Tensor],
        *,
        alpha_on: str = "subspace",
        scaling: str = "column",
        gamma: float | None = 1.01,
        floor: float = 1e-3,
        **galore: Any,
    ) -> None:
        super().__init__(weights, **galore)
        self.alpha_on, self.scaling, self.gamma, self.floor = alpha_on, scaling, gamma, floor

    def update(self, grad: Tensor, memory: Memory, basis: Basis) -> Tensor:
        """alpha P psi + S (code) or alpha (P psi + S) (paper), with S the limited scaled residual."""
        low = basis.down(grad)
        psi = self.direction(low, memory)
        inside = basis.up(low)
        if self.alpha_on == "subspace":
            inside = self.alpha * inside
        residual = grad - inside
        if self.scaling == "matrix":
            factor = matrix_factor(psi, low)
        else:
            factor = channel_factors(psi, low, basis)
        scaled = limit(factor * residual, memory, self.gamma, self.floor)
        lifted = self.alpha * basis.up(psi)
        return lifted + (scaled if self.alpha_on == "subspace" else self.alpha * scaled)


def limit(scaled: Tensor, memory: Memory, gamma: float | None, floor: float) -> Tensor:
    """Shrink ``scaled`` so that its norm is at most gamma times the remembered one; remember the result.

    Fira, section 4.2 and Algorithm 1. The 1e-8 beside the remembered norm is the authors' code's.
    """
    norm = scaled.norm()
    previous = memory.residual_norm
    if gamma is not None and previous > floor * math.sqrt(scaled.numel()):
        growth = norm / (previous + 1e-8)
        if growth > gamma:
            scaled = scaled * (gamma / growth)
    memory.residual_norm = scaled.norm()
    return scaled
