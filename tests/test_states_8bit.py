"""Resets of states that are not plain numbers: bitsandbytes' 8-bit codes, torchao's subclasses, bases, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import FiraAdamW, GaLoreAdamW, UnsupportedError
from fullrank.factors import Reset, reset_states
from tests.problems import make_gradients, make_weight

SHAPES: dict[str, tuple[int, ...]] = {"8-bit": (64, 80), "8-bit, a short last block": (67, 71), "32-bit": (30, 20)}
"""bitsandbytes keeps the moments of at least 4096 entries in 8 bits, a scale for every 256."""
CLASSES = ["AdamW8bit", "AdamW", "Adam8bit", "PagedAdamW8bit", "Lion8bit"]
each_class = pytest.mark.parametrize("name", CLASSES)
each_shape = pytest.mark.parametrize("shape", SHAPES)
pytestmark = [pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")]


def bitsandbytes(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, lr=1e-2)
    return optimizer


def feed(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Step through the gradients of these numbers, whose entries are of many sizes."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) ** 3
        optimizer.step()


def trained(name: str, shape: str) -> tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter]:
    """An optimizer after some steps, one parameter of the shape and one beside it."""
    weight, other = (nn.Parameter(make_weight(SHAPES[shape], seed=i, dtype=torch.float32)) for i in range(2))
    optimizer = bitsandbytes(name, [weight, other])
    feed(optimizer, [weight, other], range(6))
    return optimizer, weight, other


def decoded(state: dict[str, Any], number: int) -> Tensor:
    """A moment as numbers, by bitsandbytes itself."""
    functional = pytest.importorskip("bitsandbytes.functional")
    moment: Tensor = state[f"state{number}"]
    if moment.dtype == torch.float32:
        return moment.clone()
    quant_state = functional.QuantState(
        absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256, dtype=torch.float32
    )
    return functional.dequantize_blockwise(moment, quant_state).view(moment.shape)


def moments(state: dict[str, Any]) -> list[int]:
    return [number for number in (1, 2) if f"state{number}" in state]


@each_shape
@each_class
def test_zero_goes_on_as_a_fresh_optimizer(name: str, shape: str) -> None:
    """Bit for bit: the state is dropped, and the optimizer makes a new one."""
    optimizer, weight, other = trained(name, shape)
    beside = copy.deepcopy(optimizer.state[other])
    num_moments = len(moments(optimizer.state[weight]))
    found = reset_states(optimizer, [weight], how="zero")
    assert not optimizer.state[weight]
    assert found == Reset(num_moments * weight.numel(), num_moments * weight.numel())
    for key, value in beside.items():
        now = optimizer.state[other][key]
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value
    twin = nn.Parameter(weight.detach().clone())
    fresh = bitsandbytes(name, [twin])
    optimizer.param_groups[0]["params"] = [weight]
    for step in range(20, 26):
        feed(optimizer, [weight], range(step, step + 1))
        feed(fresh, [twin], range(step, step + 1))
        assert torch.equal(weight, twin)
    for number in moments(fresh.state[twin]):
        assert torch.equal(decoded(optimizer.state[weight], number), decoded(fresh.state[twin], number))


@pytest.mark.parametrize("how", ["magnitude", "random"])
@each_shape
@each_class
def test_pruning_keeps_the_codes_of_what_stays(name: str, shape: str, how: str) -> None:
    """The same entries of both moments become zero; codes, scales and counter of the rest stay bit for bit."""
    optimizer, weight, other = trained(name, shape)
    before, beside = copy.deepcopy(optimizer.state[weight]), copy.deepcopy(optimizer.state[other])
    numbers = {number: decoded(before, number) for number in moments(before)}
    generator = torch.Generator().manual_seed(1)
    found = reset_states(optimizer, [weight], how=how, ratio=0.8, generator=generator)
    state, total = optimizer.state[weight], weight.numel()
    num_dropped = round(0.8 * total)
    if how == "magnitude":
        # Codes tie: of equal ones any may go, so the bound between kept and dropped is shared.
        dropped = (decoded(state, 1) == 0).flatten()
        sizes = numbers[1].abs().flatten()
        assert sizes[dropped].max() <= sizes[~dropped].min()
    else:
        dropped = torch.zeros(total, dtype=torch.bool)
        dropped[torch.randperm(total, generator=torch.Generator().manual_seed(1))[:num_dropped]] = True
    assert int((dropped | (numbers[1].flatten() == 0)).sum()) >= num_dropped
    for number, values in numbers.items():
        after = decoded(state, number).flatten()
        assert not after[dropped].any()
        assert torch.equal(after[~dropped], values.flatten()[~dropped])
        key = f"state{number}"
        assert torch.equal(state[key].flatten()[~dropped], before[key].flatten()[~dropped])
    for key, value in before.items():
        if not key.startswith("state"):
            assert torch.equal(state[key], value) if torch.is_tensor(value) else state[key] == value, key
    for key, value in beside.items():
        now = optimizer.state[other][key]
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value, key
    zeros = sum(int((decoded(state, number) == 0).sum()) for number in numbers)
    assert found == Reset(zeros, len(numbers) * total)
    assert len(numbers) * num_dropped <= zeros < len(numbers) * (num_dropped + 0.02 * total)


def test_the_step_after_pruning_is_bounded() -> None:
    """3.17 rates, and a little for the rounding of both moments: no entry has a first moment and no second one."""
    for seed in range(3):
        optimizer, weight, _ = trained("AdamW8bit", "8-bit")
        optimizer.param_groups[0]["weight_decay"] = 0.0
        feed(optimizer, [weight], range(6, 60))
        reset_states(optimizer, [weight], how="random", ratio=0.9, generator=torch.Generator().manual_seed(seed))
        before = weight.detach().clone()
        feed(optimizer, [weight], range(60, 61))
        assert (weight.detach() - before).abs().max() / 1e-2 < 3.5


def test_torchao_states_start_again() -> None:
    """A subclass cannot be zeroed in place: its state is dropped, and the next step makes a new one."""
    low_bit = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(make_weight((64, 80), dtype=torch.float32))
    optimizer = low_bit.AdamW8bit([weight], lr=1e-2)
    feed(optimizer, [weight], range(3))
    assert reset_states(optimizer, [weight], how="zero").percent == 100.0
    twin = nn.Parameter(weight.detach().clone())
    fresh = low_bit.AdamW8bit([twin], lr=1e-2)
    feed(optimizer, [weight], range(5, 8))
    feed(fresh, [twin], range(5, 8))
    assert torch.equal(weight, twin)


class Wrapped(Tensor):
    """A tensor subclass such as quantized states are."""


@pytest.mark.parametrize("how", ["zero", "magnitude", "random"])
def test_states_of_a_subclass(how: str) -> None:
    """Dropped whole by zero, which is a fresh start; refused by what would have to see its entries."""
    weight = nn.Parameter(make_weight((6, 5), dtype=torch.float32))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, foreach=False)
    feed(optimizer, [weight], range(3))
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][key] = optimizer.state[weight][key].as_subclass(Wrapped)
    if how != "zero":
        with pytest.raises(UnsupportedError, match=rf"reset '{how}' needs a first moment.*plain tensors.*\(6, 5\)"):
            reset_states(optimizer, [weight], how=how, generator=torch.Generator())
        return
    assert reset_states(optimizer, [weight], how=how) == Reset(60, 60)
    twin = nn.Parameter(weight.detach().clone())
    fresh = torch.optim.AdamW([twin], lr=1e-2, foreach=False)
    feed(optimizer, [weight], range(5, 8))
    feed(fresh, [twin], range(5, 8))
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("how", ["magnitude", "random"])
@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW])
def test_a_basis_is_not_a_moment_even_of_its_shape(kind: Callable[..., torch.optim.Optimizer], how: str) -> None:
    """For a square matrix the basis and the low-rank moments have one shape."""
    weight = nn.Parameter(make_weight((14, 14), dtype=torch.float32))
    optimizer = kind([{"params": [weight], "rank": 3}], lr=1e-2)
    weight.grad = make_gradients((14, 14), 1, dtype=torch.float32)[0]
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    assert before["basis"].shape == before["exp_avg"].shape
    found = reset_states(optimizer, [weight], how=how, ratio=0.5, generator=torch.Generator())
    assert found == Reset(2 * 21, 2 * 42)
    for key in before.keys() - {"exp_avg", "exp_avg_sq"}:
        assert torch.equal(optimizer.state[weight][key], before[key]), key


def test_an_accelerated_optimizer_is_seen_through() -> None:
    """accelerate's wrapper shares the state of the optimizer in it."""
    wrapper = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    assert accelerator is not None
    weight = nn.Parameter(make_weight((6, 5), dtype=torch.float32))
    inner = torch.optim.AdamW([weight], lr=1e-2)
    optimizer = wrapper(inner)
    feed(optimizer, [weight], range(3))
    assert reset_states(optimizer, [weight], how="magnitude", ratio=0.5) == Reset(30, 60)
    assert int((inner.state[weight]["exp_avg"] == 0).sum()) == 15
    assert reset_states(optimizer, [weight], how="zero") == Reset(60, 60)
    assert not inner.state[weight]["exp_avg"].any()
    assert inner.state[weight]["step"] == 0
