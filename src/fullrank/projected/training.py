"""The base of GaLore's, Fira's and APOLLO's optimizers: projected groups, their state, refreshing the basis.

A group with a ``rank`` is projected: a weight of two or more dimensions, seen as a matrix, gets its
moments in a subspace of rank r. Any other parameter takes plain AdamW (or RMSprop). For an m x n
matrix, m >= n, the state is a basis (n x r) and the moments (m x r each).

A sharded parameter (FSDP2) is stepped on its shards, all of them together, so that what the processes have to
tell each other goes in a few collectives a step, however many matrices there are.
"""

from __future__ import annotations

import logging
import math
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.moments import SCALE, dtype_name, in_pieces, kept_as, layout_of, opened, refuse_columns
from fullrank.ops import lowrank, subspace
from fullrank.optimizer import MethodOptimizer, Seat
from fullrank.params import rank_problems
from fullrank.projected.basis import new_basis
from fullrank.projected.kept import precision_problems, projected_spec
from fullrank.projected.matrix import Cut, MatrixStep
from fullrank.projected.options import is_projected, projection_problems
from fullrank.saved_state import StateSpec
from fullrank.sharding import Asking, Request, Routine, Split, gradient_of, local, run_alone, run_together, split_of
from fullrank.stepping import NO_EFFECT, has_no_effect, in_full, rounding_seed, stepped, steps_a_copy

logger = logging.getLogger(__name__)

WAVE = 1 << 26
"""Numbers that low-rank gradients and joined bases of the sharded matrices that are stepped together hold, at most."""

Bases = tuple[Tensor, Tensor | None]
"""The basis and the left one of proj_type "full", as a process's part of a matrix needs them."""


class ProjectedOptimizer(MethodOptimizer):
    """Projects the gradients of groups with a ``rank``; subclasses say what becomes of them."""

    structural = ("method", "rank", "proj_type", "state_dtype")

    moments: Sequence[str]
    """State keys of the low-rank (or plain) moments, in the order of ``direction_``."""
    reads_row_norms = False
    """Whether ``update_`` asks for the norms of the gradient's rows."""

    def __init__(self, params: Any, defaults: dict[str, Any], *, partition_states: bool = False) -> None:
        defaults = defaults | {key: dtype_name(defaults[key]) for key in ("state_dtype", "plain_state_dtype")}
        super().__init__(params, defaults, partition_states=partition_states)
        if all(group["rank"] is None for group in self.param_groups):
            warnings.warn(
                f"no parameter group has a rank, so {type(self).__name__} runs as a plain adaptive optimizer. "
                "Make the groups with fullrank.divide_params(model, target_modules_list=[...], rank=...).",
                stacklevel=3,
            )
        if has_no_effect(self.param_groups):
            warnings.warn(NO_EFFECT, stacklevel=3)
        logger.info("%s", self.describe())

    @abstractmethod
    def direction_(self, low: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Update the moments with R in place and return the adaptive direction."""

    @abstractmethod
    def step_size(self, group: dict[str, Any], step: int) -> float:
        """The step length at optimizer step ``step``, 1 at the first."""

    @abstractmethod
    def plain_(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        step: int,
    ) -> None:
        """The unprojected update of weights that are all at the same step, or of this process's parts of them."""

    @abstractmethod
    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> Routine:
        """The method: change ``matrix.weight`` in place, asking for what other processes hold of a cut matrix."""

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a group, one sentence each."""
        problems = super().option_problems(group)
        problems += precision_problems(group)
        if group["rank"] is None:
            return problems
        problems += projection_problems(group)
        for name, parameter, owner in self.named(trainable=False):
            if owner is group and parameter.ndim >= 2:
                problems += rank_problems(group["rank"], tuple(parameter.shape), name)
        return problems

    def random_basis(self, size: int, rank: int, *, seed: int, like: Tensor) -> Tensor:
        """The basis of ``basis="random"``."""
        return _orthonormal(size, rank, seed=seed, like=like)

    def limit_growth_(
        self, norm: Tensor, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """Fira's norm-growth limiter on an update of this norm: the factor, its memory updated in place."""
        floor = group["limiter_floor"] * math.sqrt(matrix.cut.num_rows * matrix.cut.num_columns)
        return lowrank.limit_growth_(norm, state["limiter_norm"], gamma=group["limiter_gamma"], floor=floor)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; checks the options of a projected one and takes ``scale`` as GaLore's name of alpha."""
        param_group = dict(param_group)
        if "scale" in param_group:
            if "alpha" in param_group:
                raise ConfigError("a parameter group has both alpha and scale, two names of one option. Keep alpha.")
            param_group["alpha"] = param_group.pop("scale")
        for key in param_group.keys() & {"state_dtype", "plain_state_dtype"}:
            param_group[key] = dtype_name(param_group[key])
        super().add_param_group(param_group)

    def state_spec(self, parameter: Tensor, group: dict[str, Any]) -> StateSpec:
        """Step count, basis, limiter and moments (``kept``)."""
        return projected_spec(parameter, group, self.moments)

    def state_layout(self, key: str, parameter: Tensor, group: dict[str, Any]) -> str:
        """Of bases and moments each process keeps its share of rows; those of "full" are r x r, and whole."""
        if not is_projected(parameter, group):
            return layout_of(key, parameter)
        is_cut = self._cut(parameter, group).side is not None
        is_square = key.removesuffix(SCALE) in self.moments and group["proj_type"] == "full"
        return "rows" if is_cut and not is_square and key != "limiter_norm" else "whole"

    def refuse_layout(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raise UnsupportedError where a sharded matrix would have to be gathered: for an exact SVD."""
        super().refuse_layout(name, parameter, group)
        if not is_projected(parameter, group):
            refuse_columns(name, parameter, self.state_spec(parameter, group))
        elif group["basis"] == "svd" and self._cut(parameter, group).side:
            raise UnsupportedError(
                f"basis svd needs whole gradients, and {name} {tuple(parameter.shape)} is sharded over several "
                'processes. Use basis="power", which never gathers them, or DDP.'
            )

    def _cut(self, parameter: Tensor, group: dict[str, Any]) -> Cut:
        return Cut.of(parameter.shape, split_of(parameter), group["proj_type"])

    def step_parameters(self, only: Sequence[Seat] | None = None) -> None:
        """Whole matrices one by one, then the cut ones in waves; plain parameters together by step number."""
        cut: list[tuple[Routine, Split, int]] = []
        for number, group, members in self.seated(only):
            plain: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
            for index, parameter in members:
                if not is_projected(parameter, group):
                    plain[int(self.state[parameter]["step"].add_(1))].append((index, parameter))
                    continue
                place = self._cut(parameter, group)
                routine = self._step_matrix(parameter, group, place, seat=(number, index))
                if place.side is None or place.split is None:
                    run_alone(routine)
                else:
                    # the same number in all processes, whatever their parts: they must form the same waves
                    rows = -(-place.num_rows // place.split.num)
                    size = (rows + place.num_columns) * group["rank"]
                    if steps_a_copy(parameter, group):
                        size += rows * place.num_columns  # a copy of the weight in float32
                    cut.append((routine, place.split, size))
            for step, parameters in plain.items():
                self._step_plain(group, number, parameters, step)
        for wave in _waves(cut):
            run_together(wave)

    def _step_plain(self, group: dict[str, Any], number: int, members: list[tuple[int, Tensor]], step: int) -> None:
        """Together those whose moments have their own type; one at a time those that are stepped in float32."""
        weights: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        for index, parameter in members:
            state = {key: local(value) for key, value in self.state[parameter].items()}
            seed = rounding_seed(parameter, group, (number, index), step)
            if seed is None and state[self.moments[0]].dtype == kept_as(None, parameter.dtype):
                weights.append(local(parameter))
                grads.append(gradient_of(parameter))
                states.append(state)
                continue
            for piece, part, grad, kept in in_pieces(local(parameter), gradient_of(parameter), state, self.moments):
                with in_full(part, seed=seed, piece=piece) as weight, opened(kept, self.moments, weight.dtype) as held:
                    self.plain_(group, [weight], [grad.to(weight.dtype)], [held], step)
        if weights:
            self.plain_(group, weights, grads, states, step)

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any], cut: Cut, *, seat: Seat) -> Routine:
        """Refresh the basis if due, project, update the moments, and hand over to the method."""
        state = {key: local(value) for key, value in self.state[parameter].items()}
        grad = self._oriented_gradient(parameter, cut)
        bases, low, row_norms_sq = yield from self._projection(parameter, state, grad, cut, group, seat=seat)
        with opened(state, self.moments) as held:
            direction = self.direction_(low.to(held[self.moments[0]].dtype), held, group).to(low.dtype)
        step = int(state["step"].add_(1))
        with stepped(parameter, group, seat, step) as own:
            matrix = subspace.as_matrix(own)
            yield from self.update_(
                MatrixStep(
                    weight=matrix.t() if cut.transposed else matrix,
                    grad=grad,
                    low=low,
                    direction=direction,
                    basis=bases[0],
                    basis_left=bases[1],
                    step_size=self.step_size(group, step),
                    keep=1.0 - float(group["lr"]) * group["weight_decay"],
                    cut=cut,
                    row_norms_sq=row_norms_sq,
                ),
                state,
                group,
            )
            if matrix.data_ptr() != own.data_ptr():  # a layout that has no matrix view, such as channels_last
                own.copy_(matrix.view(own.shape))

    def _oriented_gradient(self, parameter: Tensor, cut: Cut) -> Tensor:
        """This process's part of G, as a matrix with its projected side last."""
        grad = subspace.as_matrix(gradient_of(parameter))
        return grad.t() if cut.transposed else grad

    def _projection(
        self,
        parameter: Tensor,
        state: dict[str, Tensor],
        grad: Tensor,
        cut: Cut,
        group: dict[str, Any],
        *,
        seat: Seat,
    ) -> Generator[Request, Tensor, tuple[Bases, Tensor, Tensor | None]]:
        """The bases for a step, refreshed if due, R, and the norms of rows that came with it."""
        seed = subspace.mix_seed(group["seed"], *seat, int(state["step"])) if is_due(state, group, seat) else None
        bases = yield from self._bases(state, grad, cut, group, seed=seed)
        return bases, *(yield from projected(grad, *bases, cut, norms=self.reads_row_norms))

    def _bases(
        self, state: dict[str, Tensor], grad: Tensor, cut: Cut, group: dict[str, Any], *, seed: int | None
    ) -> Generator[Request, Tensor, Bases]:
        """The basis (and the left one of "full") as this process's part needs them, renewed where there is a seed."""
        sides = {"basis": (grad, cut)}
        if group["proj_type"] == "full":
            sides["basis_left"] = (grad.t(), cut.flipped())
        found: list[Tensor | None] = []
        for number, (key, (side, side_cut)) in enumerate(sides.items()):
            if seed is not None:
                mixed = subspace.mix_seed(seed, number)
                found.append((yield from self._renewed(key, state, side, side_cut, group, seed=mixed)))
                continue
            basis = state[key]
            if (side_cut.side == "rows" or len(sides) == 1) and not lowrank.uses_direct_residual(
                side_cut.num_columns, group["rank"]
            ):
                basis = basis.to(grad.dtype)  # all products with it are taken in this dtype: convert once, send no more
            found.append((yield from side_cut.in_reach(basis)))
        assert found[0] is not None
        return found[0], found[1] if len(found) > 1 else None

    def _renewed(
        self, key: str, state: dict[str, Tensor], grad: Tensor, cut: Cut, group: dict[str, Any], *, seed: int
    ) -> Asking:
        """Replace a basis in place, and rotate the moments if asked; returns it as this process's part needs it."""
        first = int(state["step"]) == 0
        old = state[key]
        if not first and (group["rotate_moments"] or group["basis"] == "power"):
            old = yield from cut.in_reach(old)
        draw = self.random_basis if group["basis"] == "random" else _orthonormal
        drawn = partial(draw, seed=seed, like=old)
        new = yield from new_basis(grad, old, cut, group["basis"], first=first, draw=drawn)
        if group["rotate_moments"] and not first:
            turn = old.t() @ new
            if cut.side == "columns":
                turn = yield from cut.total(turn)
            for name in self.moments:
                with opened(state, (name,)) as held:
                    subspace.rotate_(held[name], turn, squared=name != "exp_avg", left=key == "basis_left")
        state[key].copy_(cut.kept(new))
        return new

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


def is_due(state: Mapping[str, Tensor], group: Mapping[str, Any], seat: Seat) -> bool:
    """Whether the next step of a matrix with this state refreshes its basis."""
    index = seat[1] if group["stagger_refresh"] else 0
    return subspace.refresh_due(int(state["step"]), group["update_proj_gap"], index=index)


def projected(
    grad: Tensor, basis: Tensor, basis_left: Tensor | None, cut: Cut, *, norms: bool = False
) -> Generator[Request, Tensor, tuple[Tensor, Tensor | None]]:
    """R: own rows of G Q, or all of P^T G Q; and if asked the squared norms of G's rows, where they cost nothing."""
    if basis_left is not None:
        low = yield from cut.total(subspace.project(grad, basis, basis_left))
        return low, None
    if norms:
        low, row_norms_sq = subspace.project_with_norms(grad, basis)
    else:
        low, row_norms_sq = subspace.project(grad, basis), None
    if cut.side == "columns":
        low = yield Request("to_rows", low)
    return low, row_norms_sq


def _orthonormal(size: int, rank: int, *, seed: int, like: Tensor) -> Tensor:
    return subspace.random_basis(size, rank, seed=seed, device=like.device, dtype=like.dtype)


def _waves(routines: list[tuple[Routine, Split, int]]) -> Iterator[list[tuple[Routine, Split]]]:
    """Routines that run together, so that what all of them hold at a time stays within bounds."""
    wave: list[tuple[Routine, Split]] = []
    held = 0
    for routine, split, size in routines:
        if wave and held + size > WAVE:
            yield wave
            wave, held = [], 0
        wave.append((routine, split))
        held += size
    if wave:
        yield wave
