"""How alike the scaling factors of low-rank and full-rank training are: Fira's own test of its idea (arXiv:2410.01623).

Fira scales what lies outside the subspace by factors measured inside it, because the order of these factors, so the
claim, is that of full-rank training. Two runs of one model on the same data are traced; every factor is averaged over
the traced steps, and the two lists of means are compared by rank correlation:

    matrix level   a matrix is one number, the mean over its columns
    column level   a sampled column of a matrix is one number; all matrices together, as published
    within         the column level of each matrix by itself (Spearman), the median over matrices

Columns of one matrix share a layer and a scale, so they are not independent samples: the p-values of the column level
say less than they seem to, and neither level compares more than one pair of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fullrank.analysis.spectrum import matrix_types
from fullrank.analysis.table import text_table
from fullrank.analysis.traced_runs import common_steps, same_matrices
from fullrank.errors import ConfigError
from fullrank.train.trace_file import Trace, read_trace

LEAST_MATRICES = 3
"""Fewer have no rank correlation to speak of."""
SMALLEST_P = 1e-300
"""p-values below this have underflowed, or are about to."""


@dataclass(frozen=True)
class Correlation:
    """Two lists of numbers compared by rank."""

    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float
    count: int | None = None
    """Pairs of numbers; None: not published."""


@dataclass(frozen=True)
class Published:
    """One row of the authors' table."""

    size: str
    matrix: Correlation
    column: Correlation


PUBLISHED = (
    Published("60M", Correlation(0.9972, 2e-62, 0.9662, 7e-26), Correlation(0.9372, 0.0, 0.7942, 0.0)),
    Published("130M", Correlation(0.9925, 2e-76, 0.9409, 9e-37), Correlation(0.8698, 0.0, 0.6830, 0.0)),
    Published("350M", Correlation(0.9770, 3e-113, 0.8848, 5e-65), Correlation(0.9091, 0.0, 0.7400, 0.0)),
    Published("1B", Correlation(0.9469, 1e-83, 0.8249, 1e-56), Correlation(0.8331, 0.0, 0.6513, 0.0)),
)
"""LLaMA models on C4, over 10,000 steps: "Further Analysis of Scaling Factor Similarities" in the authors' README."""


@dataclass(frozen=True)
class MatrixPair:
    """The factors of one matrix in both runs, means over the traced steps."""

    name: str
    kind: str
    """Type of the matrix, such as q_proj."""
    low: float
    full: float
    columns: tuple[int, ...]
    """The sampled columns."""
    low_columns: tuple[float, ...]
    full_columns: tuple[float, ...]
    spearman: float | None
    """Rank correlation of its columns; None: fewer than three, or all equal."""


@dataclass(frozen=True)
class Similarity:
    """The factors of two runs, and how alike they are."""

    low: str
    """Where the low-rank factors come from."""
    full: str
    steps: tuple[int, ...]
    """The traced optimizer steps that the means are over."""
    matrices: tuple[MatrixPair, ...]
    matrix: Correlation
    column: Correlation | None
    """None where no columns were traced."""

    @property
    def within(self) -> float | None:
        """Median over the matrices of the rank correlation (Spearman) of each one's columns."""
        found = [pair.spearman for pair in self.matrices if pair.spearman is not None]
        return median(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the correlations, and each matrix without its columns (these are in the CSV)."""
        names = ("name", "kind", "low", "full", "spearman")
        return {
            "low": self.low,
            "full": self.full,
            "num_steps": len(self.steps),
            "first_step": self.steps[0],
            "last_step": self.steps[-1],
            "matrix": asdict(self.matrix),
            "column": None if self.column is None else asdict(self.column),
            "within": self.within,
            "matrices": [{name: getattr(pair, name) for name in names} for pair in self.matrices],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """For CSV: a line for each matrix (column empty) and each sampled column."""
        for pair in self.matrices:
            yield self._row(pair, None, pair.low, pair.full)
            for column, low, full in zip(pair.columns, pair.low_columns, pair.full_columns, strict=True):
                yield self._row(pair, column, low, full)

    @staticmethod
    def _row(pair: MatrixPair, column: int | None, low: float, full: float) -> dict[str, Any]:
        numbers = {"low": float(f"{low:.6g}"), "full": float(f"{full:.6g}")}
        return {"matrix": pair.name, "type": pair.kind, "column": column} | numbers


def similarity(low_trace: Trace | str | Path, full_trace: Trace | str | Path) -> Similarity:
    """Compare the scaling factors of two traced runs of one model.

    Args:
        low_trace: A trace, or the folder of a traced run: of a low-rank method.
        full_trace: The same of full-rank training.

    Raises:
        ConfigError: If a trace is missing, the two are of other matrices, columns or steps, there are fewer than
            three matrices, or the factors of a run are all equal.
    """
    low = low_trace if isinstance(low_trace, Trace) else read_trace(low_trace)
    full = full_trace if isinstance(full_trace, Trace) else read_trace(full_trace)
    names = list(same_matrices(low, full))
    if len(names) < LEAST_MATRICES:
        raise ConfigError(
            f"{low.folder} traces {len(names)} matrices; a rank correlation needs at least {LEAST_MATRICES}. Trace "
            "more of them (target_modules)."
        )
    for name in names:
        _refuse_other_columns(name, low, full)
    steps = common_steps(low, full)
    means = [_means(trace, steps) for trace in (low, full)]
    columns = [_column_means(trace, steps) for trace in (low, full)]
    pairs = tuple(
        MatrixPair(
            name=name,
            kind=kind,
            low=means[0][name],
            full=means[1][name],
            columns=low.matrices[name].columns,
            low_columns=columns[0][name],
            full_columns=columns[1][name],
            spearman=_spearman(columns[0][name], columns[1][name]),
        )
        for name, kind in zip(names, matrix_types(names), strict=True)
    )
    sources = str(low.folder), str(full.folder)
    flat = [[value for name in names for value in side[name]] for side in columns]
    return Similarity(
        *sources,
        steps=tuple(steps),
        matrices=pairs,
        matrix=correlate([pair.low for pair in pairs], [pair.full for pair in pairs], sources=sources),
        column=correlate(*flat, sources=sources) if flat[0] else None,
    )


def correlate(
    low: Sequence[float], full: Sequence[float], *, sources: tuple[str, str] = ("the first", "the second")
) -> Correlation:
    """Spearman's and Kendall's rank correlation with their two-sided p-values.

    Raises:
        ConfigError: If the numbers of one side are all equal, so that there is no order to compare.
    """
    from scipy.stats import kendalltau, spearmanr

    for values, source in zip((low, full), sources, strict=True):
        if min(values) == max(values):
            raise ConfigError(
                f"the scaling factors of {source} are all {values[0]:g}: there is no order to compare. Trace more "
                "steps, or another model."
            )
    spearman, kendall = spearmanr(low, full), kendalltau(low, full)
    return Correlation(
        float(spearman.statistic), float(spearman.pvalue), float(kendall.statistic), float(kendall.pvalue), len(low)
    )


def table(found: Mapping[str, Similarity]) -> str:
    """The published table's layout: its rows, then ours by their labels."""
    header = ("size", *(("Spearman", "p-value", "Kendall", "p-value") * 2))
    rows = [(f"{row.size} (paper)", *_cells(row.matrix), *_cells(row.column)) for row in PUBLISHED]
    rows += [(label, *_cells(one.matrix), *_cells(one.column)) for label, one in found.items()]
    lines = text_table(header, rows).splitlines()
    first = lines[0].index("Spearman")
    second = lines[0].index("Spearman", first + 1)
    above = " " * first + "matrix level".ljust(second - first) + "column level"
    notes = []
    for label, one in found.items():
        within = "" if one.within is None else f"; within a matrix, median Spearman {one.within:.4f}"
        counts = f"{one.matrix.count} matrices, {one.column.count if one.column else 0} columns"
        notes.append(f"{label}: {counts}, {len(one.steps)} traced steps to step {one.steps[-1]:,}{within}")
    return "\n".join([above, *lines, *notes])


def p_value(value: float, *, published: bool = False) -> str:
    """A p-value for a table; one that underflowed is a bound, unless it is quoted."""
    if published and value == 0.0:
        return "0.0"
    return f"< {SMALLEST_P:g}" if value < SMALLEST_P else f"{value:.0e}"


def _cells(correlation: Correlation | None) -> tuple[str, ...]:
    if correlation is None:
        return ("-",) * 4
    published = correlation.count is None
    ps = (p_value(p, published=published) for p in (correlation.spearman_p, correlation.kendall_p))
    return f"{correlation.spearman:.4f}", next(ps), f"{correlation.kendall:.4f}", next(ps)


def _refuse_other_columns(name: str, low: Trace, full: Trace) -> None:
    one, other = low.matrices[name], full.matrices[name]
    if one.num_factors != other.num_factors:
        raise ConfigError(
            f"{name} has {one.num_factors} scaling factors in {low.folder} and {other.num_factors} in {full.folder}. "
            "Compare runs with one factor a column (scaling: column or channel) and one proj_type, std, left or right."
        )
    if one.columns != other.columns:
        raise ConfigError(
            f"other columns of {name} are traced in {low.folder} than in {full.folder}. Trace both with the same "
            "num_columns and seed."
        )


def _means(trace: Trace, steps: Sequence[int]) -> dict[str, float]:
    """Mean over the steps of each matrix's mean factor."""
    rows = [row["mean"] for row in trace.rows if row["step"] in {*steps}]
    return {name: _mean([row[place] for row in rows], name, trace) for place, name in enumerate(trace.matrices)}


def _column_means(trace: Trace, steps: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """Mean over the steps of the factor of each sampled column."""
    rows = [row.get("columns") for row in trace.rows if row["step"] in {*steps}]
    found = {}
    for place, (name, matrix) in enumerate(trace.matrices.items()):
        present = [row[place] for row in rows if row is not None and row[place] is not None]
        found[name] = tuple(_mean(list(values), name, trace) for values in zip(*present, strict=True))
        assert len(found[name]) == len(matrix.columns)
    return found


def _mean(values: Sequence[float | None], name: str, trace: Trace) -> float:
    present = [value for value in values if value is not None and math.isfinite(value)]
    if not present:
        raise ConfigError(
            f"{name} had no gradient, or no finite one, at any traced step of {trace.folder}. Leave it out of "
            "target_modules."
        )
    return fmean(present)


def _spearman(low: Sequence[float], full: Sequence[float]) -> float | None:
    if len(low) < LEAST_MATRICES or min(low) == max(low) or min(full) == max(full):
        return None
    return correlate(low, full).spearman
