"""Orientation, bases and projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullrank.ops import lowrank, subspace
from fullrank.ops.subspace import PROJ_TYPES

RANK = 4
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def decaying(rows: int, columns: int, ratio: float, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix whose k-th singular value is ratio^k."""
    short = min(rows, columns)
    left = subspace.random_basis(rows, short, seed=seed, dtype=torch.float64)
    right = subspace.random_basis(columns, short, seed=seed + 1, dtype=torch.float64)
    return (left * ratio ** torch.arange(short, dtype=torch.float64) @ right.t()).to(dtype)


def energy(grad: Tensor, basis: Tensor) -> float:
    """The share of |G|^2 that the projection keeps."""
    kept = (grad.double() @ basis.double()).square().sum() / grad.double().square().sum()
    return float(kept)


def exact_energy(grad: Tensor) -> float:
    """The most that any basis of this rank keeps."""
    squares = torch.linalg.svdvals(grad.double()).square()
    return float(squares[:RANK].sum() / squares.sum())


def assert_orthonormal(basis: Tensor, atol: float) -> None:
    product = basis.double().t() @ basis.double()
    torch.testing.assert_close(product, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@shapes
def test_svd_keeps_the_most(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Orthonormal to rounding and of the exact leading energy; in float32 for half precision; owns its memory."""
    grad = decaying(*shape, 0.8, dtype=dtype)
    basis = subspace.svd_basis(grad, RANK)
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert basis.shape == (shape[1], RANK)
    assert basis.is_contiguous()
    assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()
    assert_orthonormal(basis, 1e-12 if dtype == torch.float64 else 1e-5)
    assert energy(grad, basis) == pytest.approx(exact_energy(grad), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_svd_of_a_broken_gradient(bad: float) -> None:
    """No decomposition exists: the first unit vectors, and no error."""
    grad = decaying(10, 6, 0.5, dtype=torch.float32)
    grad[2, 3] = bad
    assert torch.equal(subspace.svd_basis(grad, 3), torch.eye(6, 3))


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.999), (0.8, 0.95), (0.95, 0.85)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@shapes
def test_power_iteration_from_random(shape: tuple[int, int], dtype: torch.dtype, ratio: float, share: float) -> None:
    """A first basis: orthonormal, and near the exact energy even where the spectrum hardly decays."""
    grad = decaying(*shape, ratio, dtype=dtype)
    start = subspace.random_basis(shape[1], RANK, seed=3)
    if dtype == torch.float64:
        start = start.double()
    basis = subspace.power_basis(grad, start, iterations=subspace.FIRST_POWER_ITERATIONS)
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert_orthonormal(basis, 1e-12 if dtype == torch.float64 else 1e-5)
    assert energy(grad, basis) > share * exact_energy(grad)
    assert energy(grad, basis) > energy(grad, start)


@shapes
def test_each_iteration_and_a_warm_start_improve(shape: tuple[int, int]) -> None:
    """More iterations keep more; one from the last basis keeps more than one from random directions."""
    grad = decaying(*shape, 0.9)
    cold = subspace.random_basis(shape[1], RANK, seed=3, dtype=torch.float64)
    kept = [energy(grad, subspace.power_basis(grad, cold, iterations=n)) for n in range(1, 30)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(exact_energy(grad), rel=1e-3)
    turned = grad + 0.02 * decaying(*shape, 0.9, seed=7)
    warm = subspace.power_basis(grad, cold, iterations=10)
    assert energy(turned, subspace.power_basis(turned, warm)) > energy(turned, subspace.power_basis(turned, cold))
    assert energy(turned, subspace.power_basis(turned, warm)) > 0.95 * exact_energy(turned)


def test_power_iteration_leaves_its_start_alone() -> None:
    """The start is read only, and a zero gradient still gives an orthonormal basis."""
    start = subspace.random_basis(12, 3, seed=0)
    copy = start.clone()
    basis = subspace.power_basis(torch.zeros(20, 12), start)
    assert torch.equal(start, copy)
    assert_orthonormal(basis, 1e-6)


def test_random_basis() -> None:
    """Orthonormal; one seed, one basis, whatever the global random state; another seed, another basis."""
    torch.manual_seed(1)
    first = subspace.random_basis(30, 5, seed=11)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = subspace.random_basis(30, 5, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, subspace.random_basis(30, 5, seed=12))
    assert first.is_contiguous()
    assert_orthonormal(first, 1e-6)
    assert_orthonormal(subspace.random_basis(30, 5, seed=11, dtype=torch.float64), 1e-13)
    assert_orthonormal(subspace.random_basis(6, 6, seed=0), 1e-6)


def test_gaussian() -> None:
    """Mean 0 and variance 1, drawn from its seed alone."""
    drawn = subspace.gaussian(500, 200, seed=4)
    assert torch.equal(drawn, subspace.gaussian(500, 200, seed=4))
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.var()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@shapes
def test_orientation(shape: tuple[int, int], proj_type: str) -> None:
    """A view with the projected side last: the short side for std, the long one for reverse_std."""
    matrix = torch.zeros(shape)
    turned = subspace.oriented(matrix, proj_type)
    assert turned.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
    last = {"std": min(shape), "reverse_std": max(shape), "left": shape[0]}.get(proj_type, shape[1])
    assert turned.shape[1] == last
    if shape[0] == shape[1]:  # galore_torch: a square matrix is projected on the right by std
        assert subspace.projects_rows(shape, proj_type) == (proj_type in ("reverse_std", "left"))
    turned[0, 1] = 1.0
    assert matrix.sum() == 1.0


def test_as_matrix() -> None:
    """First dimension x the rest; a view where the strides allow one."""
    conv = torch.randn(8, 3, 2, 2)
    assert subspace.as_matrix(conv).shape == (8, 12)
    assert subspace.as_matrix(conv).data_ptr() == conv.data_ptr()
    last = conv.to(memory_format=torch.channels_last)
    assert torch.equal(subspace.as_matrix(last), subspace.as_matrix(conv))
    matrix = torch.randn(3, 4).t()
    assert subspace.as_matrix(matrix) is matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@shapes
def test_project_and_lift(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """R = G Q; lifting a projected matrix that lies in the subspace gives it back, with one basis or two."""
    exact = decaying(*shape, 0.5)
    right = subspace.svd_basis(exact, RANK)
    left = subspace.svd_basis(exact.t(), RANK)
    inside = (exact @ right @ right.t()).to(dtype)
    atol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for sides in ((right,), (right, left)):
        low = subspace.project(inside, *sides)
        assert low.dtype == torch.promote_types(dtype, torch.float32)
        assert low.shape == ((RANK, RANK) if len(sides) == 2 else (shape[0], RANK))
        torch.testing.assert_close(lowrank.lift(low, *sides).double(), inside.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rotate(left: bool) -> None:
    """A first moment keeps its image where the subspaces agree; a second moment stays non-negative, in total too."""
    old = subspace.random_basis(12, 3, seed=0, dtype=torch.float64)
    within = subspace.random_basis(3, 3, seed=1, dtype=torch.float64)
    new = old @ within  # the same subspace in other coordinates
    first = torch.randn(3, 9, dtype=torch.float64) if left else torch.randn(9, 3, dtype=torch.float64)
    second = first.square()
    total = second.sum()
    image = old @ first if left else first @ old.t()
    place = first.data_ptr()
    subspace.rotate_(first, old.t() @ new, squared=False, left=left)
    assert first.data_ptr() == place
    torch.testing.assert_close(new @ first if left else first @ new.t(), image, rtol=0, atol=1e-12)
    subspace.rotate_(second, old.t() @ new, squared=True, left=left)
    assert (second >= 0).all()
    torch.testing.assert_close(second.sum(), total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_into_the_same_basis_changes_nothing(dtype: torch.dtype) -> None:
    """To rounding, in the dtype of the moment; into an orthogonal subspace nothing is carried."""
    both = subspace.random_basis(12, 6, seed=0)
    moment = torch.randn(9, 3).to(dtype)
    kept = moment.clone()
    subspace.rotate_(moment, both[:, :3].t() @ both[:, :3], squared=False)
    assert moment.dtype == dtype
    torch.testing.assert_close(moment, kept, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    subspace.rotate_(moment, both[:, :3].t() @ both[:, 3:], squared=False)
    assert moment.float().norm() < 1e-5


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e20, torch.float32), (1e-25, torch.float32), (300.0, torch.float16), (1e-5, torch.float16)]
)
def test_power_iteration_at_extreme_scales(scale: float, dtype: torch.dtype) -> None:
    """Neither overflow nor underflow of the squares costs the subspace."""
    torch.manual_seed(0)
    leading = torch.randn(128, 4) @ torch.randn(4, 64)
    grad = ((leading / leading.abs().max() + 1e-3 * torch.randn(128, 64)) * scale).to(dtype)
    start = subspace.random_basis(64, 4, seed=0)
    basis = subspace.power_basis(grad, start, iterations=3)
    kept = (grad.double() @ basis.double()).norm() / grad.double().norm()
    assert kept > 0.99
