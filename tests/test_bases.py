"""The bases are what they say: orthonormal, of the right subspace, refreshed at the right steps.

The parity tests hand the library's own bases to the references; this file is why that is allowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import FiraAdamW, GaLoreAdamW
from tests.following import basis_in_force, sides_of
from tests.problems import MATRICES, RANK, SHAPES, make_gradients, make_weight
from tests.reference.projection import Basis, svd_basis

GAP = 4
STEPS = 10
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"fira": FiraAdamW, "galore": GaLoreAdamW}


def bases_of_a_run(
    kind: Callable[..., torch.optim.Optimizer], shape: str, gradients: list[Tensor], **options: Any
) -> list[Basis]:
    """The basis in force at each step, copied."""
    parameter = nn.Parameter(make_weight(SHAPES[shape]))
    optimizer = kind([parameter], rank=RANK, update_proj_gap=GAP, **options)
    bases = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        basis = basis_in_force(optimizer, parameter, str(options.get("proj_type", "std")))
        assert basis is not None
        bases.append(basis)
    return bases


def projector(side: Tensor) -> Tensor:
    """Q Q^T: the same for every orthonormal basis of one subspace."""
    return side @ side.T


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [*MATRICES, "conv"])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_svd_spans_the_leading_singular_vectors(method: str, shape: str, proj_type: str) -> None:
    """At steps 0, gap and 2 gap the subspace is the exact one of that very step's gradient."""
    gradients = make_gradients(SHAPES[shape], STEPS)
    bases = bases_of_a_run(OPTIMIZERS[method], shape, gradients, proj_type=proj_type, basis="svd")
    for number, found in enumerate(bases):
        refreshed = number - number % GAP
        wanted = svd_basis(gradients[refreshed].reshape(SHAPES[shape][0], -1), RANK, proj_type)
        for mine, exact in zip(sides_of(found), sides_of(wanted), strict=True):
            torch.testing.assert_close(projector(mine), projector(exact), rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", ["svd", "power", "random"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [*MATRICES, "conv"])
def test_orthonormal(shape: str, proj_type: str, basis: str) -> None:
    """Q^T Q = I for all ways to find a basis, at all steps."""
    gradients = make_gradients(SHAPES[shape], STEPS)
    for found in bases_of_a_run(FiraAdamW, shape, gradients, proj_type=proj_type, basis=basis):
        for side in sides_of(found):
            torch.testing.assert_close(side.T @ side, torch.eye(RANK).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", ["svd", "power", "random"])
def test_refresh_steps(basis: str) -> None:
    """The basis changes at steps gap, 2 gap, ... and at no other."""
    bases = bases_of_a_run(FiraAdamW, "tall", make_gradients(SHAPES["tall"], STEPS), basis=basis)
    changed = [i for i in range(1, STEPS) if not bases[i].same_as(bases[i - 1])]
    assert changed == [GAP, 2 * GAP]


@pytest.mark.parametrize("shape", MATRICES)
def test_power_iteration_finds_the_subspace(shape: str) -> None:
    """With a spectrum that decays, power iteration keeps 99% of what the SVD's subspace keeps."""
    gradients = make_gradients(SHAPES[shape], STEPS)
    found = bases_of_a_run(FiraAdamW, shape, gradients, basis="power")
    for number in range(0, STEPS, GAP):
        exact = svd_basis(gradients[number], RANK, "std")
        kept = found[number].down(gradients[number]).norm()
        assert kept > 0.99 * exact.down(gradients[number]).norm()


def test_random_bases_differ_between_weights_and_repeat_with_the_seed() -> None:
    """Two weights of one shape get different bases; the same seed gives the same ones again."""

    def run(seed: int) -> list[Tensor]:
        parameters = [nn.Parameter(make_weight(SHAPES["tall"])) for _ in range(2)]
        optimizer = FiraAdamW(parameters, rank=RANK, basis="random", seed=seed)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [optimizer.state[p]["basis"] for p in parameters]

    first, again, other = run(0), run(0), run(1)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_random_bases_of_the_two_sides_differ() -> None:
    """With "full" on a square matrix the left and the right side do not share one draw."""
    basis = bases_of_a_run(FiraAdamW, "square", make_gradients(SHAPES["square"], 1), proj_type="full", basis="random")[
        0
    ]
    assert not torch.equal(*sides_of(basis))


def test_staggered_refreshes_spread_over_the_gap() -> None:
    """With stagger_refresh the weights of one group do not all pay for a refresh at the same step."""
    parameters = [nn.Parameter(make_weight(SHAPES["tall"], seed=i)) for i in range(4)]
    sequences = [make_gradients(SHAPES["tall"], 3 * GAP, seed=i) for i in range(4)]
    optimizer = FiraAdamW(parameters, rank=RANK, update_proj_gap=GAP, stagger_refresh=True)
    steps: list[list[int]] = [[] for _ in parameters]
    before = [torch.empty(0)] * 4
    for number in range(3 * GAP):
        for parameter, sequence in zip(parameters, sequences, strict=True):
            parameter.grad = sequence[number].clone()
        optimizer.step()
        for i, parameter in enumerate(parameters):
            now = optimizer.state[parameter]["basis"].clone()
            if not torch.equal(now, before[i]):
                steps[i].append(number)
            before[i] = now
    assert all(s[0] == 0 for s in steps), "every weight needs a basis at its first step"
    late = [[n for n in s if n >= GAP] for s in steps]
    assert len({tuple(s) for s in late}) > 1
    assert all(b - a == GAP for s in late for a, b in itertools.pairwise(s))
