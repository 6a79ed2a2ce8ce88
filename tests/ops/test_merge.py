"""The product of two factors, rounding at random, and the numbers that factors start with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fullrank.ops import merge, rounding

HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of a type that is at most a value, and the smallest that is at least it."""
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    towards = math.inf if nearest.double().item() < value else -math.inf
    other = torch.nextafter(nearest, torch.tensor(towards, dtype=dtype))
    low, high = sorted((nearest.double().item(), other.double().item()))
    assert low < value < high
    return low, high


# The product.


@pytest.mark.parametrize("tensor_scale", [False, True])
@pytest.mark.parametrize(
    ("dtype", "summed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_product_is_formed_in_float32_at_least(dtype: torch.dtype, summed: torch.dtype, tensor_scale: bool) -> None:
    b, a = drawn(7, 3).to(dtype), drawn(3, 11, seed=1).to(dtype)
    scale = torch.tensor(0.375) if tensor_scale else 0.375
    found = merge.product(b, a, scale)
    assert found.dtype == summed
    wanted = 0.375 * b.double() @ a.double()
    tolerance = 1e-14 if summed == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


# Rounding at random.


@pytest.mark.parametrize("share", [0.5, 0.1, 0.03, 0.93])
@pytest.mark.parametrize("near", [1.0, 0.02, -0.02, 3e-4, -1.7])
@halves
def test_only_the_two_neighbours_appear_and_the_mean_is_the_value(
    dtype: torch.dtype, near: float, share: float
) -> None:
    """A value a given share of the way up comes out up as often as that, within five deviations."""
    number = 20_000
    at = torch.tensor(near).to(dtype)
    low, high = sorted((at.item(), torch.nextafter(at, torch.tensor(math.inf, dtype=dtype)).item()))
    value = torch.tensor(low + share * (high - low), dtype=torch.float32)
    exact = (value.double().item() - low) / (high - low)
    found = rounding.round_stochastic(value.expand(number), dtype, seeded())
    assert found.dtype == dtype
    assert set(found.tolist()) == {low, high}
    deviation = math.sqrt(exact * (1 - exact) / number)
    assert abs((found == high).double().mean().item() - exact) < 5 * deviation


@halves
def test_the_mean_over_many_roundings_is_the_value(dtype: torch.dtype) -> None:
    """Entry by entry on values of a weight's size, which are all different and in the type's normal range."""
    values = 0.02 * drawn(1000).float()
    values = values[values.abs() > torch.finfo(torch.float16).smallest_normal]
    generator, number = seeded(), 2000
    total = torch.zeros(values.shape, dtype=torch.float64)
    for _ in range(number):
        total += rounding.round_stochastic(values, dtype, generator).double()
    gap = torch.tensor([high - low for low, high in (neighbours(value, dtype) for value in values.tolist())])
    error = (total / number - values.double()) / (gap / 2 / math.sqrt(number))
    assert error.abs().max() < 5.5
    assert abs(error.mean().item()) < 4 / math.sqrt(values.numel())


@halves
def test_a_value_that_the_type_holds_stays(dtype: torch.dtype) -> None:
    values = torch.cat([(0.02 * drawn(5000)).to(dtype).float(), torch.tensor([0.0, 1.0, -2.0])])
    assert torch.equal(rounding.round_stochastic(values, dtype, seeded()).float(), values)


@halves
def test_an_update_below_half_a_step_arrives_on_average(dtype: torch.dtype) -> None:
    """What the rounding is for: to nearest, none of it would."""
    weight = torch.full((50_000,), 0.02).to(dtype).float()
    low, high = neighbours(0.02 * (1 + 1e-5), dtype)
    update = 0.03 * (high - low)
    assert torch.equal((weight + update).to(dtype).float(), weight)
    arrived = (rounding.round_stochastic(weight + update, dtype, seeded()).double() - weight.double()).mean().item()
    assert arrived == pytest.approx(update, rel=0.15)


@halves
def test_what_is_not_finite_is_kept(dtype: torch.dtype) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).repeat(500)
    found = rounding.round_stochastic(values, dtype, seeded()).float()
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


def test_float16_below_its_normal_range_stays_between_its_neighbours() -> None:
    units = torch.linspace(0.1, 40.0, 400)
    found = rounding.round_stochastic(units * 2.0**-24, torch.float16, seeded()).double() * 2.0**24
    assert torch.equal(found, found.round())
    assert ((found - units).abs() < 1).all()


@halves
def test_rounding_follows_its_generator_alone(dtype: torch.dtype) -> None:
    values = drawn(300).float()
    torch.manual_seed(1)
    first = rounding.round_stochastic(values, dtype, seeded(3))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(rounding.round_stochastic(values, dtype, seeded(3)), first)
    assert not torch.equal(rounding.round_stochastic(values, dtype, seeded(4)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@halves
def test_values_are_not_changed_and_their_shape_and_kind_do_not_matter(dtype: torch.dtype) -> None:
    values = drawn(6, 8)
    before = values.clone()
    found = rounding.round_stochastic(values, dtype, seeded())
    assert torch.equal(values, before)
    assert torch.equal(rounding.round_stochastic(values.float(), dtype, seeded()), found)
    turned = rounding.round_stochastic(values.t(), dtype, seeded())
    assert turned.shape == (8, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_longer_types_are_left_alone(dtype: torch.dtype) -> None:
    values, generator = drawn(100).to(dtype), seeded()
    before = generator.get_state()
    assert torch.equal(rounding.round_stochastic(values, dtype, generator), values)
    assert torch.equal(generator.get_state(), before)


# What factors start with.


@pytest.mark.parametrize("shape", [(4, 50), (64, 64), (8, 3, 5, 5)], ids=str)
def test_the_start_is_that_of_lora(shape: tuple[int, ...]) -> None:
    """torch's kaiming_uniform_ with a = sqrt(5), from the same random numbers."""
    found = torch.empty(shape)
    merge.kaiming_uniform_(found, seeded(7))
    torch.manual_seed(7)
    wanted = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_start_fills_its_bounds_evenly() -> None:
    matrix = torch.empty(32, 400)
    merge.kaiming_uniform_(matrix, seeded())
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < matrix.abs().max() <= bound
    quantiles = (matrix.flatten().sort().values / bound + 1) / 2
    even = torch.arange(1, matrix.numel() + 1) / matrix.numel()
    assert (quantiles - even).abs().max() < 1.63 / math.sqrt(matrix.numel())  # Kolmogorov and Smirnov, 1%


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_start_is_the_same_numbers_in_every_type(dtype: torch.dtype) -> None:
    single, other = torch.empty(5, 30), torch.empty(5, 30, dtype=dtype)
    torch.manual_seed(1)
    merge.kaiming_uniform_(single, seeded(2))
    torch.manual_seed(5)
    merge.kaiming_uniform_(other, seeded(2))
    assert torch.equal(other, single.to(dtype))
    merge.kaiming_uniform_(other, seeded(3))
    assert not torch.equal(other, single.to(dtype))


@pytest.mark.parametrize("place", ["transposed", "part"])
def test_the_start_goes_into_any_layout(place: str) -> None:
    """As contiguous: the numbers belong to the entries, not to the memory."""
    whole = torch.zeros(30, 5).t() if place == "transposed" else torch.zeros(5, 60)[:, ::2]
    plain = torch.empty(5, 30)
    merge.kaiming_uniform_(whole, seeded())
    merge.kaiming_uniform_(plain, seeded())
    assert torch.equal(whole, plain)
