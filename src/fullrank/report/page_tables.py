"""The tables of the page: what each cell says, and by which value it sorts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fullrank.report.comparison import Comparison, Row, rate_key
from fullrank.report.published import Published, beside
from fullrank.report.runs import Run
from fullrank.report.table import AS_THEY_ARE, score_text

NONE = "–"
EDGE = "†"
EDGE_WORDS = "The best rate is the lowest or the highest of those tried: a better one may lie beyond."


@dataclass(frozen=True)
class Column:
    """Head of a column."""

    text: str
    words: bool = False
    """Whether it holds words, which stand at the left and sort as words."""


@dataclass(frozen=True)
class Cell:
    """One cell: what stands there and what it sorts by (None: it is missing, and last)."""

    text: str
    value: float | str | None = None
    mark: str = ""
    mark_title: str = ""
    classes: str = ""
    bar: tuple[tuple[str, float], ...] = ()
    """Parts of a bar under the text: (name, share of the widest in per cent)."""


@dataclass(frozen=True)
class Line:
    """One row of a table; its name is the row's header."""

    name: str
    cells: list[Cell]
    label: str | None = None
    """Label whose colour and marker stand beside the name."""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    caption: str
    columns: list[Column]
    rows: list[Line] = field(default_factory=list)
    sortable: bool = True

    @property
    def longest(self) -> int:
        """Characters of the longest name."""
        return max((len(row.name) for row in self.rows), default=0)


def results_table(comparison: Comparison) -> Table:
    """One line for each label: score, every seed's score, best rate, memory and time."""
    seeds = sorted({seed for row in comparison.rows for seed in row.scores})
    unit = memory_unit(comparison)
    several = seeds if len(seeds) > 1 else []
    widest = max((row.model_memory_bytes or 0 for row in comparison.rows), default=0)
    columns = [
        Column("Method", words=True),
        Column(metric_name(comparison) + (", mean" if several else "")),
        *[Column(f"Seed {seed}") for seed in several],
        Column(f"Of {comparison.baseline}"),
        Column("Best rate"),
        *[Column(f"{name}, {unit}") for name in ("Model memory", "Weights", "Gradients", "Optimizer state", "Peak")],
        Column("Step, ms"),
        Column("Tokens/s"),
    ]
    best = comparison.rows[0].label if comparison.rows and comparison.rows[0].score is not None else None
    return Table(
        caption=f"{metric_name(comparison)} after training, {better(comparison)}; each method at its best rate.",
        columns=columns,
        rows=[
            Line(row.label, _result_cells(comparison, row, several, widest), label=row.label, best=row.label == best)
            for row in comparison.rows
        ],
    )


def _result_cells(comparison: Comparison, row: Row, seeds: Sequence[int], widest: int) -> list[Cell]:
    parts = {"weights": row.weight_bytes, "gradients": row.gradient_bytes, "state": row.optimizer_state_bytes}
    memory = row.model_memory_bytes
    unit = memory_unit(comparison)
    bar = tuple((name, 100 * part / widest) for name, part in parts.items() if part) if memory and widest else ()
    rate = (
        Cell(NONE)
        if row.lr is None
        else Cell(
            rate_key(row.lr), row.lr, mark=EDGE if row.at_edge else "", mark_title=EDGE_WORDS if row.at_edge else ""
        )
    )
    return [
        Cell(score(comparison, row.score), row.score, classes="lead"),
        *[Cell(score(comparison, row.scores.get(seed)), row.scores.get(seed)) for seed in seeds],
        Cell(share(row.relative), row.relative),
        rate,
        Cell(in_unit(memory, unit), memory, bar=bar),
        *[Cell(in_unit(held, unit), held) for held in (*parts.values(), row.peak_memory_bytes)],
        Cell(NONE if row.step_time_s is None else milliseconds(row.step_time_s), row.step_time_s),
        Cell(NONE if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}", row.tokens_per_s),
    ]


def grid_table(comparison: Comparison) -> Table:
    """Score or outcome of every label at every rate, with the first seed."""
    keys = sorted({key for row in comparison.rows for key in row.grid}, key=float)
    return Table(
        caption=f"{metric_name(comparison)} with the first seed, {better(comparison)}.",
        columns=[Column("Method", words=True), *[Column(key) for key in keys]],
        rows=[
            Line(row.label, [_grid_cell(comparison, row, key) for key in keys], label=row.label)
            for row in comparison.rows
        ],
    )


def _grid_cell(comparison: Comparison, row: Row, key: str) -> Cell:
    found = row.grid.get(key)
    if found is None or isinstance(found, str):
        return Cell(found or NONE, classes=f"outcome {found}" if found else "")
    return Cell(
        score(comparison, found), found, classes="lead" if row.lr is not None and key == rate_key(row.lr) else ""
    )


def runs_table(comparison: Comparison) -> Table:
    """Every run with its outcome, in the order of labels, rates and seeds."""
    labels = list(dict.fromkeys(run.label for run in comparison.runs))
    ordered = sorted(comparison.runs, key=lambda run: (labels.index(run.label), run.lr, run.seed))
    columns = ["Learning rate", "Seed", "Outcome", metric_name(comparison), "Tokens", "Training time", "Note"]
    return Table(
        caption="Training time is the sum of optimizer steps, without evaluation and saving.",
        columns=[Column("Run", words=True), *[Column(text, words=text in ("Outcome", "Note")) for text in columns]],
        rows=[Line(run.label, _run_cells(comparison, run), label=run.label) for run in ordered],
    )


def _run_cells(comparison: Comparison, run: Run) -> list[Cell]:
    ends = [curve for curve in (run.train, run.validation) if curve.step]
    tokens = (run.result or {}).get("tokens") or max((curve.tokens[-1] for curve in ends), default=None)
    time = max((curve.time_s[-1] for curve in ends), default=None)
    return [
        Cell(rate_key(run.lr), run.lr),
        Cell(str(run.seed), run.seed),
        Cell(run.outcome, run.outcome, classes=f"words outcome {run.outcome}"),
        Cell(score(comparison, run.score), run.score),
        Cell(NONE if tokens is None else f"{tokens:,}", tokens),
        Cell(duration(time), time),
        Cell(run.note, run.note or None, classes="words long"),
    ]


def papers_table(comparison: Comparison) -> Table | None:
    """The papers' numbers, each beside ours of the same method; None where no paper has any."""
    found = beside(comparison)
    if not found:
        return None
    numbers, words = ["Ours", "Paper's", "Tokens", "Memory"], ["Model", "Source", "Remarks"]
    return Table(
        caption=f"{metric_name(comparison)} here and in the papers. Read the differences below before comparing.",
        columns=[
            Column("Method", words=True),
            *[Column(text) for text in numbers],
            *[Column(text, words=True) for text in words],
        ],
        rows=[
            Line(
                row.label,
                [Cell(score(comparison, row.score), row.score, classes="lead"), *_paper_cells(comparison, one)],
                label=row.label,
            )
            for row, published in found
            for one in published
        ],
    )


def _paper_cells(comparison: Comparison, one: Published) -> list[Cell]:
    remarks = [one.setting, f"memory of {one.memory_of}" if one.memory_of else ""]
    text = "; ".join(remark for remark in remarks if remark)
    return [
        Cell(score(comparison, one.value), one.value),
        Cell(NONE if one.tokens is None else f"{one.tokens / 1e9:g} B", one.tokens),
        Cell(NONE if one.memory_gb is None else f"{one.memory_gb:.2f} G", one.memory_gb),
        Cell(one.size.upper() if one.size[0].isdigit() else one.size, one.size, classes="words"),
        Cell(one.source, one.source, classes="words"),
        Cell(text, text or None, classes="words long"),
    ]


def better(comparison: Comparison) -> str:
    """Which way the metric is better, as the end of a phrase."""
    return "higher is better" if comparison.greater_is_better else "lower is better"


def metric_name(comparison: Comparison) -> str:
    """The metric for a heading, with its unit."""
    unit = "" if comparison.metric in AS_THEY_ARE else " (%)"
    return comparison.metric[:1].upper() + comparison.metric[1:] + unit


def score(comparison: Comparison, value: float | None) -> str:
    """A score as every table of a comparison shows it."""
    return NONE if value is None else score_text(comparison.metric, value)


def share(relative: float | None) -> str:
    """A ratio in per cent."""
    return NONE if relative is None else f"{relative:.1%}"


def memory_unit(comparison: Comparison) -> str:
    """One unit for all memory of a table: MB, or GB where the model takes tens of them."""
    return "GB" if max((row.model_memory_bytes or 0 for row in comparison.rows), default=0) >= 1e10 else "MB"


def in_unit(count: float | None, unit: str) -> str:
    """A number of bytes in the unit of its table."""
    if count is None:
        return NONE
    return f"{count / 1e9:,.2f}" if unit == "GB" else f"{count / 1e6:,.1f}"


def size(count: float | None) -> str:
    """A number of bytes in the unit that it reads well in (1 MB = 10^6 bytes)."""
    if count is None:
        return NONE
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    name, scale = next(((name, scale) for name, scale in units if count >= scale), ("bytes", 1))
    return (
        f"{count:,.0f} bytes"
        if scale == 1
        else f"{count / scale:.3g} {name}"
        if count < 999.5 * scale
        else (f"{count / scale:,.0f} {name}")
    )


def milliseconds(seconds: float) -> str:
    """The time of a step."""
    return f"{1000 * seconds:,.{0 if seconds >= 0.1 else 1}f}"


def duration(seconds: float | None) -> str:
    """A time in the unit that it reads well in."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
