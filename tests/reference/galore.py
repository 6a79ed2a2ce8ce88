"""GaLore (arXiv:2403.03507), plain: Adam or RMSprop in a subspace of the gradient.

Algorithm 2 of the paper with its scale alpha, as the authors' code reads it: the subspace is
refreshed at updates 0, gap, 2 gap, ..., the moments keep their old coordinates then, and decay is
decoupled, after the update.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.adam import Betas, adam_direction, rmsprop_direction, step_size
from tests.reference.projection import Basis, rotate, svd_basis


@dataclass
class Memory:
    """What one weight remembers between updates."""

    basis: Basis | None = None
    m: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))
    residual_norm: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))


class GaLore:
    """GaLore on a list of tensors, which change in place.

    Weights of more than two dimensions are projected as (first dimension x the rest); vectors get the
    plain inner optimizer. ``inner`` is "adamw" or "rmsprop" (betas[1] is its beta; it has no bias
    correction).
    """

    def __init__(
        self,
        weights: list[Tensor],
        *,
        rank: int,
        gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        rotate_moments: bool = False,
        inner: str = "adamw",
    ) -> None:
        self.weights = weights
        self.rank, self.gap, self.alpha, self.proj_type = rank, gap, alpha, proj_type
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.correct_bias = weight_decay, correct_bias
        self.rotate_moments, self.inner = rotate_moments, inner
        self.num_steps = 0
        self.memory = [Memory() for _ in weights]

    def step(self, grads: list[Tensor], bases: list[Basis | None] | None = None) -> None:
        """One update of every weight; ``bases`` are the bases in force in this very update."""
        given = bases or [None] * len(grads)
        refresh = self.num_steps % self.gap == 0
        self.num_steps += 1
        size = self.lr
        if self.inner == "adamw":
            size = step_size(self.lr, self.betas, self.num_steps, self.correct_bias)
        for weight, grad, memory, basis in zip(self.weights, grads, self.memory, given, strict=True):
            if grad.dim() < 2:
                update = self.direction(grad, memory)
            else:
                matrix = grad.reshape(grad.shape[0], -1)
                basis = self.basis_of(matrix, memory, basis, refresh)
                update = self.update(matrix, memory, basis).reshape(grad.shape)
            weight -= size * update
            weight -= self.lr * self.weight_decay * weight

    def basis_of(self, grad: Tensor, memory: Memory, given: Basis | None, refresh: bool) -> Basis:
        """The given basis, or the last one, or a new one of this gradient; turns the moments if asked to."""
        old = memory.basis
        new = given if given is not None else old
        if new is None or (given is None and refresh):
            new = svd_basis(grad, self.rank, self.proj_type)
        if self.rotate_moments and old is not None and not old.same_as(new):
            memory.m, memory.v = rotate(memory.m, memory.v, old, new)
        memory.basis = new
        return new

    def direction(self, low: Tensor, memory: Memory) -> Tensor:
        """The inner optimizer's direction psi for the (low-rank) gradient; updates the moments."""
        if memory.m.shape != low.shape:
            memory.m, memory.v = torch.zeros_like(low), torch.zeros_like(low)
        if self.inner == "rmsprop":
            memory.v, psi = rmsprop_direction(memory.v, low, self.betas[1], self.eps)
            return psi
        memory.m, memory.v, psi = adam_direction(memory.m, memory.v, low, self.betas, self.eps)
        return psi

    def update(self, grad: Tensor, memory: Memory, basis: Basis) -> Tensor:
        """alpha P psi(P^T G): what is subtracted from the weight, before the step size."""
        low = basis.down(grad)
        return self.alpha * basis.up(self.direction(low, memory))
