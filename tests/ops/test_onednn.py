"""Products by oneDNN: the numbers of torch's own, for every layout, and only where they are faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullrank import FiraAdamW
from fullrank.ops import lowrank
from fullrank.ops.kernels import kernels, kernels_on, onednn
from tests.problems import make_gradients, make_weight, relative_error

has_op = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
SIZES = [(1, 1, 1), (17, 64, 3), (65, 7, 130), (300, 130, 16)]
LAYOUTS = ["rows", "columns", "every second"]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size, on any CPU."""
    monkeypatch.setattr(onednn, "LEAST_WORK", 0)
    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)


def drawn(rows: int, columns: int, layout: str = "rows", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).t()
    if layout == "every second":
        return torch.randn(rows, 2 * columns, generator=generator)[:, ::2]
    return torch.randn(rows, columns, generator=generator)


@has_op
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_products(first: str, second: str, sizes: tuple[int, int, int]) -> None:
    """A B as in float64, row by row, whatever the layouts."""
    m, k, n = sizes
    a, b = drawn(m, k, first), drawn(k, n, second, seed=1)
    assert onednn.takes(a, b)
    found = onednn.matmul(a, b)
    assert found.is_contiguous()
    assert relative_error(found, a.double() @ b.double()) < 1e-6


@has_op
@pytest.mark.parametrize("block", [1, 64, 1 << 20])
@pytest.mark.parametrize("rest", [None, "column", "number"])
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_updates(layout: str, keep: float, rest: str | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """W = keep W + scale (X Q^T + factor G) in place, in blocks of any size, through a transposed view too."""
    monkeypatch.setattr(onednn, "BLOCK", block)
    monkeypatch.setattr(onednn, "LEAST_ROWS", 7)
    weight, grad = drawn(40, 24, layout), drawn(40, 24, layout, seed=1)
    low, basis = drawn(40, 5, seed=2), drawn(24, 5, seed=3)
    factor = None if rest is None else drawn(40 if rest == "column" else 1, 1, seed=4)
    wanted = keep * weight.double() - 0.1 * low.double() @ basis.double().t()
    if factor is not None:
        wanted -= 0.1 * factor.double() * grad.double()
    lowrank.add_lifted_(
        weight, low, basis, scale=-0.1, keep=keep, rest_MN=None if rest is None else grad, factor=factor
    )
    assert relative_error(weight, wanted) < 1e-6


@has_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    a, b = drawn(64, 32), drawn(32, 8, seed=1)
    a[5, 3] = value
    broken = ~torch.isfinite(onednn.matmul(a, b)).all(1)
    assert broken.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)],
)
def test_other_types_are_left_to_torch(first: torch.dtype, second: torch.dtype) -> None:
    a, b = drawn(8, 8).to(first), drawn(8, 8).to(second)
    assert not onednn.takes(a, b)
    assert torch.equal(onednn.matmul(a, b), a @ b)


def test_the_switch_and_the_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    a = drawn(8, 8)
    with kernels(False):
        assert not kernels_on()
        assert not onednn.takes(a, a)
        with kernels(True):
            assert onednn.takes(a, a)
        assert not kernels_on()
    monkeypatch.setattr(onednn, "LEAST_WORK", 8**3 + 1)
    assert not onednn.takes(a, a)
    assert onednn.takes(a, drawn(8, 9))


@has_op
@pytest.mark.parametrize("basis", ["power", "svd"])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_a_run_is_the_same_to_rounding(shape: tuple[int, int], basis: str) -> None:
    """Ten steps of Fira with two refreshes, with and without."""
    weights: list[Tensor] = []
    for on in (True, False):
        weight = torch.nn.Parameter(make_weight(shape).float())
        optimizer = FiraAdamW([{"params": [weight], "rank": 8, "update_proj_gap": 5}], lr=1e-2, basis=basis)
        with kernels(on):
            for grad in make_gradients(shape, 10):
                weight.grad = grad.float()
                optimizer.step()
        weights.append(weight.detach())
    # power iteration on gradients without leading directions amplifies rounding
    assert relative_error(weights[0], weights[1].double()) < (1e-4 if basis == "power" else 1e-6)
