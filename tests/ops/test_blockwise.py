"""8-bit codes: how close they are, what they do with zeros, outliers and what is not finite, and where rows are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullrank.ops import blockwise
from fullrank.ops.blockwise import block_of, decode, encode, scales_shape, zero_code

SHAPES = [(40, 256), (7, 100), (5, 64), (300, 8), (3, 700), (2, 3, 128)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def back(values: Tensor, *, squared: bool, flat: bool = False) -> Tensor:
    """Encoded and decoded again."""
    return decode(*encode(values, squared=squared, flat=flat), squared=squared)


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("squared", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_come_back_within_a_percent(shape: tuple[int, ...], squared: bool, flat: bool) -> None:
    values = drawn(*shape).square() if squared else drawn(*shape)
    codes, scales = encode(values, squared=squared, flat=flat)
    assert (codes.dtype, codes.shape) == (torch.uint8, values.shape)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, scales_shape(shape, flat=flat))
    found = decode(codes, scales, squared=squared)
    assert found.dtype == torch.float32
    assert (found - values).norm() < (0.025 if squared else 0.015) * values.norm()
    assert not squared or found.min() >= 0.0


@pytest.mark.parametrize(("columns", "block"), [(768, 256), (128, 128), (100, 128), (64, 64), (8, 64), (300, 64)])
def test_a_block_is_the_one_with_the_least_padding(columns: int, block: int) -> None:
    assert block_of(columns) == block


@pytest.mark.parametrize("squared", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("columns", [256, 100, 8])
def test_rows_are_coded_apart(columns: int, squared: bool) -> None:
    """Cut along the rows, codes and scales are those of the parts: so processes may share them in any number."""
    values = drawn(11, columns).square()
    codes, scales = encode(values, squared=squared)
    for rows in (slice(0, 4), slice(4, 11), slice(11, 11)):
        part = encode(values[rows], squared=squared)
        assert torch.equal(part[0], codes[rows])
        assert torch.equal(part[1], scales[rows])
        assert torch.equal(decode(*part, squared=squared), decode(codes, scales, squared=squared)[rows])


@pytest.mark.parametrize("squared", [False, True], ids=["first", "second"])
def test_zeros_are_zeros(squared: bool) -> None:
    """Encoded ones, a fresh state of zeros, and the code of zero under any scale."""
    assert not back(torch.zeros(3, 100), squared=squared).any()
    fresh = decode(torch.zeros(3, 100, dtype=torch.uint8), torch.zeros(3, 1), squared=squared)
    assert not fresh.any()
    codes = torch.full((3, 100), zero_code(squared=squared), dtype=torch.uint8)
    assert not decode(codes, torch.full((3, 1), 7.0), squared=squared).any()


@pytest.mark.parametrize("squared", [False, True], ids=["first", "second"])
def test_an_outlier_stays_in_its_block(squared: bool) -> None:
    """It is exact, the other blocks do not see it, and beside it entries a thousand times smaller are not lost."""
    values = drawn(2, 512).square() + 0.1
    before = back(values, squared=squared)
    values[0, 3] = 1000.0
    found = back(values, squared=squared)
    assert found[0, 3] == pytest.approx(1000.0)
    assert torch.equal(found[0, 256:], before[0, 256:])
    assert torch.equal(found[1], before[1])
    assert (found[0, :256] > 0.0).all()


def test_a_second_moment_spans_ten_orders_of_magnitude() -> None:
    """Adam divides by its root: coded by itself, not by its root, whatever is below 1e-7 of the largest would be 0."""
    values = torch.logspace(0.0, -10.0, 256)[None]
    found = back(values, squared=True)
    assert ((found.sqrt() / values.sqrt()).log().abs() < 0.7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_block_nan(bad: float) -> None:
    values = drawn(2, 512)
    values[1, 300] = bad
    found = back(values, squared=False)
    assert found[1, 256:].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, :256].isfinite().all()


def test_nothing_is_nothing() -> None:
    assert back(torch.zeros(0, 256), squared=False).shape == (0, 256)
    assert back(torch.zeros(0), squared=True, flat=True).shape == (0,)


def test_a_block_of_large_numbers_is_finite() -> None:
    """Their sum is not."""
    values = torch.full((2, 64), 3e38)
    assert torch.isfinite(back(values, squared=False)).all()


def test_the_table_is_real_even_where_tensors_are_not() -> None:
    """A plan makes steps without content; what trains after it in the same process must not find its table."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    blockwise._table.cache_clear()
    with fake.FakeTensorMode():
        tables = [blockwise._table(squared, torch.device("cpu")) for squared in (False, True)]
    assert all(type(table) is Tensor and table.unique().numel() >= 255 for table in tables)
    values = drawn(4, 256)
    assert (back(values, squared=False) - values).norm() < 0.015 * values.norm()
