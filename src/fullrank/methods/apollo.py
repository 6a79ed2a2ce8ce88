"""APOLLO: the raw gradient, scaled by what Adam does to a random projection of it (arXiv:2412.05270).

R = G P with a random P; Adam's direction N of R gives one factor per channel, s_i = |N_i| / |R_i|
(or one for the tensor: APOLLO-Mini), and W -= lr * sqrt(alpha) * s * G. No SVD, and the rank may be
small, because only norms are read off the subspace.

Memory for an m x n matrix, m >= n: 2 m r + n r + 1 numbers of state; Mini has r = 1.

Departures from the authors' package: state of tensors only; P is stored, not redrawn each step; its
seed is a function of position and step, so ranks and resumed runs agree; the limiter has a floor.
Kept: alpha (their ``scale``) enters as its square root, and the limiter is that of Fira.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.methods.base import (
    Built,
    Method,
    ProjectionConfig,
    factor_request,
    projected_groups,
    projection_options,
)
from fullrank.ops import lowrank, subspace
from fullrank.projected import MatrixStep, ProjectedAdamW
from fullrank.sharding import Routine


class ApolloAdamW(ProjectedAdamW):
    """AdamW with APOLLO on the matrices of groups with a ``rank``.

    Args:
        params: Parameters, or groups such as ``divide_params`` makes; a group may override any option.
        lr: Learning rate of projected and plain parameters alike.
        betas: Decay of the two moments.
        eps: Added to the root of the (uncorrected) second moment.
        weight_decay: Decoupled decay, applied after the update to every parameter of the group.
        correct_bias: Adam's bias correction.
        no_deprecation_warning: Accepted so that the authors' calls run; nothing is deprecated here.
        rank: Rank of the subspace, 1 to the short side of a matrix; None leaves a group plain.
        update_proj_gap: Optimizer steps between two refreshes of the basis.
        alpha: The update is multiplied by its square root, as in the authors' package (``scale``).
        proj_type: Projected side: std (the short one), reverse_std, left, right, or full (both).
        basis: random (Gaussian of variance 1 / rank, the paper's), svd, or power.
        scaling: One factor per "channel", or one per "tensor" (APOLLO-Mini, with rank 1 and a large alpha).
        limiter_gamma: Largest growth of the update's norm per step (Fira's limiter), at least 1; None: off.
        limiter_floor: Root mean square below which a previous norm does not limit.
        rotate_moments: Carry the moments into the new basis at a refresh.
        stagger_refresh: Spread the refreshes of the matrices over the gap, so that no step stands out.
        state_dtype: dtype of the low-rank moments ("float32", "bfloat16", or "8bit": codes with scales, but
            float32 at rank 1); None: the weight's.
        plain_state_dtype: The same of all other parameters; None: their own, as in torch.optim.AdamW, or "8bit"
            where ``state_dtype`` is.
        weight_rounding: How a stepped bfloat16 or float16 weight is rounded: to the "nearest", or "stochastic", at
            random around the float32 result, so that steps too small for the type arrive on average.
        seed: Seed of random directions; use the same on every rank.
        partition_states: Under DDP over all processes, let each keep, refresh and step its share of the parameters.

    Raises:
        ConfigError: An option out of bounds, or a rank above the short side of a matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        basis: str = "random",
        scaling: str = "channel",
        limiter_gamma: float | None = 1.01,
        limiter_floor: float = 1e-3,
        rotate_moments: bool = False,
        stagger_refresh: bool = False,
        state_dtype: str | torch.dtype | None = "float32",
        plain_state_dtype: str | torch.dtype | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        partition_states: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "correct_bias": correct_bias,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "alpha": alpha,
                "proj_type": proj_type,
                "basis": basis,
                "scaling": scaling,
                "limiter_gamma": limiter_gamma,
                "limiter_floor": limiter_floor,
                "rotate_moments": rotate_moments,
                "stagger_refresh": stagger_refresh,
                "state_dtype": state_dtype,
                "plain_state_dtype": plain_state_dtype,
                "weight_rounding": weight_rounding,
                "seed": seed,
            },
            partition_states=partition_states,
        )

    reads_row_norms = True

    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> Routine:
        """Scale the raw gradient: Algorithm 1 of the paper."""
        whole = group["scaling"] == "tensor" or matrix.basis_left is not None
        low_norms, direction_norms = yield from matrix.low_norms(whole=whole)
        factor = direction_norms / (low_norms + 1e-8)
        if group["limiter_gamma"] is not None:
            grad_norms_sq = yield from matrix.norms_sq(matrix.grad, whole=whole)
            norm_sq = grad_norms_sq.mul_(factor).mul_(factor).sum()
            norm_sq = norm_sq if whole else (yield from matrix.cut.total(norm_sq))
            factor = factor * self.limit_growth_(norm_sq.sqrt_(), matrix, state, group)
        factor = factor if whole else (yield from matrix.all_rows(factor))
        if matrix.keep != 1.0:
            matrix.weight.mul_(matrix.keep)
        step = matrix.step_size * matrix.keep * math.sqrt(group["alpha"])
        lowrank.add_scaled_(matrix.weight, matrix.grad, factor, scale=-step)

    def random_basis(self, size: int, rank: int, *, seed: int, like: Tensor) -> Tensor:
        """A Gaussian projection that keeps squared norms on average."""
        drawn = subspace.gaussian(size, rank, seed=seed, device=like.device, dtype=like.dtype)
        return drawn / math.sqrt(rank)

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a projected group, one sentence each."""
        problems = super().option_problems(group)
        if group["scaling"] not in ("channel", "tensor"):
            problems.append(f"scaling must be channel or tensor, got {group['scaling']!r}.")
        if group["rotate_moments"] and group["basis"] == "random":
            problems.append(
                "rotate_moments needs an orthonormal basis, and basis random is a Gaussian projection here. "
                "Set basis to svd or power, or rotate_moments to False."
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(ProjectionConfig):
    """Options of APOLLO; Mini is scaling: tensor, rank: 1, alpha: 128."""

    lr: float = 3e-3
    """Peak learning rate."""
    alpha: float = 1.0
    """The update is multiplied by the square root of alpha (``scale`` in the authors' package)."""
    basis: Literal["svd", "power", "random"] = "random"
    """Projection: Gaussian at random (the paper's), exact SVD, or block power iteration."""
    scaling: Literal["channel", "tensor"] = "channel"
    """One factor per channel, or one for the whole matrix (Mini)."""
    limiter_gamma: float | None = 1.01
    """Largest growth of the update's norm per optimizer step; null: no limit."""
    limiter_floor: float = 1e-3
    """Root mean square of the update below which it may grow freely."""


def build(model: nn.Module, config: ApolloConfig) -> Built:
    """ApolloAdamW on the model's groups."""
    return Built(_optimizer(model, config))


def state_bytes(model: nn.Module, config: ApolloConfig) -> int:
    """Bytes of state of ApolloAdamW on this model."""
    return _optimizer(model, config).planned_state_bytes()


def _optimizer(model: nn.Module, config: ApolloConfig) -> ApolloAdamW:
    return ApolloAdamW(
        projected_groups(model, config),
        **projection_options(config),
        scaling=config.scaling,
        limiter_gamma=config.limiter_gamma,
        limiter_floor=config.limiter_floor,
    )


METHOD = Method("apollo", "2412.05270", ApolloConfig, build, state_bytes, factor_request)
