"""ReLoRA (arXiv:2307.05695), plain: the jagged schedule, and one linear layer trained through its factors.

Section 3 of the paper and the authors' ``cosine_restarts``. The layer is W + c B A with Adam (arXiv:1412.6980,
Algorithm 1) on A, B and, if it is trained, s in c = tanh(s). Gradients are written out: with G the gradient of
the effective weight, that of B is c G A^T, that of A is c B^T G, that of s is (1 - c^2) <G, B A>. Which A a restart
begins with is the caller's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cosine_restarts(
    step: int, *, first_warmup: int, restart_warmup: int, cycle: int, total: int, min_ratio: float, adjust: int = 0
) -> float:
    """The multiplier of the learning rate for the update after ``step`` updates."""

    def decayed(at: int) -> float:
        return min_ratio + (1 - min_ratio) * 0.5 * (
            1 + math.cos(math.pi * (at - first_warmup) / (total - first_warmup))
        )

    if step < first_warmup:
        return step / first_warmup
    ahead = step + adjust
    if ahead % cycle < restart_warmup and step >= cycle:
        return (ahead % cycle) / restart_warmup * decayed(ahead // cycle * cycle + restart_warmup)
    return decayed(ahead)


class ReLoRA:
    """One weight with its factors, in float64.

    Args:
        weight: W (m x n).
        a: A (r x n).
        scale: c; None: tanh of a trained number that starts at 1.
        betas: Adam's.
        eps: Adam's, beside the corrected root.
        weight_decay: Decoupled, of all that trains.
    """

    def __init__(
        self,
        weight: Tensor,
        a: Tensor,
        *,
        scale: float | None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight = weight.double().clone()
        self.scale = scale
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.trained = {"a": a.double().clone(), "b": torch.zeros(weight.shape[0], a.shape[0], dtype=torch.float64)}
        if scale is None:
            self.trained["s"] = torch.ones((), dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        """Moments and number of steps as before the first update."""
        self.m = {key: torch.zeros_like(value) for key, value in self.trained.items()}
        self.v = {key: torch.zeros_like(value) for key, value in self.trained.items()}
        self.num_steps = 0

    def factor(self) -> float:
        """The scale c in use."""
        return math.tanh(float(self.trained["s"])) if self.scale is None else self.scale

    def effective(self) -> Tensor:
        """W + c B A."""
        return self.weight + self.factor() * self.trained["b"] @ self.trained["a"]

    def update(self, gradient_at: Callable[[Tensor], Tensor], lr: float) -> None:
        """One step of Adam; ``gradient_at`` gives the gradient of an effective weight."""
        a, b, c = self.trained["a"], self.trained["b"], self.factor()
        full = gradient_at(self.effective())
        gradients = {"a": c * b.T @ full, "b": c * full @ a.T, "s": (1 - c * c) * (full * (b @ a)).sum()}
        self.num_steps += 1
        for key, value in self.trained.items():
            self.m[key] = self.betas[0] * self.m[key] + (1 - self.betas[0]) * gradients[key]
            self.v[key] = self.betas[1] * self.v[key] + (1 - self.betas[1]) * gradients[key] ** 2
            m_hat = self.m[key] / (1 - self.betas[0] ** self.num_steps)
            v_hat = self.v[key] / (1 - self.betas[1] ** self.num_steps)
            self.trained[key] = value - lr * self.weight_decay * value - lr * m_hat / (v_hat.sqrt() + self.eps)

    def restart(self, a: Tensor, kept: Callable[[str, Tensor], Tensor] | None = None) -> None:
        """Merge, begin with this A and B = 0.

        Args:
            a: The new A.
            kept: From what is trained and its first moment, a mask of the moments' entries that stay; the number of
                steps then stays too. None: all start again.
        """
        self.weight = self.effective()
        self.trained["a"], self.trained["b"] = a.double().clone(), torch.zeros_like(self.trained["b"])
        if self.scale is None:
            self.trained["s"] = torch.ones((), dtype=torch.float64)
        if kept is None:
            self.reset()
            return
        for key in self.trained:
            mask = kept(key, self.m[key])
            self.m[key] = torch.where(mask, self.m[key], 0.0)
            self.v[key] = torch.where(mask, self.v[key], 0.0)


def largest(values: Tensor, num_dropped: int) -> Tensor:
    """A mask of all entries but this many with the smallest absolute value."""
    sizes = values.abs().flatten().tolist()
    mask = torch.ones(len(sizes), dtype=torch.bool)
    mask[sorted(range(len(sizes)), key=lambda entry: sizes[entry])[:num_dropped]] = False
    return mask.view(values.shape)
