"""SIFT under loss scaling: a batch that overflows neither trains nor chooses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import SIFT
from tests.reference.sift import largest, mask_of

granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])


class Chain(nn.Module):
    """Two layers; the gradient that reaches the first is multiplied by ``factor``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        hidden.register_hook(lambda grad: grad * self.factor)
        loss: Tensor = self.second(hidden).square().mean()
        return loss


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are equal, bit for bit."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def inputs_of(number: int) -> Tensor:
    """A numbered batch."""
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(number))


def scaled(model: Chain, factors: list[float], **options: Any) -> tuple[SIFT, list[float]]:
    """Train with a scaler, one factor a batch; the scale after each step."""
    sift = SIFT(model, 0.1, ["weight"], **options)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for number, factor in enumerate(factors):
        model.factor = factor
        scaler.scale(model(inputs_of(number))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return sift, scales


@pytest.mark.parametrize("overflow", [math.inf, math.nan])
@granularities
def test_overflow_in_the_first_batch(granularity: str, overflow: float) -> None:
    """The step is skipped and the scale halved; what overflowed is chosen from the next, finite gradient."""
    options = {"granularity": granularity, "block_size": 4}
    model = Chain()
    sift, scales = scaled(model, [overflow, 1.0], **options)
    assert scales == [512.0, 512.0]
    plain = Chain()
    loss = plain(inputs_of(1))
    expected = largest(torch.autograd.grad(loss, plain.first.weight)[0], 0.1, granularity, 4)
    assert sift.sparse_mapping["first.weight"].idx.tolist() == expected
    assert all(values.isfinite().all() for values in model.state_dict().values())
    moved = model.first.weight != plain.first.weight
    assert torch.equal(moved, mask_of((8, 8), expected, granularity, 4))


def test_an_overflow_alone_changes_nothing() -> None:
    """After a skipped step all weights have their bits, and nothing is chosen below it."""
    model = Chain()
    sift, scales = scaled(model, [math.inf])
    assert scales == [512.0]
    assert same(model, Chain())
    assert sift.sparse_mapping["first.weight"].idx is None


def test_an_overflow_later_is_skipped_too() -> None:
    """As if the batch had not been there: the scale is a power of two, so no rounding differs."""
    model, other = Chain(), Chain()
    scaled(model, [1.0, math.inf, 1.0])
    sift = SIFT(other, 0.1, ["weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    for number in (0, 2):
        other(inputs_of(number)).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, other)


@pytest.mark.parametrize("selection_batches", [1, 2])
@pytest.mark.parametrize("factors", [(math.inf, 1.0), (1.0, math.inf)])
def test_an_overflow_in_one_of_several_batches(factors: tuple[float, float], selection_batches: int) -> None:
    """One bad micro-batch spoils the step; the next one chooses and trains as if there had been none."""
    runs = []
    for bad_step in (True, False):
        model = Chain()
        sift = SIFT(model, 0.1, ["first.weight"], selection_batches=selection_batches)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(0 if bad_step else 1, 2):
            for number in range(2):
                model.factor = factors[number] if step == 0 else 1.0
                scaler.scale(model(inputs_of(2 * step + number))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step == 0:
                assert same(model, Chain())
                assert scaler.get_scale() == 512.0
        runs.append((model, sift.sparse_mapping["first.weight"].idx.tolist()))
    chosen_before = factors[0] == 1.0 and selection_batches == 1
    assert chosen_before or runs[0][1] == runs[1][1]
    assert chosen_before or same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], Chain())


def test_an_overflow_in_one_weight_under_scope_model() -> None:
    """The gradients of the skipped step, finite or not, are not used later."""
    model, plain = Chain(), Chain()
    sift = SIFT(model, 0.1, ["weight"], scope="model")
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, factor in enumerate((math.inf, 1.0)):
        optimizer.zero_grad()
        model.factor = factor
        scaler.scale(model(inputs_of(number))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    plain(inputs_of(1)).backward()
    for name, values in sift.sparse_mapping.items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(values.grad, dense.flatten()[values.idx.long()])
