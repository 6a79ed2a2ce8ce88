"""Which runs are wanted next: for each label its grid of rates, then further seeds at the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fullrank.compare.variants import Spec, Variant
from fullrank.report.comparison import best_rate

ScoredSteps = Mapping[int, float]
"""Validation loss by optimizer step."""
EARLIEST = 1 / 3
"""Share of a run before which it is never hopeless: a larger rate may be behind until the schedule falls."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    outcome: str
    """finished, stopped, diverged or failed."""
    score: float | None = None
    """Its metric, if it finished and was scored."""


def wanted(
    variants: Sequence[Variant], seeds: Sequence[int], ended: Mapping[Spec, Ended], *, greater_is_better: bool
) -> list[Spec]:
    """The runs that have not ended, in the order in which to start them.

    Every label's first rate comes before any label's second. What depends on runs that have not ended, an
    extension of a grid or a further seed, is not among them yet.
    """
    found: list[tuple[int, Spec]] = []
    for variant in variants:
        rates = grid(variant, seeds[0], ended, greater_is_better=greater_is_better)
        first = [Spec(variant.label, rate, seeds[0]) for rate in rates]
        found += [(place, spec) for place, spec in enumerate(first) if spec not in ended]
        best = best_of(first, ended, greater_is_better=greater_is_better)
        if all(spec in ended for spec in first) and best is not None:
            again = [Spec(variant.label, best, seed) for seed in seeds[1:]]
            found += [(len(rates) + place, spec) for place, spec in enumerate(again) if spec not in ended]
    return [spec for _, spec in sorted(found, key=lambda pair: pair[0])]


def grid(variant: Variant, seed: int, ended: Mapping[Spec, Ended], *, greater_is_better: bool) -> tuple[float, ...]:
    """The rates of a label so far: those of its grid, and beyond its ends as long as the best one lies there."""
    rates = variant.rates
    for _ in range(variant.max_extensions):
        specs = [Spec(variant.label, rate, seed) for rate in rates]
        best = best_of(specs, ended, greater_is_better=greater_is_better)
        if best is None or not all(spec in ended for spec in specs) or best not in (min(rates), max(rates)):
            break
        rates = (*rates, float(f"{best / 2 if best == min(rates) else best * 2:.6g}"))
    return rates


def best_of(specs: Sequence[Spec], ended: Mapping[Spec, Ended], *, greater_is_better: bool) -> float | None:
    """The rate with the best score among runs of one label and seed, or None where no run has one."""
    scores = {spec.lr: found.score for spec in specs if (found := ended.get(spec)) and found.score is not None}
    return best_rate(scores, greater_is_better=greater_is_better)


def is_hopeless(
    losses: ScoredSteps, finished: Sequence[ScoredSteps], *, margin: float
) -> tuple[int, float, float] | None:
    """Whether a run lies by more than ``margin`` above the best that a finished run of its label had at the same step.

    A finished run was scored at its last step, which says how long the runs are.

    Returns:
        The step, the run's validation loss and the best one there; None as long as there is hope.
    """
    last = max((step for curve in finished for step in curve), default=0)
    for step, loss in losses.items():
        others = [curve[step] for curve in finished if step in curve]
        if step >= EARLIEST * last and others and loss > min(others) + margin:
            return step, loss, min(others)
    return None
