"""Which runs a comparison wants next: a plain function of what has ended."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from fullrank.analysis.table import finite
from fullrank.compare.search import Ended, best_of, grid, is_hopeless, wanted
from fullrank.compare.variants import Spec, Variant
from fullrank.report.comparison import compare_runs
from fullrank.report.runs import Run
from fullrank.train.resolve import resolve
from tests.report.invented import invented_run

CONFIG = resolve("quickstart")
smaller = partial(wanted, greater_is_better=False)


def variant(label: str, *rates: float, extensions: int = 0) -> Variant:
    return Variant(label, CONFIG, rates, extensions)


def finished(score: float) -> Ended:
    return Ended("finished", score)


def test_first_rates_come_first() -> None:
    variants = [variant("full", 2.0, 1.0), variant("fira", 4.0, 3.0)]
    assert smaller(variants, [7], {}) == [
        Spec("full", 2.0, 7),
        Spec("fira", 4.0, 7),
        Spec("full", 1.0, 7),
        Spec("fira", 3.0, 7),
    ]


def test_further_seeds_only_at_the_best_rate_and_only_at_the_end_of_the_grid() -> None:
    one = [variant("full", 1.0, 2.0)]
    ended = {Spec("full", 1.0, 7): finished(20.0)}
    assert smaller(one, [7, 8, 9], ended) == [Spec("full", 2.0, 7)]
    ended[Spec("full", 2.0, 7)] = finished(10.0)
    assert smaller(one, [7, 8, 9], ended) == [Spec("full", 2.0, 8), Spec("full", 2.0, 9)]
    assert wanted(one, [7, 8], ended, greater_is_better=True) == [Spec("full", 1.0, 8)]
    ended |= {Spec("full", 2.0, seed): finished(11.0) for seed in (8, 9)}
    assert smaller(one, [7, 8, 9], ended) == []


def test_a_label_without_a_score_gets_no_further_seeds() -> None:
    ended = {Spec("full", 1.0, 7): Ended("diverged"), Spec("full", 2.0, 7): Ended("failed")}
    assert smaller([variant("full", 1.0, 2.0)], [7, 8], ended) == []


@pytest.mark.parametrize(
    ("scores", "added"),
    [
        ({1.0: 10.0, 2.0: 20.0, 4.0: 30.0}, 0.5),
        ({1.0: 30.0, 2.0: 20.0, 4.0: 10.0}, 8.0),
        ({1.0: 30.0, 2.0: 10.0, 4.0: 20.0}, None),
        ({1.0: 30.0, 2.0: 10.0, 4.0: None}, None),  # what diverged bounds the best on its side
        ({1.0: None, 2.0: None, 4.0: None}, None),
    ],
)
def test_grid_goes_on_beyond_the_end_where_the_best_lies(
    scores: dict[float, float | None], added: float | None
) -> None:
    ended = {
        Spec("full", rate, 7): Ended("diverged") if score is None else finished(score) for rate, score in scores.items()
    }
    rates = grid(variant("full", *scores, extensions=2), 7, ended, greater_is_better=False)
    assert rates == (*scores, *([] if added is None else [added]))


def test_grid_is_extended_so_often_and_no_more() -> None:
    one = variant("full", 1.0, 2.0, extensions=2)
    ended = {Spec("full", 2.0**power, 7): finished(-float(power)) for power in range(6)}
    assert grid(one, 7, ended, greater_is_better=False) == (1.0, 2.0, 4.0, 8.0)
    assert grid(one, 7, {Spec("full", 2.0, 7): finished(1.0)}, greater_is_better=False) == (1.0, 2.0)
    assert smaller([one], [7], {}) == [Spec("full", 1.0, 7), Spec("full", 2.0, 7)]


def test_best_rate_needs_a_score() -> None:
    specs = [Spec("full", 1.0, 7), Spec("full", 2.0, 7)]
    assert best_of(specs, {}, greater_is_better=False) is None
    assert best_of(specs, {specs[1]: finished(3.0)}, greater_is_better=False) == 2.0


def many(number: int) -> list[Run]:
    return [invented_run("full", lr=1.0 + place) for place in range(number)]


def scored(run: Run, score: float) -> dict[str, Any]:
    assert run.result is not None
    return finite({**run.result, "perplexity": score, "scores": {"perplexity": score}})


@pytest.mark.parametrize("scores", [(50.0, 50.0, 60.0), (50.0, math.nan, 50.0), (50.0, math.inf, 60.0)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_of_equal_scores_the_lowest_rate_and_never_one_that_is_no_number(
    scores: tuple[float, ...], order: tuple[int, ...]
) -> None:
    """The report chooses by the same rule: what the search repeats with further seeds is what the table shows."""
    specs = [Spec("full", 1.0 + place, 7) for place in order]
    ended = {Spec("full", 1.0 + place, 7): finished(score) for place, score in enumerate(scores)}
    assert best_of(specs, ended, greater_is_better=False) == 1.0
    runs = [replace(run, result=scored(run, score)) for run, score in zip(many(3), scores, strict=True)]
    assert compare_runs([runs[place] for place in order], title="ties").rows[0].lr == 1.0


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({10: 9.0, 20: 9.0}, None),  # before a third of the run
        ({40: 5.4}, None),  # within the margin
        ({40: 5.6}, (40, 5.6, 5.0)),  # of the best at this step, which another run holds than at the end
        ({50: 9.0}, None),  # a step at which no finished run was scored
    ],
)
def test_hopeless_is_told_against_the_best_at_the_same_step(
    losses: dict[int, float], expected: tuple[int, float, float] | None
) -> None:
    curves = [{10: 7.0, 20: 6.0, 40: 5.0, 100: 4.5}, {10: 7.0, 20: 6.0, 40: 5.2, 100: 4.0}]
    assert is_hopeless(losses, curves, margin=0.5) == expected
    assert is_hopeless(losses, [], margin=0.5) is None


def test_report_and_search_choose_by_the_same_seed() -> None:
    """The seed of the grid is the one that most rates ran with, in whatever order the seeds were given."""
    runs = [
        replace(run, result=scored(run, score))
        for run, score in (
            (invented_run("full", lr=1.0, seed=42), 50.0),
            (invented_run("full", lr=2.0, seed=42), 48.0),
            (invented_run("full", lr=2.0, seed=1), 52.0),
        )
    ]
    (row,) = compare_runs(runs, title="seeds").rows
    assert (row.lr, row.scores, row.grid) == (2.0, {1: 52.0, 42: 48.0}, {"1": 50.0, "2": 48.0})
    ended = {Spec("full", run.lr, run.seed): finished(run.score or 0.0) for run in runs}
    assert smaller([variant("full", 1.0, 2.0)], [42, 1], ended) == []
