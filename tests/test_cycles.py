"""Where restarts fall and what the learning rate does there: against the authors' formula, and by counting."""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from fullrank import ConfigError
from fullrank.factors import Cycles, cosine, jagged_cosine
from tests.reference.relora import cosine_restarts

GRID = [
    (every, rise, warmup, adjust)
    for every, rise, warmup, adjust in itertools.product((2, 5, 8), (0, 1, 2, 4, 7), (0, 1, 3, 8), (0, 1, 3, 7))
    if rise < every and adjust < every and warmup + adjust <= every
]


def falling(step: int) -> float:
    """A schedule that gives away the step that it was asked for."""
    return 1.0 / (step + 2.0)


def expected(cycles: Cycles, base: Callable[[int], float], num_steps: int) -> list[float]:
    """The multiplier of each update, by walking through a run with its restarts."""
    rates, risen = [], math.inf
    for step in range(num_steps):
        inside = step - cycles.warm_start_steps
        if inside < 0:
            rates.append(base(step) * cycles.warm_start_lr_ratio)
            continue
        is_restart = cycles.restart_every is not None and inside > 0 and inside % cycles.restart_every == 0
        if is_restart or (inside == 0 and cycles.warm_start_steps):
            risen = 0
        if risen < cycles.restart_warmup_steps:
            rates.append(risen / cycles.restart_warmup_steps * base(step - risen + cycles.restart_warmup_steps))
        else:
            rates.append(base(step))
        risen += 1
    return rates


# The paper's schedule.


@pytest.mark.parametrize("min_ratio", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("total", [16, 40, 41, 43])
def test_jagged_cosine_is_the_authors(total: int, min_ratio: float) -> None:
    """At every step of every setting, with the first R steps longer where the start is in mid-cycle."""
    assert len(GRID) > 60
    for (every, rise, warmup, adjust), step in itertools.product(GRID, range(total + 1)):
        found = jagged_cosine(
            step,
            num_training_steps=total,
            restart_every=every,
            restart_warmup_steps=rise,
            warmup_steps=warmup,
            min_lr_ratio=min_ratio,
            adjust_step=adjust,
        )
        wanted = cosine_restarts(
            step,
            first_warmup=warmup,
            restart_warmup=rise,
            cycle=every,
            total=total,
            min_ratio=min_ratio,
            adjust=adjust,
        )
        assert found == pytest.approx(wanted, rel=0, abs=1e-12), (every, rise, warmup, adjust, step)


def test_jagged_cosine_by_hand() -> None:
    """Ten steps to a cycle, two to rise: numbers that can be checked with a pencil."""
    options = {"num_training_steps": 20, "restart_every": 10, "restart_warmup_steps": 2, "min_lr_ratio": 0.0}
    halfway = 0.5 * (1 + math.cos(math.pi * 12 / 20))
    found = [jagged_cosine(step, **options) for step in (0, 5, 9, 10, 11, 12, 20)]
    assert found[0] == 1.0
    assert found[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert found[2] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 20)))
    assert found[3:] == pytest.approx([0.0, halfway / 2, halfway, 0.0])


def test_cosine_goes_from_zero_to_its_floor() -> None:
    found = [cosine(step, num_training_steps=12, warmup_steps=2, min_lr_ratio=0.2) for step in (0, 1, 2, 7, 12)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])


# Restarts and the rate follow one number.


@pytest.mark.parametrize("warm_start", [0, 1, 6])
def test_restarts_fall_where_the_rate_is_zero(warm_start: int) -> None:
    """And nowhere else, the end of a warm start apart; ``num_restarts`` is their number before the last step."""
    total = 45
    for every, rise, warmup, adjust in GRID:
        if not rise or (warm_start and (adjust or warmup > warm_start)):
            continue
        cycles = Cycles(restart_every=every, restart_warmup_steps=rise, warm_start_steps=warm_start, adjust_step=adjust)
        assert not cycles.problems()
        schedule = cycles.schedule(falling, warmup, total)
        restarts = [step for step in range(1, total + 1) if cycles.begins_after(step)]
        zeros = [step for step in range(1, total + 1) if schedule(step) == 0.0]
        assert zeros == sorted({*restarts, *([warm_start] if warm_start else [])})
        assert restarts[0] == warm_start + every + (every - adjust if adjust else 0)
        assert all(later - earlier == every for earlier, later in itertools.pairwise(restarts))
        assert [step for step in range(1, total + 1) if cycles.factor(step) == 0.0] == zeros
        assert cycles.num_restarts(total) == len([step for step in restarts if step < total])


def test_no_cycles_no_restarts() -> None:
    cycles = Cycles(restart_every=None)
    assert not any(cycles.begins_after(step) for step in range(1000))
    assert cycles.num_restarts(1000) == 0
    assert [cycles.schedule(falling, 0, 50)(step) for step in range(50)] == [falling(step) for step in range(50)]
    assert {cycles.factor(step) for step in range(50)} == {1.0}


@pytest.mark.parametrize("warm_start", [0, 5])
@pytest.mark.parametrize("rise", [0, 1, 3])
@pytest.mark.parametrize("every", [4, 9, None])
def test_any_schedule_becomes_jagged(every: int | None, rise: int, warm_start: int) -> None:
    """While it rises it aims at where the schedule is at the end of the rise; elsewhere it is the schedule."""
    table = [random.Random(0).random() for _ in range(80)]
    for base in (falling, table.__getitem__, lambda _: 1.0):
        cycles = Cycles(
            restart_every=every, restart_warmup_steps=rise, warm_start_steps=warm_start, warm_start_lr_ratio=0.25
        )
        schedule = cycles.schedule(base, 4 if warm_start else 0, 40)
        assert [schedule(step) for step in range(40)] == expected(cycles, base, 40)


def test_the_warm_start_comes_first() -> None:
    """Its own rate, then a rise, then the schedule as it is; restarts are counted from its end."""
    cycles = Cycles(restart_every=6, restart_warmup_steps=3, warm_start_steps=4, warm_start_lr_ratio=0.5)
    assert [step for step in range(30) if cycles.begins_after(step)] == [10, 16, 22, 28]
    schedule = cycles.schedule(lambda step: step / 2 if step < 2 else 1.0, 2, 30)
    third = pytest.approx(1 / 3)
    two = pytest.approx(2 / 3)
    assert [schedule(step) for step in range(14)] == [0, 0.25, 0.5, 0.5, 0, third, two, 1, 1, 1, 0, third, two, 1]
    assert [cycles.factor(step) for step in range(8)] == [0.5, 0.5, 0.5, 0.5, 0, third, two, 1]


def test_without_a_rise_the_rate_goes_on_after_the_warm_start() -> None:
    cycles = Cycles(restart_every=6, warm_start_steps=4, warm_start_lr_ratio=0.5)
    schedule = cycles.schedule(lambda _: 1.0, 0, 30)
    assert [schedule(step) for step in range(12)] == [0.5] * 4 + [1.0] * 8


# What does not fit is refused.


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"restart_every": 0}, ["restart_every must be a whole number of optimizer steps, at least 1, got 0"]),
        ({"restart_every": 2.5}, ["restart_every must be a whole number of optimizer steps, at least 1, got 2.5"]),
        ({"restart_every": True}, ["restart_every must be a whole number of optimizer steps, at least 1, got True"]),
        ({"warm_start_steps": -1}, ["warm_start_steps must be a whole number of optimizer steps, at least 0, got -1"]),
        ({"restart_warmup_steps": "3"}, ["restart_warmup_steps must be a whole number", "at least 0, got '3'"]),
        ({"adjust_step": 1.0}, ["adjust_step must be a whole number of optimizer steps, at least 0, got 1.0"]),
        ({"adjust_step": False}, ["adjust_step must be a whole number of optimizer steps, at least 0, got False"]),
        ({"restart_every": -3, "warm_start_steps": None}, ["restart_every must", "got -3", "warm_start_steps must"]),
        ({"restart_warmup_steps": 10}, ["restart_warmup_steps must be below restart_every (10), got 10", "Shorten"]),
        ({"adjust_step": 10}, ["adjust_step must be below restart_every (10)", "got 10", "mid-cycle"]),
        ({"adjust_step": 3, "warm_start_steps": 5}, ["goes without warm_start_steps (5), got 3"]),
        ({"adjust_step": 3, "restart_every": None}, ["adjust_step must be below restart_every (None)", "got 3"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_problems_name_value_and_bound(options: dict[str, Any], messages: list[str]) -> None:
    found = Cycles(**{"restart_every": 10} | options).problems()
    assert found
    for message in messages:
        assert message in " ".join(found)


def test_every_problem_is_named_at_once() -> None:
    found = Cycles(restart_every=5, restart_warmup_steps=5, adjust_step=7).problems()
    assert [problem.split()[0] for problem in found] == ["restart_warmup_steps", "adjust_step"]


@pytest.mark.parametrize(
    "options",
    [
        {"restart_every": 1},
        {"restart_every": 10, "restart_warmup_steps": 9, "adjust_step": 9},
        {"restart_every": None, "restart_warmup_steps": 500, "warm_start_steps": 3},
        {"restart_every": 10, "warm_start_steps": 100},
    ],
    ids=str,
)
def test_what_is_at_its_bound_passes(options: dict[str, Any]) -> None:
    assert Cycles(**options).problems() == []


@pytest.mark.parametrize(
    ("options", "warmup", "first"),
    [
        ({"restart_every": 10}, 11, 10),
        ({"restart_every": 10}, -1, 10),
        ({"restart_every": 10, "adjust_step": 4}, 7, 6),
        ({"restart_every": 10, "warm_start_steps": 3}, 4, 3),
        ({"restart_every": None, "warm_start_steps": 3}, 4, 3),
        ({"restart_every": None}, 41, 40),
    ],
    ids=str,
)
def test_a_warm_up_past_the_first_fall_is_refused(options: dict[str, Any], warmup: int, first: int) -> None:
    cycles = Cycles(**options)
    with pytest.raises(ConfigError, match=rf"warmup_steps must be .* at most {first},.* got {warmup}\. Shorten it"):
        cycles.schedule(falling, warmup, 40)
    cycles.schedule(falling, first, 40)


@pytest.mark.parametrize("steps", [40, 41])
def test_a_warm_start_as_long_as_the_run_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"below the 40 optimizer steps of the run, got {steps}.*never train"):
        Cycles(restart_every=10, warm_start_steps=steps).schedule(falling, 0, 40)
    Cycles(restart_every=10, warm_start_steps=39).schedule(falling, 0, 40)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"restart_every": 40}, True),
        ({"restart_every": 39}, False),
        ({"restart_every": 35, "warm_start_steps": 5}, True),
        ({"restart_every": 34, "warm_start_steps": 5}, False),
        ({"restart_every": None}, False),
    ],
    ids=str,
)
def test_a_run_without_a_restart_is_worth_a_warning(
    options: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Cycles(**options).schedule(falling, 0, 40)
    assert ("no restart comes before its end, so this is LoRA. Lower restart_every" in caplog.text) == warns
