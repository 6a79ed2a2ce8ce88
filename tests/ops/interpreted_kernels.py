"""The Triton kernels in Triton's interpreter, which needs its variable before the first import: ``test_kernels`` runs
this file in a process of its own.

The interpreter rounds to bfloat16 towards zero, so results in it may be off by one unit of the last place.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullrank import ApolloAdamW, FiraAdamW, GaLoreAdamW
from fullrank.ops import adam, lowrank, subspace
from fullrank.ops.kernels import gpu, kernels
from tests.problems import make_gradients, make_weight, relative_error

DTYPES = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1, 1, 1), (17, 63, 3), (65, 130, 20)]
LAYOUTS = ["rows", "columns"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def drawn(rows: int, columns: int, layout: str = "rows", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    if layout == "every second":
        return torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, ::2]
    return torch.randn(rows, columns, generator=generator).to(dtype)


def test_it_is_the_interpreter() -> None:
    assert gpu.is_interpreted()
    assert gpu.is_reachable(torch.ones(1))
    with kernels(False):
        assert not gpu.is_reachable(torch.ones(1))


@layouts
@dtypes
@shapes
def test_project(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    """R and the squared norms of rows in one pass, in float32."""
    num_rows, num_columns, rank = shape
    grad, basis = drawn(num_rows, num_columns, layout, dtype), drawn(num_columns, rank, seed=1)
    assert gpu.takes_projection(grad, basis)
    low, norms_sq = subspace.project_with_norms(grad, basis)
    assert norms_sq is not None
    assert low.dtype == norms_sq.dtype == torch.float32
    assert relative_error(low, grad.double() @ basis.to(dtype).double()) < 1e-6
    assert relative_error(norms_sq, grad.double().square().sum(1, keepdim=True)) < 1e-6


@pytest.mark.parametrize(("rest", "layout"), [(None, "rows"), ("column", "columns"), ("number", "every second")])
@dtypes
@shapes
def test_update(shape: tuple[int, int, int], dtype: torch.dtype, layout: str, rest: str | None) -> None:
    """W = keep W + scale (X Q^T + factor G), rounded once."""
    num_rows, num_columns, rank = shape
    weight, grad = (drawn(num_rows, num_columns, layout, dtype, seed=seed) for seed in (0, 1))
    low, basis = drawn(num_rows, rank, seed=2), drawn(num_columns, rank, seed=3)
    factor = None if rest is None else drawn(num_rows if rest == "column" else 1, 1, seed=4)
    wanted = 0.9 * weight.double() - 0.1 * low.to(dtype).double() @ basis.to(dtype).double().t()
    if factor is not None:
        wanted -= 0.1 * factor.double() * grad.double()
    assert gpu.takes_update(weight, low, basis, None if rest is None else grad)
    lowrank.add_lifted_(weight, low, basis, scale=-0.1, keep=0.9, rest_MN=None if rest is None else grad, factor=factor)
    off = (weight.double() - wanted).abs()
    assert (off <= DTYPES[dtype] * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(value: float) -> None:
    grad, weight = drawn(40, 24), drawn(40, 24, seed=1)
    grad[5, 3] = value
    low, norms_sq = gpu.project(grad, drawn(24, 4, seed=2))
    assert (~torch.isfinite(low).all(1)).nonzero().flatten().tolist() == [5]
    assert (~torch.isfinite(norms_sq)).nonzero()[:, 0].tolist() == [5]
    ones = torch.ones(40, 1)
    gpu.update_(weight, drawn(40, 4), drawn(24, 4), scale=1.0, keep=1.0, rest_MN=grad, factor=ones)
    assert (~torch.isfinite(weight)).nonzero().tolist() == [[5, 3]]


@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (70, 30)], ids=str)
def test_direction(shape: tuple[int, int]) -> None:
    """Adam's moments and direction over three steps, as eager torch has them."""
    ours, theirs = ([torch.zeros(shape), torch.zeros(shape)] for _ in range(2))
    for number in range(3):
        low = drawn(*shape, seed=number)
        assert gpu.takes_direction(low, *ours)
        found = adam.adam_direction_(ours[0], ours[1], low, betas=(0.9, 0.999), eps=1e-6)
        with kernels(False):
            wanted = adam.adam_direction_(theirs[0], theirs[1], low, betas=(0.9, 0.999), eps=1e-6)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", [0.0, 3.0, 8.0, math.inf, math.nan])
@pytest.mark.parametrize("previous", [0.0, 4.0, math.nan])
@pytest.mark.parametrize("floor", [0.0, 1.0, 4.0])
def test_limiter(norm: float, previous: float, floor: float) -> None:
    """The same factor and memory as eager torch, on every line of the truth table."""
    memories = [torch.tensor(previous) for _ in range(2)]
    assert gpu.takes_limit(torch.tensor(norm), memories[0])
    found = lowrank.limit_growth_(torch.tensor(norm), memories[0], gamma=1.1, floor=floor)
    with kernels(False):
        wanted = lowrank.limit_growth_(torch.tensor(norm), memories[1], gamma=1.1, floor=floor)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    torch.testing.assert_close(*memories, equal_nan=True)


@pytest.mark.parametrize("cls", [FiraAdamW, GaLoreAdamW, ApolloAdamW])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)], ids=str)
def test_a_run_is_the_same_to_rounding(cls: type[torch.optim.Optimizer], shape: tuple[int, int]) -> None:
    """Six steps with a refresh and weight decay, with and without kernels."""
    weights = []
    for on in (True, False):
        weight = torch.nn.Parameter(make_weight(shape).float())
        groups = [{"params": [weight], "rank": 4, "update_proj_gap": 3}]
        optimizer = cls(groups, lr=1e-2, weight_decay=0.1, basis="power")  # type: ignore[call-arg]
        with kernels(on):
            for grad in make_gradients(shape, 6):
                weight.grad = grad.float()
                optimizer.step()
        weights.append(weight.detach())
    assert relative_error(weights[0], weights[1].double()) < 1e-6


def test_what_the_kernels_are_not_for() -> None:
    grad = drawn(40, 24)
    assert not gpu.takes_projection(grad.double(), drawn(24, 4))
    assert not gpu.takes_projection(drawn(40, 600), drawn(600, gpu.LARGEST_RANK + 1))
    assert not gpu.takes_projection(drawn(0, 24), drawn(24, 4))
    assert not gpu.takes_update(grad, drawn(40, 4), drawn(24, 4), grad.bfloat16())
    assert not gpu.takes_direction(drawn(24, 40).t(), grad, grad)
    assert not gpu.takes_direction(drawn(0, 4), drawn(0, 4), drawn(0, 4))
    assert not gpu.takes_limit(torch.tensor(1.0).double(), torch.tensor(1.0))
