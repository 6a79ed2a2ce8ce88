"""Weights of half precision rounded at random: small steps arrive on average, and the same ones every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import AdamW, ApolloAdamW, FiraAdamW, GaLoreAdamW
from fullrank.ops.rounding import round_stochastic
from fullrank.optimizer import MethodOptimizer
from fullrank.stepping import in_full, rounding_seed

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPE = (128, 192)


def walk(kind: type[MethodOptimizer], dtype: torch.dtype, steps: int, **options: Any) -> Tensor:
    """A weight of ones after steps of gradients of one sign."""
    weight = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    groups: list[dict[str, Any]] = [{"params": [weight]}]
    if kind is not AdamW:
        project = options.pop("project", True)
        groups[0] |= {"rank": 16} if project else {}
        groups += [] if project else [{"params": [nn.Parameter(torch.ones(8, 8, dtype=dtype))], "rank": 2}]
        options |= {"limiter_gamma": None} if kind is FiraAdamW else {}
    optimizer = kind(groups, **{"lr": 1e-4, "weight_decay": 0.0} | options)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double()


@HALVES
@pytest.mark.parametrize("state_dtype", [None, "float32", "8bit"])
def test_small_steps_of_adamw_arrive_on_average(state_dtype: str | None, dtype: torch.dtype) -> None:
    """20 steps of 1e-4 from 1.0, whose next numbers below are 0.004 (0.0005) away: nearest never leaves it."""
    nearest = walk(AdamW, dtype, 20, state_dtype=state_dtype)
    assert (nearest == 1.0).all() or dtype == torch.float16
    found = walk(AdamW, dtype, 20, state_dtype=state_dtype, weight_rounding="stochastic")
    assert found.mean().item() == pytest.approx(1.0 - 20 * 1e-4, abs=1e-4)
    assert found.unique().numel() > 1


@pytest.mark.parametrize("project", [True, False], ids=["projected", "plain"])
@pytest.mark.parametrize("kind", [FiraAdamW, GaLoreAdamW], ids=lambda kind: kind.__name__)
def test_small_steps_of_projected_methods_arrive_on_average(kind: type[MethodOptimizer], project: bool) -> None:
    """A gradient of rank one lies in the subspace, so that its step is the one of float32 weights."""
    exact = walk(kind, torch.float32, 20, project=project)
    nearest = walk(kind, torch.bfloat16, 20, project=project)
    found = walk(kind, torch.bfloat16, 20, project=project, weight_rounding="stochastic")
    moved = 1.0 - exact.mean().item()
    assert moved > 1e-4
    assert (nearest == 1.0).all()
    assert 1.0 - found.mean().item() == pytest.approx(moved, rel=0.1)


def test_the_same_numbers_every_time_and_others_at_every_step_and_place() -> None:
    first = walk(FiraAdamW, torch.bfloat16, 5, weight_rounding="stochastic", seed=3, lr=1e-2)
    assert torch.equal(walk(FiraAdamW, torch.bfloat16, 5, weight_rounding="stochastic", seed=3, lr=1e-2), first)
    assert not torch.equal(walk(FiraAdamW, torch.bfloat16, 5, weight_rounding="stochastic", seed=4, lr=1e-2), first)
    weight, group = torch.ones(1, dtype=torch.bfloat16), {"seed": 0, "weight_rounding": "stochastic"}
    seeds = [rounding_seed(weight, group, seat, step) for seat in ((0, 0), (0, 1), (1, 0)) for step in (1, 2)]
    assert len(set(seeds)) == 6
    assert rounding_seed(weight.float(), group, (0, 0), 1) is None


@HALVES
def test_the_mean_is_the_float32_result(dtype: torch.dtype) -> None:
    weight = torch.full((40_000,), 0.7, dtype=dtype)
    start = weight.double().mean().item()
    with in_full(weight, seed=(1, 2)) as full:
        full.add_(1e-5)
    assert full.dtype == torch.float32
    assert weight.dtype == dtype
    spacing = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    assert weight.double().mean().item() - start == pytest.approx(1e-5, abs=4 * (1e-5 * spacing / 40_000) ** 0.5)


def test_float32_is_stepped_in_place() -> None:
    weight = torch.ones(3)
    with in_full(weight, seed=None) as full:
        assert full is weight


def test_a_transposed_or_channels_last_weight_is_rounded_in_place() -> None:
    """Its strides stay, and every entry may move."""
    for weight in (
        nn.Parameter(torch.ones(24, 40, dtype=torch.bfloat16).t()),
        nn.Parameter(torch.ones(16, 8, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last)),
    ):
        strides, place = weight.stride(), weight.data_ptr()
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-3, weight_rounding="stochastic")
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert (weight.stride(), weight.data_ptr()) == (strides, place)
        assert 0.01 < (weight != 1.0).float().mean() < 1.0 or (weight != 1.0).all()


@pytest.mark.parametrize("kind", [FiraAdamW, ApolloAdamW, GaLoreAdamW])
@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_small_gradients_of_float16_weights_are_stepped_as_in_float32(kind: Any, size: float) -> None:
    """What scales such a gradient to a step is beyond 65504, the largest number of float16."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator).mul(0.1).half()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizers = [kind([{"params": [weight], "rank": 8}], lr=1e-2) for weight in (half, full)]
    for _ in range(3):
        grad = torch.randn(64, 128, generator=generator).mul(size).half()
        half.grad, full.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert (half.float() - full).abs().max() < 2e-3


def test_rounding_at_random_stays_within_the_type() -> None:
    """What nearest keeps at the largest number does not become infinite; what nearest makes infinite does."""
    values = torch.tensor([65504.0 + 8.0, -65504.0 - 8.0, 1e6, -1e6]).repeat(1000, 1)
    found = round_stochastic(values, torch.float16, torch.Generator().manual_seed(0)).float()
    assert torch.equal(found[:, :2].abs(), torch.full((1000, 2), 65504.0))
    assert torch.equal(found[:, 2:], torch.tensor([torch.inf, -torch.inf]).repeat(1000, 1))
