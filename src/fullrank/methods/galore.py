"""GaLore: Adam in a low-rank subspace of the gradient (arXiv:2403.03507).

The gradient G of a weight is projected on its leading singular directions, R = G Q; the moments live
there, and the direction is lifted back: W -= lr * alpha * N Q^T. What lies outside the subspace is
dropped until the next refresh of Q.

Memory for an m x n matrix, m >= n: 2 m r + n r numbers of state (AdamW: 2 m n).

Departures from the authors' package: the state is tensors only, it owns its memory and loads with
``weights_only=True``; ``proj_type="full"`` works; convolutions are projected as matrices; a group
without a rank warns. The default ``basis="power"`` finds the subspace by block power iteration, at a
fraction of the SVD's time; with ``basis="svd"`` the trajectory is the authors'. ``rotate_moments``
carries the moments into a new basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from fullrank.ops import lowrank
from fullrank.projected import MatrixStep, ProjectedAdamW, ProjectedRMSprop, SummedOptimizer
from fullrank.sharding import Routine


class _GaLore(SummedOptimizer):
    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> Routine:
        """Lift the direction and add it: Algorithm 2 of the paper."""
        direction = yield from matrix.all_rows(matrix.direction)
        lowrank.add_lifted_(
            matrix.weight,
            direction,
            matrix.basis,
            matrix.basis_left,
            scale=-matrix.step_size * group["alpha"] * matrix.keep,
            keep=matrix.keep,
        )


class GaLoreAdamW(_GaLore, ProjectedAdamW):
    """AdamW with the matrices of groups with a ``rank`` in a low-rank subspace.

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
        alpha: Scale of the lifted direction (``scale`` in the authors' package, accepted in a group).
        proj_type: Projected side: std (the short one), reverse_std, left, right, or full (both).
        basis: svd (exact), power (warm-started block power iteration) or random (orthonormal).
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
        basis: str = "power",
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
                "rotate_moments": rotate_moments,
                "stagger_refresh": stagger_refresh,
                "state_dtype": state_dtype,
                "plain_state_dtype": plain_state_dtype,
                "weight_rounding": weight_rounding,
                "seed": seed,
            },
            partition_states=partition_states,
        )


class GaLoreRMSprop(_GaLore, ProjectedRMSprop):
    """RMSprop in the subspace: one low-rank moment instead of two.

    ``beta`` decays the second moment; every other option is that of ``GaLoreAdamW``. The authors'
    package has no such class; the paper (section 4.2) allows any element-wise optimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        basis: str = "power",
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
                "beta": beta,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "alpha": alpha,
                "proj_type": proj_type,
                "basis": basis,
                "rotate_moments": rotate_moments,
                "stagger_refresh": stagger_refresh,
                "state_dtype": state_dtype,
                "plain_state_dtype": plain_state_dtype,
                "weight_rounding": weight_rounding,
                "seed": seed,
            },
            partition_states=partition_states,
        )


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(ProjectionConfig):
    """Options of GaLore."""

    lr: float = 5e-3
    """Peak learning rate."""


def build(model: nn.Module, config: GaLoreConfig) -> Built:
    """GaLoreAdamW on the model's groups."""
    return Built(_optimizer(model, config))


def state_bytes(model: nn.Module, config: GaLoreConfig) -> int:
    """Bytes of state of GaLoreAdamW on this model."""
    return _optimizer(model, config).planned_state_bytes()


def _optimizer(model: nn.Module, config: GaLoreConfig) -> GaLoreAdamW:
    return GaLoreAdamW(projected_groups(model, config), **projection_options(config))


METHOD = Method("galore", "2403.03507", GaLoreConfig, build, state_bytes, factor_request)
