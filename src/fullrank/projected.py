"""What GaLore, Fira and APOLLO share: projected groups, their options and state, refreshing the basis.

A group with a ``rank`` is projected: a weight of two or more dimensions, seen as a matrix, gets its
moments in a subspace of rank r. Any other parameter takes plain AdamW (or RMSprop). For an m x n
matrix, m >= n, the state is a basis (n x r) and the moments (m x r each).
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import ConfigError
from fullrank.ops import adam, lowrank, subspace
from fullrank.optimizer import MethodOptimizer, StateSpec, is_number
from fullrank.params import rank_problems

logger = logging.getLogger(__name__)

BASES = ("svd", "power", "random")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class MatrixStep:
    """One matrix at one step, oriented with its projected side last (shapes as in ``ops.subspace``)."""

    weight: Tensor
    """W (M x N), a view of the parameter, or a copy that is written back."""
    grad: Tensor
    """G (M x N), read only."""
    low: Tensor
    """R = G Q (M x r), or P^T G Q (r x r)."""
    direction: Tensor
    """The adaptive direction of R, same shape."""
    basis: Tensor
    """Q (N x r)."""
    basis_left: Tensor | None
    """P (M x r) of proj_type "full"."""
    step_size: float
    """Learning rate with Adam's bias corrections."""
    keep: float
    """1 - lr * weight_decay, the factor that decoupled decay leaves of the updated weight."""


class ProjectedOptimizer(MethodOptimizer):
    """Projects the gradients of groups with a ``rank``; subclasses say what becomes of them."""

    structural = ("method", "rank", "proj_type", "state_dtype")

    moments: Sequence[str]
    """State keys of the low-rank (or plain) moments, in the order of ``direction_``."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults | {"state_dtype": dtype_name(defaults["state_dtype"])})
        if all(group["rank"] is None for group in self.param_groups):
            warnings.warn(
                f"no parameter group has a rank, so {type(self).__name__} runs as a plain adaptive optimizer. "
                "Make the groups with fullrank.divide_params(model, target_modules_list=[...], rank=...).",
                stacklevel=3,
            )
        logger.info("%s", self.describe())

    @abstractmethod
    def direction_(self, low: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Update the moments with R in place and return the adaptive direction."""

    @abstractmethod
    def step_size(self, group: dict[str, Any], step: int) -> float:
        """The step length at optimizer step ``step``, 1 at the first."""

    @abstractmethod
    def plain_(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        """The unprojected update of parameters that are all at the same step."""

    @abstractmethod
    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """The method: change ``matrix.weight`` in place."""

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a group, one sentence each."""
        problems = super().option_problems(group)
        if group["rank"] is None:
            return problems
        problems += projection_problems(group)
        for name, parameter, owner in self.named(trainable=False):
            if owner is group and parameter.ndim >= 2:
                problems += rank_problems(group["rank"], tuple(parameter.shape), name)
        return problems

    def random_basis(self, size: int, rank: int, *, seed: int, like: Tensor) -> Tensor:
        """The basis of ``basis="random"``."""
        return subspace.random_basis(size, rank, seed=seed, device=like.device, dtype=like.dtype)

    def limit_growth_(
        self, norm: Tensor, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """Fira's norm-growth limiter on an update of this norm: the factor, its memory updated in place."""
        floor = group["limiter_floor"] * math.sqrt(matrix.grad.numel())
        return lowrank.limit_growth_(norm, state["limiter_norm"], gamma=group["limiter_gamma"], floor=floor)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; checks the options of a projected one and takes ``scale`` as GaLore's name of alpha."""
        param_group = dict(param_group)
        if "scale" in param_group:
            if "alpha" in param_group:
                raise ConfigError("a parameter group has both alpha and scale, two names of one option. Keep alpha.")
            param_group["alpha"] = param_group.pop("scale")
        if "state_dtype" in param_group:
            param_group["state_dtype"] = dtype_name(param_group["state_dtype"])
        super().add_param_group(param_group)

    def state_spec(self, parameter: Tensor, group: dict[str, Any]) -> StateSpec:
        """Low-rank moments in ``state_dtype``, basis and limiter in float32 (float64 for float64 weights).

        A plain parameter's moments have its own dtype, as in ``torch.optim.AdamW``, but for float16:
        squares of gradients vanish there, so they are float32.
        """
        spec: StateSpec = {"step": ((), torch.float32)}
        if not is_projected(parameter, group):
            plain = torch.float32 if parameter.dtype == torch.float16 else parameter.dtype
            return spec | dict.fromkeys(self.moments, (tuple(parameter.shape), plain))
        working = torch.promote_types(parameter.dtype, torch.float32)
        moment = parameter.dtype if group["state_dtype"] is None else STATE_DTYPES[group["state_dtype"]]
        if parameter.dtype == torch.float64:
            moment = torch.float64
        rank = group["rank"]
        rows, columns = parameter.shape[0], parameter[0].numel()
        if subspace.projects_rows((rows, columns), group["proj_type"]):
            rows, columns = columns, rows
        low = (rank if group["proj_type"] == "full" else rows, rank)
        spec["basis"] = ((columns, rank), working)
        if group["proj_type"] == "full":
            spec["basis_left"] = ((rows, rank), working)
        if group.get("limiter_gamma") is not None:
            spec["limiter_norm"] = ((), working)
        return spec | dict.fromkeys(self.moments, (low, moment))

    def step_group(self, group: dict[str, Any], number: int) -> None:
        """Projected parameters matrix by matrix, the plain ones together by step number."""
        plain: dict[int, list[Tensor]] = defaultdict(list)
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if is_projected(parameter, group):
                self._step_matrix(parameter, group, place=(number, index))
            else:
                plain[int(self.state[parameter]["step"].add_(1))].append(parameter)
        for step, parameters in plain.items():
            self.plain_(group, parameters, step)

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any], *, place: tuple[int, int]) -> None:
        """Refresh the basis if due, project, update the moments, and hand over to the method."""
        assert parameter.grad is not None
        state = self.state[parameter]
        matrix = subspace.as_matrix(parameter)
        weight = subspace.oriented(matrix, group["proj_type"])
        grad = subspace.oriented(subspace.as_matrix(parameter.grad), group["proj_type"])
        done = int(state["step"])
        if subspace.refresh_due(done, group["update_proj_gap"], index=place[1] if group["stagger_refresh"] else 0):
            self._refresh_(state, grad, group, seed=subspace.mix_seed(group["seed"], *place, done))
        low = subspace.project(grad, state["basis"], state.get("basis_left"))
        direction = self.direction_(low.to(state[self.moments[0]].dtype), state, group).to(low.dtype)
        step = int(state["step"].add_(1))
        lr = float(group["lr"])
        self.update_(
            MatrixStep(
                weight=weight,
                grad=grad,
                low=low,
                direction=direction,
                basis=state["basis"],
                basis_left=state.get("basis_left"),
                step_size=self.step_size(group, step),
                keep=1.0 - lr * group["weight_decay"],
            ),
            state,
            group,
        )
        if matrix.data_ptr() != parameter.data_ptr():  # a layout that has no matrix view, such as channels_last
            parameter.copy_(matrix.view(parameter.shape))

    def _refresh_(self, state: dict[str, Tensor], grad_MN: Tensor, group: dict[str, Any], *, seed: int) -> None:
        """Replace the basis (both bases of "full") in place, and rotate the moments if asked."""
        first = int(state["step"]) == 0
        sides = {"basis": grad_MN}
        if group["proj_type"] == "full":
            sides["basis_left"] = grad_MN.t()
        for number, (key, side) in enumerate(sides.items()):
            old = state[key]
            new = self._new_basis(side, old, group, first=first, seed=subspace.mix_seed(seed, number))
            if group["rotate_moments"] and not first:
                for name in self.moments:
                    subspace.rotate_(state[name], old, new, squared=name != "exp_avg", left=key == "basis_left")
            old.copy_(new)

    def _new_basis(self, grad_MN: Tensor, old_Nr: Tensor, group: dict[str, Any], *, first: bool, seed: int) -> Tensor:
        size, rank = old_Nr.shape
        if group["basis"] == "svd":
            return subspace.svd_basis(grad_MN, rank)
        if group["basis"] == "random":
            return self.random_basis(size, rank, seed=seed, like=old_Nr)
        if first:
            start = subspace.random_basis(size, rank, seed=seed, device=old_Nr.device, dtype=old_Nr.dtype)
            return subspace.power_basis(grad_MN, start, iterations=subspace.FIRST_POWER_ITERATIONS)
        return subspace.power_basis(grad_MN, old_Nr)

    def describe(self) -> str:
        """One line: how many matrices are projected, their share, and bytes of state against AdamW's."""
        trainable = list(self.named())
        matrices = [(parameter, group) for _, parameter, group in trainable if is_projected(parameter, group)]
        ranks = sorted({group["rank"] for _, group in matrices})
        total = sum(parameter.numel() for _, parameter, _ in trainable)
        share = sum(parameter.numel() for parameter, _ in matrices) / max(total, 1)
        adamw = sum(2 * parameter.numel() * parameter.element_size() + 4 for _, parameter, _ in trainable)
        shown = ", ".join(map(str, ranks)) or "none"
        return (
            f"{type(self).__name__}: {len(matrices)} matrices projected (rank {shown}), "
            f"{share:.1%} of {total:,} parameters; {self.planned_state_bytes():,} bytes of optimizer state, "
            f"AdamW {adamw:,}"
        )


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

    def plain_(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        """AdamW with the authors' place of epsilon and of weight decay."""
        adam.adamw_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
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

    def plain_(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        """RMSprop with decoupled weight decay."""
        for parameter in parameters:
            square_avg = self.state[parameter]["square_avg"]
            assert parameter.grad is not None
            grad = parameter.grad.to(square_avg.dtype)
            direction = adam.rmsprop_direction_(square_avg, grad, beta=group["beta"], eps=group["eps"])
            parameter.add_(direction.to(parameter.dtype), alpha=-float(group["lr"]))
        adam.decay_(parameters, lr=float(group["lr"]), weight_decay=group["weight_decay"])


def is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether this group projects this parameter: a group with a rank, two or more dimensions."""
    return group["rank"] is not None and parameter.ndim >= 2


def dtype_name(dtype: Any) -> Any:
    """A torch dtype by its name, as groups hold it so that they save as plain values; anything else as it is."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def projection_problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with the options that all projected groups have, one sentence each."""
    problems = []
    gap, alpha = group["update_proj_gap"], group["alpha"]
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        problems.append(f"update_proj_gap must be a whole number of optimizer steps, at least 1, got {gap!r}.")
    if not (is_number(alpha) and 0.0 < alpha < math.inf):
        problems.append(f"alpha must be a number above 0 and finite, got {alpha!r}.")
    if group["proj_type"] not in subspace.PROJ_TYPES:
        problems.append(f"proj_type must be one of {', '.join(subspace.PROJ_TYPES)}, got {group['proj_type']!r}.")
    if group["basis"] not in BASES:
        problems.append(f"basis must be one of {', '.join(BASES)}, got {group['basis']!r}.")
    if group["state_dtype"] not in (*STATE_DTYPES, None):
        problems.append(f"state_dtype must be one of {', '.join(STATE_DTYPES)} or None, got {group['state_dtype']!r}.")
    for key, kind in (("rotate_moments", bool), ("stagger_refresh", bool), ("seed", int)):
        if not isinstance(group[key], kind):
            problems.append(f"{key} must be of type {kind.__name__}, got {group[key]!r}.")
    gamma, floor = group.get("limiter_gamma"), group.get("limiter_floor", 0.0)
    if gamma is not None and not (is_number(gamma) and gamma >= 1.0):
        problems.append(f"limiter_gamma must be a number, at least 1, or None for no limiter, got {gamma!r}.")
    if not (is_number(floor) and 0.0 <= floor < math.inf):
        problems.append(f"limiter_floor must be a number, at least 0 and finite, got {floor!r}.")
    return problems
