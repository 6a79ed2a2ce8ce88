"""What is suggested fits once it is done, and what is called the largest is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fullrank.plan import Planner, Setting
from fullrank.plan.advice import LARGEST_BATCH, _search, largest, suggestions
from fullrank.plan.spread import Spread
from tests.plan.real import network, setting


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


def peak(planner: Planner, of: Setting) -> int:
    return planner.usage(of).peak


@pytest.mark.parametrize(
    ("method", "work", "share"),
    [
        ("fira", {"batch_size": 1}, 0.8),
        pytest.param("lora", {"batch_size": 1, "length": 64}, 0.75, marks=pytest.mark.slow),
    ],
    ids=["fira", "lora"],
)
def test_suggestions_do_what_they_promise(planner: Planner, method: str, work: dict[str, Any], share: float) -> None:
    asked = setting(method, **work)
    start = peak(planner, asked)
    usable = int(share * start)
    found = suggestions(planner, asked, usable)
    assert found
    now = asked
    for one in found:
        now = one.change.apply(now)
        assert Planner().usage(now).peak == one.together  # planned anew, nothing remembered
        assert peak(planner, one.change.apply(asked)) == start - one.saves
        assert now.work == one.setting.work
    assert found[-1].together <= usable
    assert [one.change.harm for one in found] == sorted(one.change.harm for one in found)
    for one in found:  # none is in vain
        left = asked
        for other in found:
            left = left if other is one else other.change.apply(left)
        assert peak(planner, left) > usable


def test_what_fits_needs_no_change(planner: Planner) -> None:
    asked = setting("fira")
    assert suggestions(planner, asked, peak(planner, asked)) == []


@pytest.mark.slow
def test_nothing_makes_it_fit(planner: Planner) -> None:
    asked = setting("fira")
    found = suggestions(planner, asked, 1000)
    assert not found or found[-1].together > 1000


@pytest.mark.parametrize(
    "need",
    [lambda n: 7 * n, lambda n: 50 + n * n // 40, lambda n: 900 + (n > 333), lambda n: None if n > 60 else n],
    ids=["line", "curve", "step", "refused"],
)
@pytest.mark.parametrize("start", [1, 64, 1000])
def test_the_search_finds_the_last_that_fits(need: Any, start: int) -> None:
    fits = [n for n in range(1, 1001) if need(n) is not None and need(n) <= 900]
    asked: list[int] = []

    def counted(number: int) -> Any:
        asked.append(number)
        return need(number)

    assert _search(counted, 900, 1000, start) == max(fits)
    assert len(asked) <= 24


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "sift", "lora"])
def test_one_more_does_not_fit(planner: Planner, method: str) -> None:
    asked = setting(method, batch_size=1, length=8)
    usable = int(1.08 * peak(planner, asked))
    for one in largest(planner, asked, usable):
        assert one.value is not None
        step = 1e-4 if one.name == "density" else 1
        changed = {
            "batch": lambda value: replace(asked, batch_size=round(value)),
            "rank": lambda value: asked.using(rank=round(value)),
            "density": lambda value: asked.using(density=value),
        }[one.name]
        assert peak(planner, changed(one.value)) <= usable
        if not one.bound:
            assert peak(planner, changed(one.value + step)) > usable


@pytest.mark.slow
def test_largest_knows_its_bounds(planner: Planner) -> None:
    asked = setting("galore")
    assert [one.value for one in largest(planner, asked, 1000)] == [None, None]
    found = {one.name: one for one in largest(planner, asked, 1 << 60)}
    assert (found["batch"].value, found["rank"].value) == (LARGEST_BATCH, 64)
    assert found["rank"].bound


def test_ddp_adds_buckets_and_partitioned_states_are_divided(planner: Planner) -> None:
    from fullrank.plan.formulas import trained_bytes

    alone = setting("galore")
    two = replace(alone, spread=Spread(2))
    assert peak(planner, two) == peak(planner, alone) + trained_bytes(alone.network, alone.work)
    divided = planner.usage(replace(two, work=two.using(partition_states=True).work))
    assert planner.usage(alone).states / 2 <= divided.states < 0.6 * planner.usage(alone).states


def test_fsdp_divides_and_gathers(planner: Planner) -> None:
    of = network(8)
    alone = planner.usage(setting("fira", of, batch_size=1, length=8))
    spread = planner.usage(replace(setting("fira", of, batch_size=1, length=8), spread=Spread(4, "fsdp2")))
    for part in ("weights", "states"):
        assert getattr(spread, part) == pytest.approx(getattr(alone, part) / 4, rel=0.05)
    in_pass = spread.weights + spread.gradients + spread.states + spread.activations
    assert in_pass < alone.peak
