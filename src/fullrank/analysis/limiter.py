"""What Fira's norm-growth limiter does, and what happens without it (arXiv:2410.01623, section 4.2).

Two traced runs, with the limiter and without it, all else the same. At step t let n_t be the norm of the scaled
residual S of a matrix before the limiter (of the scaled gradient in APOLLO), c_t the factor that the limiter
multiplies it by (1 where it does not act, or there is none), and g_t the growth that the limiter looks at:

    g_t = n_t / (c_(t-1) n_(t-1))        c_t = gamma / max(g_t, gamma)

Without a limiter c is 1, and g_t is what the norm really did.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fullrank.analysis.spectrum import matrix_types
from fullrank.analysis.spikes import HEIGHT, WINDOW, Spike, find_spikes
from fullrank.analysis.table import text_table
from fullrank.analysis.traced_runs import read_result, same_matrices
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.report import read_metrics
from fullrank.train.trace_file import Trace, read_trace

logger = logging.getLogger(__name__)

Series = list[float | None]
"""A number for each traced step; None where the matrix had no gradient."""


@dataclass(frozen=True)
class MatrixLimits:
    """The limiter at work on one matrix."""

    name: str
    kind: str
    """Type of the matrix, such as q_proj."""
    num_steps: int
    """Traced steps at which it had a gradient."""
    num_acted: int
    """At how many of these the limiter acted."""
    mean_factor: float
    smallest_factor: float
    growth: float | None
    """Largest growth of the norm before the limiter; None: no two traced steps in a row."""
    growth_without: float | None
    """The same in the run without a limiter; None: there is no such run either."""


@dataclass(frozen=True)
class LimitedRun:
    """One of the two runs: its norms and factors by matrix and step, and its loss."""

    folder: Path
    steps: list[int]
    """The traced steps."""
    norms: dict[str, Series]
    """Matrix -> norm before the limiter."""
    factors: dict[str, Series]
    """Matrix -> what the limiter multiplied it by."""
    loss_steps: list[int]
    """The logged steps; none where the folder has no metrics."""
    losses: list[float]
    spikes: list[Spike]
    eval_loss: float | None
    """Validation loss at the end; None: not known, or the run did not get there."""
    perplexity: float | None

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last ``WINDOW`` logged steps."""
        return fmean(self.losses[-WINDOW:]) if self.losses else None

    def total_norms(self, *, limited: bool) -> list[float]:
        """Norm over all matrices at each traced step, after the limiter or before it."""
        totals = []
        for place in range(len(self.steps)):
            numbers = [(norms[place], self.factors[name][place]) for name, norms in self.norms.items()]
            squares = [(n * (c if limited else 1.0)) ** 2 for n, c in numbers if n is not None and c is not None]
            totals.append(math.sqrt(math.fsum(squares)))
        return totals

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not in the trace or the metrics."""
        return {
            "folder": str(self.folder),
            "last_step": self.loss_steps[-1] if self.loss_steps else self.steps[-1],
            "final_loss": self.final_loss,
            "eval_loss": self.eval_loss,
            "perplexity": self.perplexity,
            "spikes": [asdict(spike) for spike in self.spikes],
        }


@dataclass(frozen=True)
class Limits:
    """The runs with and without a limiter, and the limiter by matrix."""

    on: LimitedRun
    off: LimitedRun | None
    matrices: tuple[MatrixLimits, ...]

    def runs(self) -> Iterator[tuple[str, LimitedRun]]:
        """The runs with their labels."""
        yield "with limiter", self.on
        if self.off is not None:
            yield "without limiter", self.off

    def types(self) -> dict[str, list[MatrixLimits]]:
        """Matrices by type, and all of them last."""
        found: dict[str, list[MatrixLimits]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.kind, []).append(matrix)
        return found | {"all": list(self.matrices)}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": {label: run.to_dict() for label, run in self.runs()},
            "num_steps": len(self.on.steps),
            "types": {kind: _summary(matrices) for kind, matrices in self.types().items()},
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }


def limiter(
    on: Trace | str | Path,
    off: Trace | str | Path | None = None,
    *,
    spike_window: int = WINDOW,
    spike_height: float = HEIGHT,
) -> Limits:
    """Measure the limiter from traced runs, or from their folders.

    Args:
        on: A run with a limiter.
        off: The same run without (``limiter_gamma`` None); None: there is none.
        spike_window: Logged losses that the running median is over.
        spike_height: Excess over it that makes a spike.

    Raises:
        ConfigError: If a trace is missing, is of a method that has no limiter or of other matrices, or if the
            limiter acted in the run that should have none.
    """
    traces = [one if isinstance(one, Trace) else read_trace(one) for one in (on, off) if one is not None]
    runs = [_read_run(trace, window=spike_window, height=spike_height) for trace in traces]
    if off is not None:
        same_matrices(*traces)
        if any(factor is not None and factor < 1 for series in runs[1].factors.values() for factor in series):
            raise ConfigError(
                f"the limiter acted in {traces[1].folder}, given as the run without one. Give the run with a limiter "
                "first, then the one with method.limiter_gamma null."
            )
    names = list(traces[0].matrices)
    without = runs[1] if off is not None else None
    return Limits(
        runs[0],
        without,
        tuple(_matrix(name, kind, runs[0], without) for name, kind in zip(names, matrix_types(names), strict=True)),
    )


def table(found: Limits) -> str:
    """The limiter by type of matrix, then the two runs."""
    header = ("matrix", "acted", "mean factor", "smallest", "largest growth", "without limiter")
    rows = []
    for kind, matrices in found.types().items():
        summary = _summary(matrices)
        growths = (_short(summary[key], ".3g") for key in ("growth", "growth_without"))
        cells = f"{summary['acted']:.1%}", f"{summary['mean_factor']:.4f}", f"{summary['smallest_factor']:.4g}"
        rows.append((kind, *cells, *growths))
    names = ("run", "training loss", "validation loss", "perplexity", "spikes", "largest", "last step")
    ends = []
    for label, run in found.runs():
        sizes = [spike.size for spike in run.spikes]
        scores = (_short(value, ".4f") for value in (run.final_loss, run.eval_loss))
        spikes = str(len(sizes)) if run.losses else "-", _short(max(sizes, default=None), ".3f")
        last = f"{run.loss_steps[-1] if run.loss_steps else run.steps[-1]:,}"
        ends.append((label, *scores, _short(run.perplexity, ".4g"), *spikes, last))
    return text_table(header, rows) + "\n\n" + text_table(names, ends)


def _read_run(trace: Trace, *, window: int, height: float) -> LimitedRun:
    if not trace.has_limiter:
        raise ConfigError(
            f"{trace.folder} is traced with {trace.optimizer}, which has no norm-growth limiter. Give runs of fira or "
            "apollo."
        )
    steps, losses = _read_losses(trace.folder)
    result = read_result(trace.folder)
    scores = [result[key] if _is_number(result.get(key)) else None for key in ("eval_loss", "perplexity")]
    return LimitedRun(
        trace.folder,
        trace.steps,
        _series(trace, "limited_norm"),
        _series(trace, "limiter"),
        steps,
        losses,
        find_spikes(steps, losses, window=window, height=height),
        *scores,
    )


def _read_losses(folder: Path) -> tuple[list[int], list[float]]:
    """The logged steps and their training losses; warns of rows that are not of such a run, and leaves them out."""
    try:
        rows = read_metrics(folder)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder / 'metrics.jsonl'} cannot be read ({error}). Remove it or mend it.") from None
    steps: list[int] = []
    losses: list[float] = []
    num_left_out = 0
    for row in rows:
        if isinstance(row, dict) and "loss" not in row:  # a score
            continue
        step, loss = (row.get("step"), row["loss"]) if isinstance(row, dict) else (None, None)
        if isinstance(step, int) and step > max(steps[-1:], default=-1) and _is_number(loss):
            steps.append(step)
            losses.append(float(loss))
        else:
            num_left_out += 1
    if num_left_out:
        path = folder / "metrics.jsonl"
        logger.warning("%s: %d rows without a step or a loss are left out", path, num_left_out)
    return steps, losses


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(trace: Trace, key: str) -> dict[str, Series]:
    return {name: [row[key][place] for row in trace.rows] for place, name in enumerate(trace.matrices)}


def _matrix(name: str, kind: str, on: LimitedRun, off: LimitedRun | None) -> MatrixLimits:
    factors = [factor for factor in on.factors[name] if factor is not None]
    if not factors:
        raise ConfigError(f"{name} had no gradient at any traced step of {on.folder}. Leave it out of target_modules.")
    return MatrixLimits(
        name,
        kind,
        num_steps=len(factors),
        num_acted=sum(factor < 1 for factor in factors),
        mean_factor=fmean(factors),
        smallest_factor=min(factors),
        growth=_largest_growth(on, name),
        growth_without=None if off is None else _largest_growth(off, name),
    )


def _largest_growth(run: LimitedRun, name: str) -> float | None:
    """The largest g_t over steps that follow one another and are both traced; a previous norm of 0 has none."""
    growths = []
    norms, factors = run.norms[name], run.factors[name]
    for place in range(1, len(run.steps)):
        before, kept, now = norms[place - 1], factors[place - 1], norms[place]
        if run.steps[place] == run.steps[place - 1] + 1 and now is not None and before and kept:
            growths.append(now / (before * kept))
    return max(growths, default=None)


def _summary(matrices: Sequence[MatrixLimits]) -> dict[str, Any]:
    """The numbers of several matrices: shares and means over all their steps, extremes over all."""
    num_steps = sum(matrix.num_steps for matrix in matrices)
    growths = [matrix.growth for matrix in matrices if matrix.growth is not None]
    without = [matrix.growth_without for matrix in matrices if matrix.growth_without is not None]
    return {
        "num_matrices": len(matrices),
        "acted": sum(matrix.num_acted for matrix in matrices) / num_steps,
        "mean_factor": math.fsum(matrix.mean_factor * matrix.num_steps for matrix in matrices) / num_steps,
        "smallest_factor": min(matrix.smallest_factor for matrix in matrices),
        "growth": max(growths, default=None),
        "growth_without": max(without, default=None),
    }


def _short(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
