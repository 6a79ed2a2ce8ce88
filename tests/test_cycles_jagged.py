"""Other people's schedulers made jagged: their own rates, times the rise, and they do not notice."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fullrank.factors import Cycles, Jagged

STEPS = 30
CYCLES = {
    "cycles": Cycles(restart_every=7, restart_warmup_steps=3),
    "warm start": Cycles(restart_every=8, restart_warmup_steps=2, warm_start_steps=5, warm_start_lr_ratio=0.5),
}
"""Restarts after 7, 14, 21, 28 and after 13, 21, 29 steps."""
FACTORS = {
    "cycles": [1.0] * 7 + [0, 1 / 3, 2 / 3, 1, 1, 1, 1] * 3 + [0, 1 / 3],
    "warm start": [0.5] * 5 + [0, 0.5, 1, 1, 1, 1, 1, 1] * 3 + [0],
}


def plateau(step: int) -> float:
    """A metric that stands still now and then."""
    return max(0.2, 1.0 - 0.1 * (step // 4))


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """A warm-up, then a decay."""
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, 0.93)], milestones=[4])


Make = Callable[[torch.optim.Optimizer], Any]
MAKERS: dict[str, Make] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.7),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=1e-4),
    "SequentialLR": sequential,
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=[0.3, 0.03], total_steps=STEPS + 1),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda n: 1 / (n + 1), lambda n: 0.9**n]),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
}
makers = pytest.mark.parametrize("kind", MAKERS)


def two_groups() -> torch.optim.Optimizer:
    """An optimizer with two rates; its step does nothing, for want of gradients."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.02}])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def advance(kind: str, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[list[float]]:
    """The rates of these updates."""
    seen = []
    for step in steps:
        seen.append(rates(optimizer))
        optimizer.step()
        scheduler.step(*([plateau(step)] if kind == "ReduceLROnPlateau" else []))
    return seen


@pytest.mark.parametrize("cycles", CYCLES)
@makers
def test_rates_are_the_schedulers_times_the_rise(kind: str, cycles: str) -> None:
    """Both groups; what else a scheduler sets (momentum) and its own state are as without cycles."""
    alone, ours = two_groups(), two_groups()
    plain, inner = MAKERS[kind](alone), MAKERS[kind](ours)
    jagged = Jagged(inner, CYCLES[cycles])
    wanted, found = [], []
    for step in range(STEPS):
        wanted += advance(kind, alone, plain, range(step, step + 1))
        found += advance(kind, ours, jagged, range(step, step + 1))
        assert jagged.get_last_lr() == rates(ours)
        for group, other in zip(ours.param_groups, alone.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k not in ("lr", "params")} == {
                k: v for k, v in other.items() if k not in ("lr", "params")
            }
    assert len({tuple(row) for row in wanted}) > 3, "the scheduler alone must move"
    for row, own, factor in zip(found, wanted, FACTORS[cycles], strict=True):
        assert row == pytest.approx([rate * factor for rate in own], rel=1e-12, abs=0)
    assert comparable(inner.state_dict()) == comparable(plain.state_dict())


def comparable(state: Any) -> Any:
    """A scheduler's state without the functions in it."""
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items() if not callable(value)}
    return [comparable(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize("saved_after", [7, 9, 12], ids=["restart", "rise", "cycle"])
@makers
def test_it_goes_on_from_its_state(kind: str, saved_after: int) -> None:
    """Saved where the rate is zero, in mid-rise, and after; read without trusting the file."""
    cycles, optimizer = CYCLES["cycles"], two_groups()
    jagged = Jagged(MAKERS[kind](optimizer), cycles)
    advance(kind, optimizer, jagged, range(saved_after))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": jagged.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = two_groups()
    again = Jagged(MAKERS[kind](other), cycles)
    other.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["scheduler"])
    assert again.get_last_lr() == rates(other) == rates(optimizer)
    steps = range(saved_after, STEPS)
    assert advance(kind, other, again, steps) == advance(kind, optimizer, jagged, steps)


def test_the_order_of_loading_does_not_matter() -> None:
    """The scheduler's state first, then the optimizer's, which holds the scaled rate."""
    optimizer = two_groups()
    jagged = Jagged(MAKERS["CosineAnnealingLR"](optimizer), CYCLES["cycles"])
    advance("", optimizer, jagged, range(9))
    other = two_groups()
    again = Jagged(MAKERS["CosineAnnealingLR"](other), CYCLES["cycles"])
    again.load_state_dict(copy.deepcopy(jagged.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps = range(9, STEPS)
    assert advance("", other, again, steps) == advance("", optimizer, jagged, steps)


def test_a_saved_state_is_not_changed_by_training_on() -> None:
    optimizer = two_groups()
    jagged = Jagged(MAKERS["StepLR"](optimizer), CYCLES["cycles"])
    advance("", optimizer, jagged, range(9))
    saved = jagged.state_dict()
    before = copy.deepcopy(saved)
    advance("", optimizer, jagged, range(9, 20))
    assert (saved["rates"], saved["last_epoch"]) == (before["rates"], before["last_epoch"])


def test_it_does_not_hide_a_missing_optimizer_step() -> None:
    """torch's own warning about the order of calls comes through, once, and only where it is due."""
    optimizer = two_groups()
    jagged = Jagged(MAKERS["StepLR"](optimizer), CYCLES["cycles"])
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\). before .optimizer.step\(\)"):
        jagged.step()


def test_it_is_a_scheduler_to_those_who_ask() -> None:
    """accelerate and the Trainer look at the class."""
    assert isinstance(Jagged(MAKERS["StepLR"](two_groups()), CYCLES["cycles"]), lr_scheduler.LRScheduler)
