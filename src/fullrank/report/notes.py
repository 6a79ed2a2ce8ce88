"""What a reader must know before believing a comparison: settings that differ, rates at an edge, runs that failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fullrank.report.runs import Run
from fullrank.train.checkpoint import FREE
from fullrank.train.report import megabytes

if TYPE_CHECKING:
    from fullrank.report.comparison import Row

KEEPS_BEST = "load_best_model_at_end"
HARMLESS = (FREE - {KEEPS_BEST}) | {
    "save_steps",
    "save_strategy",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "log_level_replica",
    "logging_nan_inf_filter",
}
"""Fields of the trainer section that touch neither the weights of a run nor its score."""
EVALUATION = {"eval_strategy", "eval_steps", "eval_delay"}
"""Fields that touch the result only where the best model is kept."""
SHOWN = 6
"""Names in one sentence at most."""
IDLE = {
    "restart_every": "never restarted",
    "update_proj_gap": "kept its first basis",
    "reselect_every": "never chose anew",
}
"""Options in optimizer steps -> what a run that is no longer did not do."""
WORDS = {"finished": "has no score", "unfinished": "is unfinished", "stopped": "was stopped"}
"""Outcomes as the verb of a sentence."""


def find_notes(rows: Sequence[Row], runs: Sequence[Run], *, baseline: Row) -> list[str]:
    """The notes of a comparison, most important first, a plain sentence each."""
    finished = [run for run in runs if run.result is not None]
    return [
        *_unequal_tokens(rows, finished),
        *_unequal_settings(finished),
        *_unequal_data(finished),
        *_unequal_methods(rows, finished),
        *_unequal_results(finished, "hardware", ("device", "threads", "processes")),
        *_unequal_results(finished, "versions", ()),
        *_no_baseline(rows, baseline),
        *_unscored(rows, runs),
        *_rates(rows),
        *_seeds(rows),
        *_idle(rows, finished),
        *_warm_starts(rows, finished),
    ]


def _unequal_tokens(rows: Sequence[Row], finished: Sequence[Run]) -> list[str]:
    """Whether the best runs saw the same number of tokens."""
    rates = {row.label: row.lr for row in rows}
    best = [run for run in finished if run.lr == rates[run.label]]
    tokens = [(run.result or {}).get("tokens") for run in best]
    return _difference("the number of tokens they trained on", best, tokens, who="The best runs")


def _unequal_settings(finished: Sequence[Run]) -> list[str]:
    """Settings outside the method that finished runs do not share."""
    settings = [_settings(run) for run in finished]
    keys = sorted({key for found in settings for key in found})
    return [note for key in keys for note in _difference(key, finished, [found.get(key) for found in settings])]


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run that ought to be equal in a comparison, by dotted keys."""
    ignored = HARMLESS if run.config["trainer"].get(KEEPS_BEST) else HARMLESS | EVALUATION
    outside = {name: value for name, value in run.config.items() if name not in ("method", "seed", "output_dir")}
    return {
        key: value for key, value in _flat(outside) if not (key.startswith("trainer.") and key.split(".")[1] in ignored)
    }


def _unequal_data(finished: Sequence[Run]) -> list[str]:
    """Whether runs with the same settings read another text, or cut it by another tokenizer; unknown of older runs."""
    known = [(run, str(found)[:12]) for run in finished if (found := (run.result or {}).get("content_hash"))]
    return _difference("the hash of their text and tokenizer", [run for run, _ in known], [found for _, found in known])


def _unequal_methods(rows: Sequence[Row], finished: Sequence[Run]) -> list[str]:
    """Options of the method, besides its rate, that runs of one label do not share."""
    notes = []
    for row in rows:
        own = [run for run in finished if run.label == row.label]
        options = [dict(_flat({"method": run.config["method"]})) for run in own]
        keys = sorted({key for found in options for key in found} - {"method.lr"})
        unequal = [key for key in keys if len({_text(found.get(key)) for found in options}) > 1]
        if unequal:
            values = "; ".join(
                f"{key}: {', '.join(dict.fromkeys(_text(found.get(key)) for found in options))}" for key in unequal
            )
            notes.append(f"The runs of {row.label} differ in more than rate and seed: {values}.")
    return notes


def _unequal_results(finished: Sequence[Run], section: str, keys: Sequence[str]) -> list[str]:
    """Entries of a section of ``result.json`` that the runs do not share; no keys: all of them."""
    found = [(run.result or {}).get(section) or {} for run in finished]
    names = keys or sorted({key for entries in found for key in entries})
    return [note for key in names for note in _difference(f"{section}: {key}", finished, [e.get(key) for e in found])]


def _difference(what: str, runs: Sequence[Run], values: Sequence[Any], *, who: str = "The runs") -> list[str]:
    """One sentence that names the values and who has them, where there are several values."""
    texts = [_text(value) for value in values]
    if len(set(texts)) < 2:
        return []
    unsplit = {label for label, count in Counter(label for label, _ in {*_pairs(runs, texts)}).items() if count == 1}
    parts = []
    for text in dict.fromkeys(texts):
        own = [run for run, other in zip(runs, texts, strict=True) if other == text]
        names = [run.label if run.label in unsplit else f"{run.label} at {run.lr:g}, seed {run.seed}" for run in own]
        parts.append(f"{text} ({_listed(list(dict.fromkeys(names)))})")
    return [f"{who} differ in {what}: {'; '.join(parts)}."]


def _pairs(runs: Sequence[Run], texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(run.label, text) for run, text in zip(runs, texts, strict=True)]


def _no_baseline(rows: Sequence[Row], baseline: Row) -> list[str]:
    """Whether scores are relative to something else than full-rank training, though it was run."""
    full = [row.label for row in rows if row.method == "full" and row.score is None]
    if full and baseline.method != "full" and baseline.score is not None:
        return [f"{_listed(full)} has no score, so the relative scores are to {baseline.label}."]
    return []


def _unscored(rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    """Runs without a score, a sentence for each outcome and label."""
    notes = []
    for row in rows:
        for outcome in dict.fromkeys(run.outcome for run in runs if run.label == row.label and run.score is None):
            own = [r for r in runs if r.label == row.label and r.score is None and r.outcome == outcome]
            where = _listed([f"{run.lr:g} (seed {run.seed})" for run in own])
            why = next((run.note for run in own if run.note), "")
            word = WORDS.get(outcome, outcome)
            notes.append(f"{row.label} {word} at {where}{': ' + why.rstrip('.') if why else ''}.")
        if row.score is None:
            notes.append(f"{row.label} has no score at any rate.")
    return notes


def _rates(rows: Sequence[Row]) -> list[str]:
    """Best rates that may not be the best ones."""
    edges = [f"{row.label} ({row.lr:g})" for row in rows if row.at_edge]
    single = [row.label for row in rows if len(row.grid) == 1 and row.score is not None]
    notes = []
    if edges:
        notes.append(f"Best learning rate at an edge of those tried, so a better one may lie beyond: {_listed(edges)}.")
    if single:
        notes.append(f"One learning rate only, so it is not known to be the best: {_listed(single)}.")
    return notes


def _seeds(rows: Sequence[Row]) -> list[str]:
    """How far the scores can be told apart from noise."""
    counts = {row.label: len(row.scores) for row in rows if row.score is not None}
    one = [label for label, count in counts.items() if count == 1]
    if not one or len(counts) < 2:
        return []
    whose = "" if len(one) == len(counts) else f" for {_listed(one)}"
    return [f"One seed{whose}: differences of a few percent may be noise."]


def _idle(rows: Sequence[Row], finished: Sequence[Run]) -> list[str]:
    """Options that are longer than the runs, so that what they time never happened."""
    notes = []
    for row in rows:
        run = next((run for run in finished if run.label == row.label and run.lr == row.lr), None)
        steps = (run.result or {}).get("steps") if run is not None else None
        for option, consequence in IDLE.items():
            every = run.config["method"].get(option) if run is not None else None
            if steps and isinstance(every, int) and every >= steps:
                notes.append(f"{row.label} {consequence}: its {option} is {every:,}, and the run has {steps:,} steps.")
    return notes


def _warm_starts(rows: Sequence[Row], finished: Sequence[Run]) -> list[str]:
    """Labels whose optimizer held more at another time than at the end, which the table shows."""
    more = {}
    for row in rows:
        for run in finished:
            result = run.result or {}
            peak = result.get("optimizer_state_peak_bytes") or 0
            if run.label == row.label and run.lr == row.lr and peak > (result.get("optimizer_state_bytes") or peak):
                more[row.label] = f"{row.label} {megabytes(peak)}"
    if not more:
        return []
    return [f"Optimizer state is that at the end of training; in the warm start: {_listed(list(more.values()))}."]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted key, value); an empty one says nothing."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value)]


def _text(value: Any) -> str:
    """A setting in a sentence; equal settings have equal texts."""
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) < 1e15 else repr(value)
    return json.dumps(value, sort_keys=True)


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
