"""What runs inside the subspace, and on plain parameters: Adam, or RMSprop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fullrank.ops import adam
from fullrank.projected.training import ProjectedOptimizer


class ProjectedAdamW(ProjectedOptimizer):
    """Adam's moments in the subspace, AdamW outside."""

    moments = ("exp_avg", "exp_avg_sq")

    def direction_(self, low: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Adam's direction of R, moments updated in place."""
        moments = state["exp_avg"], state["exp_avg_sq"]
        return adam.adam_direction_(*moments, low, betas=group["betas"], eps=group["eps"])

    def step_size(self, group: dict[str, Any], step: int) -> float:
        """The learning rate with Adam's bias corrections, unless ``correct_bias`` is off."""
        return adam.adam_step_size(float(group["lr"]), group["betas"], step, correct_bias=group["correct_bias"])

    def plain_(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        step: int,
    ) -> None:
        """AdamW with the authors' place of epsilon and of weight decay."""
        adam.adamw_(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            correct_bias=group["correct_bias"],
        )


class ProjectedRMSprop(ProjectedOptimizer):
    """RMSprop's second moment in the subspace, RMSprop outside; no momentum and no bias correction."""

    moments = ("square_avg",)

    def direction_(self, low: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """RMSprop's direction of R, the moment updated in place."""
        return adam.rmsprop_direction_(state["square_avg"], low, beta=group["beta"], eps=group["eps"])

    def step_size(self, group: dict[str, Any], step: int) -> float:
        """The learning rate."""
        return float(group["lr"])

    def plain_(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        step: int,
    ) -> None:
        """RMSprop with decoupled weight decay."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            square_avg = state["square_avg"]
            grad = grad.to(square_avg.dtype)
            direction = adam.rmsprop_direction_(square_avg, grad, beta=group["beta"], eps=group["eps"])
            weight.add_(direction.to(weight.dtype), alpha=-float(group["lr"]))
        adam.decay_(weights, lr=float(group["lr"]), weight_decay=group["weight_decay"])
