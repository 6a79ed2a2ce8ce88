"""Run a ``fullrank`` optimizer and its plain reference side by side on prescribed gradients.

A singular vector's sign is free, and Adam's moments stay in the old coordinates when a subspace
changes, so two correct programs part at the first refresh. Here the library goes first in every step
and the reference is given the bases then found in ``optimizer.state``; what is left to compare is
everything but the decomposition, which ``test_bases.py`` checks by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.problems import relative_error
from tests.reference.galore import GaLore
from tests.reference.projection import Basis, sides

TO_REFERENCE = {"update_proj_gap": "gap", "limiter_gamma": "gamma", "limiter_floor": "floor"}
"""Option names of the library whose references are shorter."""

ONLY_OURS = ("state_dtype", "basis", "seed", "stagger_refresh")
"""Options about how a basis is found and a state stored: no reference needs them."""


def reference_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The library's options in the reference's words."""
    return {TO_REFERENCE.get(k, k): v for k, v in options.items() if k not in ONLY_OURS}


def basis_in_force(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, proj_type: str) -> Basis | None:
    """The parameter's basis as the reference writes it, in float64; None for vectors.

    The state keeps one matrix (projected side x rank), and for "full" the right and the left one.
    """
    if parameter.dim() < 2:
        return None
    state = optimizer.state[parameter]
    basis = state["basis"].double().clone()
    left, right = sides(parameter.shape[0], parameter[0].numel(), proj_type)
    if left and right:
        return Basis(state["basis_left"].double().clone(), basis)
    return Basis(basis, None) if left else Basis(None, basis)


def sides_of(basis: Basis) -> list[Tensor]:
    """The sides that a basis projects, the left one first."""
    return [side for side in (basis.left, basis.right) if side is not None]


class Together:
    """Several references with settings of their own, stepped as one."""

    def __init__(self, parts: Sequence[GaLore]) -> None:
        self.parts = parts
        self.weights = [weight for part in parts for weight in part.weights]

    def step(self, gradients: list[Tensor], bases: list[Basis | None]) -> None:
        """Give each part its own gradients and bases."""
        done = 0
        for part in self.parts:
            mine = slice(done, done + len(part.weights))
            part.step(gradients[mine], bases[mine])
            done = mine.stop


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Give each parameter its own copy of its gradient."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype, copy=True)


def follow(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    reference: GaLore | Together,
    gradients: list[list[Tensor]],
    *,
    tolerance: float,
) -> None:
    """Step both through ``gradients`` (one list a step) and require agreement after every step."""
    starts = [p.detach().clone() for p in parameters]
    kinds = {p: group["proj_type"] for group in optimizer.param_groups for p in group["params"]}
    for number, step_gradients in enumerate(gradients):
        set_gradients(parameters, step_gradients)
        optimizer.step()
        bases = [basis_in_force(optimizer, p, kinds[p]) for p in parameters]
        reference.step([g.double() for g in step_gradients], bases)
        for parameter, wanted, start in zip(parameters, reference.weights, starts, strict=True):
            error = relative_error(parameter, wanted, start)
            assert error < tolerance, f"step {number}, shape {tuple(parameter.shape)}: {error:.2e}"


def as_parameters(weights: list[Tensor], dtype: torch.dtype) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters in ``dtype`` and float64 copies of the very same numbers for the reference."""
    parameters = [nn.Parameter(w.to(dtype, copy=True)) for w in weights]
    return parameters, [p.detach().double().clone() for p in parameters]
