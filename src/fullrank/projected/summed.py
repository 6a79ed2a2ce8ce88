"""Gradients summed in their subspace: R = sum of G_i Q over micro-batches, so that no G outlives its backward pass.

Projection is linear, so for a method that reads R alone the sum of projected gradients is the projected sum. A basis
that is due is made from the first gradient of the sum, the only one there is; a random one needs none.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from fullrank.ops import subspace
from fullrank.optimizer import Seat
from fullrank.projected.matrix import Cut
from fullrank.projected.options import is_projected
from fullrank.projected.training import Bases, ProjectedOptimizer, is_due, projected
from fullrank.sharding import Request, Routine, local, run_alone, run_together


class SummedOptimizer(ProjectedOptimizer):
    """A projected optimizer whose ``update_`` reads R and never G."""

    _held: dict[Tensor, Tensor] | None = None

    def held(self, parameter: Tensor) -> Tensor | None:
        """The sum R of a matrix so far (own rows x r), to be changed in place only; None: nothing is held."""
        return None if self._held is None else self._held.get(parameter)

    def forget(self) -> None:
        """Drop what is held."""
        self._held = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and what is held of them."""
        self.forget()
        super().zero_grad(set_to_none=set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        """As any of ours; what is held belongs to the state before."""
        super().load_state_dict(state_dict)
        self.forget()

    def needs_gradient(self, seat: Seat) -> bool:
        """Whether ``hold`` would make the basis of a projected matrix from its gradient."""
        group = self.param_groups[seat[0]]
        parameter = group["params"][seat[1]]
        if group["basis"] == "random" or self.held(parameter) is not None:
            return False
        state = self.state.get(parameter)
        return not state or is_due(state, group, seat)

    def nothing_held(self, seat: Seat) -> Tensor:
        """Zeros in the shape of what this process would hold of a projected matrix."""
        group = self.param_groups[seat[0]]
        parameter = group["params"][seat[1]]
        cut = self._cut(parameter, group)
        rows = cut.num_rows
        if group["proj_type"] == "full":
            rows = group["rank"]
        elif cut.side is not None and cut.split is not None:
            start, end = cut.split.bounds(cut.num_rows)
            rows = end - start
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros((rows, group["rank"]), dtype=dtype, device=local(parameter).device)

    @torch.no_grad()
    def hold(self, seats: Sequence[Seat]) -> None:
        """Add the gradients of these matrices to what is held of them until they are stepped; they may be freed then.

        A collective if they are sharded.
        """
        self._prepare(seats)
        self._has_stepped_ahead = True  # in part: the gradients were not missed
        for number, group, members in self.seated(seats):
            for index, parameter in members:
                assert is_projected(parameter, group)
                cut = self._cut(parameter, group)
                routine = self._hold_matrix(parameter, group, cut, seat=(number, index))
                if cut.side is None or cut.split is None:
                    run_alone(routine)
                else:
                    run_together([(routine, cut.split)])

    def _hold_matrix(self, parameter: Tensor, group: dict[str, Any], cut: Cut, *, seat: Seat) -> Routine:
        state = {key: local(value) for key, value in self.state[parameter].items()}
        grad = super()._oriented_gradient(parameter, cut)
        held = self.held(parameter)
        if held is None:
            _, low, _ = yield from super()._projection(parameter, state, grad, cut, group, seat=seat)
            self._held = self._held or {}
            self._held[parameter] = low
        else:
            bases = yield from self._bases(state, grad, cut, group, seed=None)
            held.add_((yield from projected(grad, *bases, cut))[0])

    def steps_here(self, parameter: Tensor) -> bool:
        """Whether this process steps a parameter: it has a gradient, or something is held of it."""
        return self.held(parameter) is not None or super().steps_here(parameter)

    def _oriented_gradient(self, parameter: Tensor, cut: Cut) -> Tensor:
        if self.held(parameter) is None:
            return super()._oriented_gradient(parameter, cut)
        own = subspace.as_matrix(local(parameter))  # the gradients are gone: zeros that take no memory
        return own.new_zeros(()).expand(own.shape[::-1] if cut.transposed else own.shape)

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
        """As without sums; where there is one, with the bases that it was made with."""
        low = None if self._held is None else self._held.pop(parameter, None)
        if low is None:
            return (yield from super()._projection(parameter, state, grad, cut, group, seat=seat))
        return (yield from self._bases(state, grad, cut, group, seed=None)), low, None
