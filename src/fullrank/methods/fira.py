"""Fira: full-rank training under a low-rank constraint (arXiv:2410.01623).

Adam runs in a low-rank subspace of the gradient as in GaLore, and the rest of the gradient is kept:
its rows are scaled by what Adam did to the rows of the projected gradient, s_i = |N_i| / |R_i|
(norm-based scaling, section 4.1), and a limiter lets the norm of that scaled residual grow by at
most 1% a step (norm-growth limiter, section 4.2). Every weight moves in every direction.

Memory for an m x n matrix, m >= n: 2 m r + n r + 1 numbers of state (AdamW: 2 m n).

Where the authors' code and their Algorithm 1 differ, the code is the default, because the published
recipes ran it: alpha multiplies the low-rank term and the part that is subtracted, but not the
residual as a whole (``alpha_on="update"`` is the paper's form). In both forms the limiter sees the
direction before Adam's bias correction, as in the code; Algorithm 1 puts the correction inside N.

Departures from the authors' code: the default ``basis="power"`` finds the subspace by block power
iteration, at a fraction of the SVD's time (``basis="svd"`` follows their trajectory); the residual is
never formed (``ops.lowrank``), so there is no full-size temporary; nothing waits for the device; the
limiter has a floor, without which one zero gradient stops a matrix for thousands of steps; the state
is tensors only; ``proj_type="full"`` works, with one factor for the matrix; a group without a rank warns.
"""

from __future__ import annotations

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
from fullrank.ops import lowrank
from fullrank.projected import MatrixStep, ProjectedAdamW, ProjectedOptimizer, ProjectedRMSprop
from fullrank.sharding import Routine


class _Fira(ProjectedOptimizer):
    reads_row_norms = True

    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> Routine:
        """Norm-based scaling, limiter and update, in the order of Algorithm 1."""
        whole = group["scaling"] == "matrix" or matrix.basis_left is not None
        on_update = group["alpha_on"] == "update"
        kept = 1.0 if on_update else group["alpha"]  # E = G - kept * R Q^T
        outside = group["alpha"] if on_update else 1.0  # what alpha makes of the residual's step

        # Norm-based scaling: s = |N| / |R|, and the squared norms of the residual E.
        low_norms, direction_norms = yield from matrix.low_norms(whole=whole)
        factor = direction_norms / (low_norms + 1e-8)
        residual = None
        if lowrank.uses_direct_residual(matrix.cut.num_columns, matrix.basis.shape[1]):
            low = yield from matrix.all_rows(matrix.low)
            residual = matrix.grad - kept * lowrank.lift(low, matrix.basis, matrix.basis_left)
            residual_sq = yield from matrix.norms_sq(residual, whole=whole)
        else:
            grad_norms_sq = yield from matrix.norms_sq(matrix.grad, whole=whole)
            residual_sq = lowrank.residual_norms_sq(grad_norms_sq, low_norms, kept=kept)

        # Norm-growth limiter: the norm of S = s * E may grow by at most gamma per step.
        if group["limiter_gamma"] is not None:
            norm_sq = residual_sq.mul_(factor).mul_(factor).sum()
            norm_sq = norm_sq if whole else (yield from matrix.cut.total(norm_sq))
            factor = factor * self.limit_growth_(norm_sq.sqrt_(), matrix, state, group)

        # W -= step * (alpha N Q^T + outside * S)
        scale = -matrix.step_size * matrix.keep
        low = matrix.direction if group["alpha"] == 1.0 else group["alpha"] * matrix.direction
        if residual is None:
            low.addcmul_(factor, matrix.low, value=-kept * outside)
            residual = matrix.grad
        low = yield from matrix.all_rows(low)
        factor = factor if whole else (yield from matrix.all_rows(factor))
        if outside != 1.0:
            factor = factor * outside
        lowrank.add_lifted_(
            matrix.weight,
            low,
            matrix.basis,
            matrix.basis_left,
            scale=scale,
            keep=matrix.keep,
            rest_MN=residual,
            factor=factor,
        )

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a projected group, one sentence each."""
        problems = super().option_problems(group)
        if group["alpha_on"] not in ("subspace", "update"):
            problems.append(f"alpha_on must be subspace or update, got {group['alpha_on']!r}.")
        if group["scaling"] not in ("column", "matrix"):
            problems.append(f"scaling must be column or matrix, got {group['scaling']!r}.")
        return problems


class FiraAdamW(_Fira, ProjectedAdamW):
    """AdamW with Fira on the matrices of groups with a ``rank``.

    Examples:
        >>> groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=8)
        >>> optimizer = FiraAdamW(groups, lr=1e-3)

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
        alpha: Scale of the low-rank part (see ``alpha_on``); a group may call it ``scale``.
        proj_type: Projected side: std (the short one), reverse_std, left, right, or full (both).
        basis: svd (exact), power (warm-started block power iteration) or random (orthonormal).
        alpha_on: What alpha multiplies: "subspace" (the authors' code) or "update" (Algorithm 1 of the paper).
        scaling: Factor of the residual per "column" (the paper's default) or per "matrix" (its ablation).
        limiter_gamma: Largest growth of the scaled residual's norm per step, at least 1; None: no limiter.
        limiter_floor: Root mean square below which a previous norm does not limit; 0 as in the authors' code.
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
        alpha_on: str = "subspace",
        scaling: str = "column",
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
                "alpha_on": alpha_on,
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


class FiraRMSprop(_Fira, ProjectedRMSprop):
    """RMSprop with Fira on the matrices of groups with a ``rank``; one low-rank moment instead of two.

    ``beta`` decays the second moment; every other option is that of ``FiraAdamW``. The authors'
    version accepts a weight decay and ignores it; here it is applied.
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
        alpha_on: str = "subspace",
        scaling: str = "column",
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
                "beta": beta,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "alpha": alpha,
                "proj_type": proj_type,
                "basis": basis,
                "alpha_on": alpha_on,
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


@dataclass(frozen=True, kw_only=True)
class FiraConfig(ProjectionConfig):
    """Options of Fira.

    ``lr``, ``alpha_on`` and ``basis`` default to the best of benchmarks/convergence.py, rank, alpha and gap to the
    authors' 60M script.
    """

    lr: float = 5e-3
    """Peak learning rate."""
    alpha_on: Literal["subspace", "update"] = "update"
    """What alpha multiplies: the subspace (the authors' code) or the whole update (Algorithm 1)."""
    scaling: Literal["column", "matrix"] = "column"
    """One factor of the residual per column (section 4.1) or per matrix (ablation)."""
    limiter_gamma: float | None = 1.01
    """Largest growth of the scaled residual's norm per optimizer step (gamma, section 4.2); null: no limit."""
    limiter_floor: float = 1e-3
    """Root mean square of the scaled residual below which it may grow freely."""


def build(model: nn.Module, config: FiraConfig) -> Built:
    """FiraAdamW on the model's groups."""
    return Built(_optimizer(model, config))


def state_bytes(model: nn.Module, config: FiraConfig) -> int:
    """Bytes of state of FiraAdamW on this model."""
    return _optimizer(model, config).planned_state_bytes()


def _optimizer(model: nn.Module, config: FiraConfig) -> FiraAdamW:
    return FiraAdamW(
        projected_groups(model, config),
        **projection_options(config),
        alpha_on=config.alpha_on,
        scaling=config.scaling,
        limiter_gamma=config.limiter_gamma,
        limiter_floor=config.limiter_floor,
    )


METHOD = Method("fira", "2410.01623", FiraConfig, build, state_bytes, factor_request)
