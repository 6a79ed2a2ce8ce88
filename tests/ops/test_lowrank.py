"""The closed form of the residual, the in-place update, and the limiter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullrank.ops import lowrank, subspace

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32)}
RANK = 5
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
wholes = pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return subspace.gaussian(rows, columns, seed=seed, dtype=torch.float64)


def row_norms(matrix: Tensor, whole: bool) -> Tensor:
    """Norms by the definition, in float64."""
    rows = matrix.double().square().sum(1, keepdim=True)
    return (rows.sum(0, keepdim=True) if whole else rows).sqrt()


@pytest.mark.parametrize("kept", [0.25, 1.0, 2.0])
@wholes
@dtypes
@shapes
def test_residual_norms(shape: tuple[int, int], dtype: torch.dtype, whole: bool, kept: float) -> None:
    """|E|^2 from the norms of G and R is that of E = G - kept R Q^T formed in float64."""
    grad = drawn(*shape).to(dtype)
    basis = subspace.svd_basis(grad, RANK)
    low = subspace.project(grad, basis)
    found = lowrank.residual_norms_sq(
        lowrank.norms(grad, whole=whole).square(), lowrank.norms(low, whole=whole), kept=kept
    )
    residual = grad.double() - kept * (grad.double() @ basis.double()) @ basis.double().t()
    wanted = row_norms(residual, whole).square()
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=0)


def test_a_residual_of_nothing_is_not_negative() -> None:
    """Where G lies in the subspace rounding may not make a squared norm negative."""
    basis = subspace.random_basis(20, RANK, seed=0)
    low = drawn(48, RANK).float()
    grad = lowrank.lift(low, basis)
    found = lowrank.residual_norms_sq(
        lowrank.norms(grad).square(), lowrank.norms(subspace.project(grad, basis)), kept=1.0
    )
    assert (found >= 0).all()
    assert found.max() < 1e-5 * lowrank.norms(grad).square().max()


@wholes
@dtypes
@shapes
def test_norms(shape: tuple[int, int], dtype: torch.dtype, whole: bool) -> None:
    """By row or whole, from 0 up, in float32 at least, of a plain and of a transposed matrix."""
    matrix = drawn(*shape).to(dtype)
    wanted = row_norms(matrix, whole)
    for layout in (matrix, matrix.t().contiguous().t()):
        found = lowrank.norms(layout, whole=whole)
        assert found.shape == wanted.shape
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("block", [1, 64, 100, 1 << 17])
def test_blocked_norms(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed CPU matrix is summed in blocks, of any size, to the same numbers."""
    monkeypatch.setattr(lowrank, "BLOCK", block)
    matrix = drawn(48, 20)
    torch.testing.assert_close(lowrank.norms(matrix.t()), row_norms(matrix.t(), whole=False))


def test_where_the_residual_is_formed() -> None:
    """From half of the projected side on."""
    assert [lowrank.uses_direct_residual(8, rank) for rank in (1, 3, 4, 8)] == [False, False, True, True]
    assert [lowrank.uses_direct_residual(9, rank) for rank in (4, 5)] == [False, True]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one basis", "two bases"])
@dtypes
def test_add_lifted(dtype: torch.dtype, two_sided: bool, transposed: bool) -> None:
    """W = keep W + scale X Q^T in place, through a transposed view too."""
    rows, columns = 24, 16
    basis = subspace.random_basis(columns, RANK, seed=0, dtype=torch.float64)
    left = subspace.random_basis(rows, RANK, seed=1, dtype=torch.float64) if two_sided else None
    low = drawn(RANK if two_sided else rows, RANK)
    start = drawn(rows, columns, seed=2)
    whole = low if left is None else left @ low
    wanted = 0.9 * start - 0.1 * whole @ basis.t()
    stored = (start.t() if transposed else start).to(dtype, copy=True).contiguous()
    weight = stored.t() if transposed else stored
    working = torch.promote_types(dtype, torch.float32)
    sides = [side.to(working) for side in (basis, left) if side is not None]
    lowrank.add_lifted_(weight, low.to(working), *sides, scale=-0.1, keep=0.9)
    found = stored.t() if transposed else stored
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3 * TOLERANCE[dtype])


@wholes
@dtypes
def test_add_scaled(dtype: torch.dtype, whole: bool) -> None:
    """W += scale * factor * G in place, with a factor for each row or for all."""
    matrix, start = drawn(24, 16).to(dtype), drawn(24, 16, seed=1)
    factor = drawn(1 if whole else 24, 1, seed=2).abs()
    weight = start.to(dtype, copy=True)
    copy = matrix.clone()
    lowrank.add_scaled_(weight, matrix, factor.to(torch.promote_types(dtype, torch.float32)), scale=-0.5)
    assert torch.equal(matrix, copy)
    wanted = start - 0.5 * factor * matrix.double()
    torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=3 * TOLERANCE[dtype])


NAN, INF = float("nan"), float("inf")
LIMITER = [
    # norm, previous, floor -> factor, remembered
    (5.0, 0.0, 0.0, 1.0, 5.0),  # the first call
    (5.0, 0.0, 1.0, 1.0, 5.0),
    (5.0, 4.9, 0.0, 1.0, 5.0),  # grows by 2%: allowed at 10%
    (3.0, 4.0, 0.0, 1.0, 3.0),  # shrinks
    (0.0, 4.0, 0.0, 1.0, 0.0),  # dies
    (8.0, 4.0, 0.0, 0.55, 4.4),  # doubles: cut to 10%
    (8.0, 4.0, 4.0, 1.0, 8.0),  # the previous norm is not above the floor
    (8.0, 4.0, 3.9, 0.55, 4.4),
    (8.0, NAN, 0.0, 1.0, 8.0),  # a NaN remembered from a broken gradient limits nothing
    (INF, 0.0, 0.0, 1.0, 0.0),  # a norm that overflowed is not remembered,
    (INF, 4.0, 0.0, 0.0, 4.0),  # and its update is dropped
    (NAN, 4.0, 0.0, 0.0, 4.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("norm", "previous", "floor", "factor", "remembered"), LIMITER)
def test_limiter(
    norm: float, previous: float, floor: float, factor: float, remembered: float, dtype: torch.dtype
) -> None:
    """The truth table of the limiter at gamma = 1.1."""
    memory = torch.tensor(previous, dtype=dtype)
    found = lowrank.limit_growth_(torch.tensor(norm, dtype=dtype), memory, gamma=1.1, floor=floor)
    assert found.dtype == memory.dtype == dtype
    assert found.shape == memory.shape == ()
    assert float(found) == pytest.approx(factor, rel=1e-6)
    assert float(memory) == pytest.approx(remembered, rel=1e-6)


def test_limited_growth_adds_up() -> None:
    """A norm that stays ten times too large is reached at gamma per call and then free."""
    memory = torch.tensor(1.0, dtype=torch.float64)
    factors = [
        float(lowrank.limit_growth_(torch.tensor(10.0).double(), memory, gamma=1.1, floor=0.0)) for _ in "x" * 30
    ]
    calls = math.ceil(math.log(10) / math.log(1.1))
    assert factors == sorted(factors)
    assert factors[calls - 2] < 1.0
    assert factors[calls:] == [1.0] * (30 - calls)
