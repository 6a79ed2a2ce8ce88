"""Resets of ReLoRA on 8-bit moments of our optimizers: zeros are zeros, and what is kept stays bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fullrank import AdamW, GaLoreAdamW
from fullrank.factors import reset_states
from fullrank.moments import read
from fullrank.optimizer import MethodOptimizer

SHAPE = (64, 96)


def trained(kind: type[MethodOptimizer]) -> tuple[MethodOptimizer, list[nn.Parameter]]:
    weights = [nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    rank = {} if kind is AdamW else {"rank": 16}
    optimizer = kind([{"params": weights, **rank}], lr=1e-2, state_dtype="8bit")
    feed(optimizer, weights, range(5))
    return optimizer, weights


def feed(optimizer: MethodOptimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(10 * step + number)
            weight.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()


kinds = pytest.mark.parametrize("kind", [AdamW, GaLoreAdamW], ids=lambda kind: kind.__name__)


@kinds
def test_after_zero_it_goes_on_as_a_fresh_optimizer(kind: type[MethodOptimizer]) -> None:
    optimizer, weights = trained(kind)
    found = reset_states(optimizer, weights, how="zero")
    assert found.percent == 100.0
    fresh = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = kind([{"params": fresh, **({} if kind is AdamW else {"rank": 16})}], lr=1e-2, state_dtype="8bit")
    feed(optimizer, weights, range(20, 24))
    feed(other, fresh, range(20, 24))
    assert all(torch.equal(a, b) for a, b in zip(weights, fresh, strict=True))


@pytest.mark.parametrize("how", ["magnitude", "random"])
@kinds
def test_a_share_is_dropped_and_the_rest_stays(kind: type[MethodOptimizer], how: str) -> None:
    """At the same entries of both moments, the smallest first moments with magnitude."""
    optimizer, (first, second) = trained(kind)
    before, other = copy.deepcopy(optimizer.state[first]), copy.deepcopy(optimizer.state[second])
    found = reset_states(optimizer, [first], how=how, ratio=0.8, generator=torch.Generator().manual_seed(0))
    state = optimizer.state[first]
    was, now = read(before, "exp_avg"), read(state, "exp_avg")
    dropped = now == 0.0
    assert found.num_total == 2 * now.numel()
    assert int(dropped.sum()) == pytest.approx(0.8 * now.numel(), abs=0.01 * now.numel())
    assert found.percent == pytest.approx(80.0, abs=1.0)
    assert torch.equal(now[~dropped], was[~dropped])
    assert torch.equal(read(state, "exp_avg_sq")[~dropped], read(before, "exp_avg_sq")[~dropped])
    assert not read(state, "exp_avg_sq")[dropped & (was != 0.0)].any()
    if how == "magnitude":
        assert was[dropped].abs().max() <= was[~dropped].abs().min()
    assert all(torch.equal(value, optimizer.state[second][key]) for key, value in other.items())
    feed(optimizer, [first, second], range(5, 8))
    assert first.isfinite().all()
