"""What is suggested fits once it is done, and what is called the largest is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from fullrank.errors import ConfigError
from fullrank.plan import Planner, Setting
from fullrank.plan.advice import LARGEST_BATCH, Suggestion, _applied, _raised, _search, largest, suggestions
from fullrank.plan.changes import changes, divisors, smaller
from fullrank.plan.network import make_network
from fullrank.plan.options import Budget
from fullrank.plan.spread import Spread
from fullrank.plan.table import _said
from fullrank.train.config import ModelConfig
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


def test_a_rank_that_is_made_smaller_stays_as_large_as_it_can(planner: Planner) -> None:
    """Halving alone would come to less."""
    asked = setting("galore", network(2), batch_size=1, length=8).using(rank=48)
    half = smaller("rank", 24, asked)
    eight = replace(half, number=None, what="8-bit", apply=lambda one: one.using(state_dtype="8bit"))
    usable = peak(planner, asked.using(rank=29, state_dtype="8bit"))
    kept, raised = _raised(planner, asked, [eight, half], usable)
    value = _applied(asked, [kept, raised]).work.options.rank
    assert kept is eight
    assert raised.is_largest
    assert raised.what == f"rank {value}"
    assert 29 <= value < 48
    assert peak(planner, asked.using(rank=value, state_dtype="8bit")) <= usable
    assert peak(planner, asked.using(rank=value + 1, state_dtype="8bit")) > usable
    said = _said(Suggestion(raised, 0, 0, asked), Budget(usable, 0), is_first=True)
    assert "the largest that fits with the rest" in said


def test_a_smaller_batch_divides_the_one_that_was_asked_for() -> None:
    """So that the same number of sequences makes a step."""
    assert [divisors(size) for size in (12, 7, 1)] == [[6, 4, 3, 2, 1], [1], []]


def test_a_batch_is_made_no_smaller_than_it_has_to_be(planner: Planner) -> None:
    asked = setting("full", network(2), batch_size=12, length=64)
    within = smaller("batch", 4, asked).apply(asked)
    found = _raised(planner, asked, [smaller("batch", 1, asked)], peak(planner, within))
    assert [one.what for one in found] == ["batches of 4, accumulated"]
    assert _applied(asked, found) == within


def test_what_makes_a_step_stays_and_comes_out_even() -> None:
    asked = setting("full", network(2), batch_size=6)
    given = replace(asked, total=12)
    half = smaller("batch", 3, asked)
    assert half.how == "--trainer.per_device_train_batch_size 3 --trainer.gradient_accumulation_steps 2"
    assert smaller("batch", 1, half.apply(asked)).how.endswith("_batch_size 1 --trainer.gradient_accumulation_steps 6")
    assert smaller("batch", 3, given).how == "--trainer.per_device_train_batch_size 3"
    over = {name: [one for one in changes(of) if "fsdp2" in one.what] for name, of in (("any", asked), ("12", given))}
    assert over["any"]
    assert not over["12"]  # 8 x 6 are more
    with pytest.raises(ConfigError, match="12 sequences of a step cannot be divided by 8 processes with 6"):
        Planner().usage(replace(given, spread=Spread(8, "fsdp2")))
    eight = replace(smaller("batch", 1, given).apply(given), total=8)
    (spread_over,) = [one for one in changes(eight) if "fsdp2" in one.what]
    assert not spread_over.apply(eight).work.accumulates


class Told(Planner):
    """Knows peaks by a rule: with checkpointing eight GPUs need a smaller rank as well, and without they do not."""

    def usage(self, setting: Setting) -> Any:
        spread, work = setting.spread.gpus > 1, setting.work
        return SimpleNamespace(peak=100 - 50 * spread + 15 * (spread and work.checkpointing and work.options.rank > 8))


def test_what_only_a_dropped_change_needed_is_dropped_too() -> None:
    found = suggestions(Told(), setting("fira"), 60)
    assert [one.change.what for one in found] == ["fsdp2 over 8 GPUs"]


def test_a_trained_base_may_be_kept_as_codes(planner: Planner, tmp_path: Path) -> None:
    """Of fewer bits each time, where what trains stands beside the weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=64, **sizes).save_pretrained(tmp_path)
    trained = make_network(ModelConfig(name=str(tmp_path), dtype="float32"), vocab_size=None, sequence_length=8)
    for method in ("lora", "sift"):
        now = setting(method, trained, length=8, batch_size=1)
        peaks = [peak(planner, now)]
        for bits in ("an 8-bit base", "a 4-bit base"):
            (change,) = [one for one in changes(now) if one.what == bits]
            now = change.apply(now)
            peaks.append(peak(planner, now))
        assert peaks == sorted(peaks, reverse=True)
        assert not [one for one in changes(now) if "-bit base" in one.what]
    fixed = ("fira", trained, {}), ("sift", trained, {"reselect_every": 2}), ("lora", network(), {})
    for method, of, options in fixed:  # the last one has nothing trained in it
        assert not [one for one in changes(setting(method, of, options=options)) if "-bit base" in one.what]


def test_what_fits_needs_no_change(planner: Planner) -> None:
    asked = setting("fira")
    assert suggestions(planner, asked, peak(planner, asked)) == []


@pytest.mark.slow
def test_nothing_makes_it_fit(planner: Planner) -> None:
    asked = setting("fira", network(2, length=8), batch_size=1, length=8)
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
