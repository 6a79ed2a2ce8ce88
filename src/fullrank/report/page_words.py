"""What the page says in words: the facts under its title, the summary, and the figures beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fullrank.report.comparison import Comparison, Row, rate_key
from fullrank.report.page_tables import metric_name, score, share, size
from fullrank.report.table import AS_THEY_ARE


@dataclass(frozen=True)
class Card:
    """One figure of the summary."""

    name: str
    figure: str
    words: str


def facts(comparison: Comparison) -> dict[str, str]:
    """What was trained, on how much, how often."""
    runs = comparison.runs
    finished = [run.result for run in runs if run.result is not None]
    found = {
        "Task": _distinct(run.task for run in runs),
        "Model": _distinct(run.config["model"].get("name") for run in runs),
        "Parameters": _distinct(_count(result.get("parameters")) for result in finished),
        "Data": _distinct(run.config["data"].get("name") for run in runs),
        "Tokens a run": _distinct(_count(result.get("tokens")) for result in finished),
        "Seeds": ", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        "Runs": f"{len(runs)}, {len(finished)} finished" if len(finished) < len(runs) else f"{len(runs)}, all finished",
    }
    return {name: text for name, text in found.items() if text}


def summary(comparison: Comparison) -> list[str]:
    """Which method is best, how it stands to the baseline, what it holds in memory, and how sure that is."""
    ranked = [row for row in comparison.rows if row.score is not None]
    if not ranked:
        return ["No run has a score, so nothing can be ranked; the table of all runs says how each ended."]
    best = ranked[0]
    baseline = next(row for row in comparison.rows if row.label == comparison.baseline)
    return [
        _verdict(comparison, best, baseline, ranked),
        *_memory(best, baseline, ranked, comparison),
        *_certainty(comparison, ranked),
    ]


def _verdict(comparison: Comparison, best: Row, baseline: Row, ranked: list[Row]) -> str:
    assert best.lr is not None
    extreme = "highest" if comparison.greater_is_better else "lowest"
    reached = f"{score(comparison, best.score)} at learning rate {rate_key(best.lr)}"
    if len(ranked) == 1:
        return f"{best.label} reaches {comparison.metric} {reached}; nothing else has a score."
    start = f"{best.label} has the {extreme} {comparison.metric} of the {len(ranked)} compared: {reached}"
    if best.label == baseline.label:
        return f"{start}. Next is {ranked[1].label} with {score(comparison, ranked[1].score)}."
    before = ranked.index(baseline) - 1 if baseline in ranked else 0
    others = (
        f"; {before} other{'s are' if before > 1 else ' is'} better than {baseline.label} as well" if before else ""
    )
    return (
        f"{start}, {_apart(comparison, best, baseline)} {baseline.label} ({score(comparison, baseline.score)}){others}."
    )


def _apart(comparison: Comparison, row: Row, baseline: Row) -> str:
    """How far a score is from the baseline's, as the start of "... the baseline"."""
    if row.relative is None or row.score is None or baseline.score is None:
        return "beside"
    if comparison.metric in AS_THEY_ARE:
        much, unit = abs(100 * (row.relative - 1)), "%"
    else:
        much, unit = abs(100 * (row.score - baseline.score)), " points"
    if much < 0.05:
        return "level with"
    return f"{much:.{1 if much < 10 else 0}f}{unit} {'below' if row.score < baseline.score else 'above'}"


def _memory(best: Row, baseline: Row, ranked: list[Row], comparison: Comparison) -> list[str]:
    held = best.model_memory_bytes
    if held is None:
        return []
    sentence = f"Its weights, gradients and optimizer state take {size(held)}"
    base = baseline.model_memory_bytes
    if base and best.label != baseline.label:
        part = f"{held / base:.0%}"
        sentence += f", as {baseline.label}'s" if part == "100%" else f", {part} of {baseline.label}'s {size(base)}"
    least = min((row for row in ranked if row.model_memory_bytes), key=lambda row: row.model_memory_bytes or 0)
    if (least.model_memory_bytes or 0) < 0.995 * held:
        sentence += (
            f"; {least.label} takes least, {size(least.model_memory_bytes)}, with {comparison.metric} "
            f"{score(comparison, least.score)}"
        )
    return [f"{sentence}."]


def _certainty(comparison: Comparison, ranked: list[Row]) -> list[str]:
    """Whether the seeds tell the first two apart."""
    if len(ranked) < 2 or min(len(row.scores) for row in ranked[:2]) < 2:
        return []
    first, second = ranked[:2]
    ours, theirs = first.scores.values(), second.scores.values()
    overlap = min(ours) <= max(theirs) if comparison.greater_is_better else max(ours) >= min(theirs)
    if overlap:
        return [
            f"Scores are means over seeds; those of {first.label} and {second.label} overlap, so their order may be "
            "chance."
        ]
    return [f"Scores are means over seeds; every seed of {first.label} is better than every one of {second.label}."]


def cards(comparison: Comparison) -> list[Card]:
    """The figures at the head of the page."""
    ranked = [row for row in comparison.rows if row.score is not None]
    if not ranked:
        return []
    best = ranked[0]
    assert best.lr is not None
    found = [
        Card(
            f"Best {metric_name(comparison).lower()}",
            score(comparison, best.score),
            f"{best.label}, learning rate {rate_key(best.lr)}",
        )
    ]
    baseline = next(row for row in comparison.rows if row.label == comparison.baseline)
    if best.label != baseline.label and best.relative is not None:
        words = f"{baseline.label}: {score(comparison, baseline.score)}"
        found.append(Card(f"Of {baseline.label}", share(best.relative), words))
    sized = [row for row in ranked if row.model_memory_bytes]
    if best in sized:
        found.append(Card("Its model memory", size(best.model_memory_bytes), "weights, gradients, optimizer state"))
    if len(sized) > 1:
        least = min(sized, key=lambda row: row.model_memory_bytes or 0)
        words = f"{least.label}, {comparison.metric} {score(comparison, least.score)}"
        found.append(Card("Least model memory", size(least.model_memory_bytes), words))
    return found


def _distinct(values: Iterable[Any]) -> str:
    """The values that occur, once each; those past the third are counted."""
    found = list(dict.fromkeys(str(value) for value in values if value))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _count(value: Any) -> str:
    """A number of parameters or tokens."""
    if not isinstance(value, int | float):
        return ""
    name, scale = next(((n, s) for n, s in ((" B", 1e9), (" M", 1e6), (" k", 1e3)) if value >= s), ("", 1))
    return f"{value / scale:.3g}{name}"
