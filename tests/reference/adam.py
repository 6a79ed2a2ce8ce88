"""AdamW and RMSprop, plain, as the projected methods' published code applies them.

Adam: Kingma and Ba, arXiv:1412.6980, Algorithm 1 in the reordered form of the end of section 2: the
second moment is not corrected inside the root, both corrections sit in the step size, and epsilon is
added to the uncorrected root ("epsilon hat"). Decay: Loshchilov and Hutter, arXiv:1711.05101,
decoupled and applied after the update. RMSprop: Hinton's lecture 6e, epsilon outside the root.
"""

from __future__ import annotations

import math

from torch import Tensor, zeros_like

Betas = tuple[float, float]


def adam_direction(m: Tensor, v: Tensor, grad: Tensor, betas: Betas, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """One moment update; returns the new m, the new v and psi = m / (sqrt(v) + eps)."""
    new_m = betas[0] * m + (1.0 - betas[0]) * grad
    new_v = betas[1] * v + (1.0 - betas[1]) * grad * grad
    return new_m, new_v, new_m / (new_v.sqrt() + eps)


def rmsprop_direction(v: Tensor, grad: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    """One second-moment update; returns the new v and g / (sqrt(v) + eps)."""
    new_v = beta * v + (1.0 - beta) * grad * grad
    return new_v, grad / (new_v.sqrt() + eps)


def step_size(lr: float, betas: Betas, step: int, correct_bias: bool) -> float:
    """The learning rate of update number ``step`` (1, 2, ...) with Adam's two corrections in it."""
    if not correct_bias:
        return lr
    return lr * math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)


class AdamW:
    """Plain AdamW on a list of tensors, which change in place."""

    def __init__(
        self,
        weights: list[Tensor],
        *,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        self.weights = weights
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.correct_bias = weight_decay, correct_bias
        self.num_steps = 0
        self.m = [zeros_like(w) for w in weights]
        self.v = [zeros_like(w) for w in weights]

    def step(self, grads: list[Tensor]) -> None:
        """One update of every weight with its gradient."""
        self.num_steps += 1
        size = step_size(self.lr, self.betas, self.num_steps, self.correct_bias)
        for i, (weight, grad) in enumerate(zip(self.weights, grads, strict=True)):
            self.m[i], self.v[i], psi = adam_direction(self.m[i], self.v[i], grad, self.betas, self.eps)
            weight -= size * psi
            weight -= self.lr * self.weight_decay * weight


class RMSprop:
    """Plain RMSprop without momentum on a list of tensors, which change in place."""

    def __init__(self, weights: list[Tensor], *, lr: float = 1e-3, beta: float = 0.9, eps: float = 1e-6) -> None:
        self.weights = weights
        self.lr, self.beta, self.eps = lr, beta, eps
        self.v = [zeros_like(w) for w in weights]

    def step(self, grads: list[Tensor]) -> None:
        """One update of every weight with its gradient."""
        for i, (weight, grad) in enumerate(zip(self.weights, grads, strict=True)):
            self.v[i], psi = rmsprop_direction(self.v[i], grad, self.beta, self.eps)
            weight -= self.lr * psi
