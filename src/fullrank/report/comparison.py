"""Runs side by side: for each label its best learning rate, its score there, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from fullrank.analysis.table import finite
from fullrank.errors import ConfigError
from fullrank.report.notes import find_notes
from fullrank.report.runs import SMALLER_IS_BETTER, Run, run_from

FORMAT = 1
NO_SCORE = "no score"
"""How a finished run without validation stands in a grid."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one label at its best rate."""

    label: str
    method: str
    lr: float | None
    """Best rate by the score with the seed of the grid; None if no run of the label finished."""
    at_edge: bool
    """Whether nothing beyond the best rate was tried on one side: it is the lowest or the highest of several."""
    scores: dict[int, float]
    """Seed -> score at that rate."""
    score: float | None
    """Mean over seeds."""
    relative: float | None
    """Score / score of the baseline."""
    grid: dict[str, float | str]
    """Rate -> score with the first seed, or its outcome in a word."""
    weight_bytes: int | None
    gradient_bytes: int | None
    optimizer_state_bytes: int | None
    peak_memory_bytes: int | None
    """Measured of the whole process, or of the GPU; mean over seeds."""
    step_time_s: float | None
    """Median optimizer step; mean over seeds (seconds)."""
    tokens_per_s: float | None
    """Training tokens of a step / ``step_time_s``."""

    @property
    def model_memory_bytes(self) -> int | None:
        """Weights, gradients and optimizer state, as the papers count memory; None if one is not known."""
        parts = (self.weight_bytes, self.gradient_bytes, self.optimizer_state_bytes)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows; ``compare.json`` holds it."""

    title: str
    metric: str
    """perplexity, or a task's metric (``accuracy``)."""
    greater_is_better: bool
    baseline: str
    """Label that ``relative`` refers to."""
    rows: list[Row]
    """Best first; rows without a score last."""
    runs: list[Run]
    """All, of every seed and rate."""
    notes: list[str]
    """What a reader must know before believing the table: plain sentences."""

    def to_dict(self) -> dict[str, Any]:
        """The content of ``compare.json``: plain values, no number that JSON cannot hold."""
        content: dict[str, Any] = finite(asdict(self))
        for row in content["rows"]:
            row["scores"] = {str(seed): score for seed, score in row["scores"].items()}
        return {"format": FORMAT, **content}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Comparison:
        """The comparison that ``to_dict`` wrote.

        Raises:
            ConfigError: If something is missing or of another format.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConfigError(f"this is no compare.json of format {FORMAT}, the one this version reads. Give the runs.")
        try:
            runs = [run_from(run) for run in content["runs"]]
            rows = [
                Row(**{**row, "scores": {int(seed): score for seed, score in row["scores"].items()}})
                for row in content["rows"]
            ]
            plain = {name: content[name] for name in ("title", "metric", "greater_is_better", "baseline", "notes")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"compare.json is damaged ({type(error).__name__}: {error}). Give the runs.") from None
        return cls(rows=rows, runs=runs, **plain)

    def best_runs(self, label: str) -> list[Run]:
        """The runs of a label at its best rate that have ended with a result, by seed."""
        row = next(row for row in self.rows if row.label == label)
        return best_runs([run for run in self.runs if run.label == label], row.lr)


def compare_runs(runs: Sequence[Run], *, title: str) -> Comparison:
    """Compare runs by their label.

    Args:
        runs: Runs of one task, as ``fullrank.report.runs.read_run`` reads them.
        title: Title of the report.

    Raises:
        ConfigError: If there is no run, two are the same by label, rate and seed, or tasks or metrics differ.
    """
    if not runs:
        raise ConfigError("no run was given, so there is nothing to compare. Give at least one folder.")
    _refuse_unequal(runs)
    metric = next((run.metric for run in runs if run.metric is not None), "perplexity")
    greater = metric not in SMALLER_IS_BETTER
    labels = list(dict.fromkeys(run.label for run in runs))
    found = [_row([run for run in runs if run.label == label], greater=greater) for label in labels]
    baseline = _baseline(found)
    rows = [_relative(row, baseline) for row in found]
    rows.sort(key=lambda row: math.inf if row.score is None else -row.score if greater else row.score)
    return Comparison(
        title=title,
        metric=metric,
        greater_is_better=greater,
        baseline=baseline.label,
        rows=rows,
        runs=list(runs),
        notes=find_notes(rows, runs, baseline=baseline),
    )


def rate_key(lr: float) -> str:
    """A learning rate as it stands in a grid and in the name of a run's folder."""
    return f"{lr:g}"


def best_rate(scores: Mapping[float, float], *, greater_is_better: bool) -> float | None:
    """The rate with the best score, of several equal ones the lowest; None where there is no score."""
    known = {rate: -score if greater_is_better else score for rate, score in scores.items() if math.isfinite(score)}
    return min(known, key=lambda rate: (known[rate], rate)) if known else None


def first_at_rates(runs: Sequence[Run]) -> dict[str, Run]:
    """Rate -> the run of one label that speaks for it, lowest rate first.

    That is the one with the seed of the grid, which most rates ran with (the smallest of several), if it came to an
    end: further seeds run at the best rate alone.
    """
    rates = {seed: {rate_key(run.lr) for run in runs if run.seed == seed} for seed in {run.seed for run in runs}}
    of_grid = min(rates, key=lambda seed: (-len(rates[seed]), seed))
    found: dict[str, Run] = {}
    ordered = sorted(
        runs, key=lambda run: (run.lr, run.outcome in ("failed", "unfinished"), run.seed != of_grid, run.seed)
    )
    for run in ordered:
        found.setdefault(rate_key(run.lr), run)
    return found


def best_runs(runs: Sequence[Run], lr: float | None) -> list[Run]:
    """Those of one label's runs at a rate that have a result, by seed."""
    at_rate = [run for run in runs if lr is not None and rate_key(run.lr) == rate_key(lr) and run.result is not None]
    return sorted(at_rate, key=lambda run: run.seed)


def _refuse_unequal(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot stand in one table."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    if len(tasks) > 1:
        raise ConfigError(f"these runs are of different tasks: {', '.join(tasks)}. Compare each task by itself.")
    metrics = list(dict.fromkeys(run.metric for run in runs if run.metric is not None))
    if len(metrics) > 1:
        raise ConfigError(f"these runs have different metrics: {', '.join(metrics)}. Compare each metric by itself.")
    seen = set()
    for run in runs:
        key = (run.label, rate_key(run.lr), run.seed)
        if key in seen:
            raise ConfigError(
                f"two runs are called {run.label!r} with learning rate {run.lr:g} and seed {run.seed}. "
                "Leave one out, or name them apart: LABEL=FOLDER."
            )
        seen.add(key)


def _row(runs: list[Run], *, greater: bool) -> Row:
    """The line of one label; ``relative`` is still open."""
    first = first_at_rates(runs)
    scored = {run.lr: run.score for run in first.values() if run.score is not None}
    ended = [run for run in first.values() if run.result is not None]
    best = best_rate(scored, greater_is_better=greater)
    lr = best if best is not None else ended[0].lr if ended else None
    chosen = best_runs(runs, lr)
    scores = {run.seed: run.score for run in chosen if run.score is not None}
    results = [run.result for run in chosen if run.result is not None]
    times = [result["step_time_median_s"] for result in results if result.get("step_time_median_s")]
    step_time = fmean(times) if times else None
    tokens = [result["tokens"] / result["steps"] for result in results if result.get("tokens") and result.get("steps")]
    return Row(
        label=runs[0].label,
        method=runs[0].method,
        lr=lr,
        at_edge=best is not None and _is_edge(rate_key(best), first),
        scores=scores,
        score=fmean(scores.values()) if scores else None,
        relative=None,
        grid={key: _in_grid(run) for key, run in first.items()},
        weight_bytes=_first(results, "weight_bytes"),
        gradient_bytes=_first(results, "gradient_bytes"),
        optimizer_state_bytes=_first(results, "optimizer_state_bytes"),
        peak_memory_bytes=_mean_bytes(results, "peak_memory_bytes"),
        step_time_s=step_time,
        tokens_per_s=median(tokens) / step_time if tokens and step_time else None,
    )


def _is_edge(best: str, first: dict[str, Run]) -> bool:
    """Whether no rate on one side of the best one came to a verdict; a loss that diverged there is one."""
    tried = [key for key, run in first.items() if run.outcome not in ("failed", "unfinished")]
    return len(tried) > 1 and best in (tried[0], tried[-1])


def _in_grid(run: Run) -> float | str:
    if run.outcome != "finished":
        return run.outcome
    return NO_SCORE if run.score is None else run.score


def _first(results: Sequence[dict[str, Any]], name: str) -> int | None:
    """A count that is the same for all seeds."""
    return next((int(result[name]) for result in results if result.get(name) is not None), None)


def _mean_bytes(results: Sequence[dict[str, Any]], name: str) -> int | None:
    """A measured number of bytes, mean over seeds."""
    values = [result[name] for result in results if result.get(name) is not None]
    return round(fmean(values)) if values else None


def _baseline(rows: Sequence[Row]) -> Row:
    """The row that others are compared with: full-rank training if it has a score, else the first that has one."""
    scored = [row for row in rows if row.score is not None] or list(rows)
    full = [row for row in scored if row.label == "full"] or [row for row in scored if row.method == "full"]
    return (full or scored)[0]


def _relative(row: Row, baseline: Row) -> Row:
    known = row.score is not None and baseline.score is not None and baseline.score > 0
    share = row.score / baseline.score if known else None  # type: ignore[operator]
    return Row(**{**vars(row), "relative": share})
