"""The figures of a comparison: loss against tokens and against time, score against memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fullrank.analysis.figure import COLOURS, STYLES, as_text, new_figure, plain, save
from fullrank.report.comparison import Comparison, Row
from fullrank.report.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (7.0, 4.4)
"""Width and height (inches)."""
LEGEND = 1.4
"""Width of what stands beside the panel of losses (inches)."""
UNSETTLED = 0.05
"""Share of a run at its beginning that may lie above a panel: its fall would leave no room for differences."""
DECADE = 5.0
"""Largest score / smallest from which the axis of perplexities is logarithmic."""
TITLE_WIDTH = 66
"""Of a line of the title (characters)."""
POINT = 6.0
"""Radius around a point that no text may touch (pixels)."""
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
PLACES = [(distance * x, distance * y) for distance in (7, 16, 26) for x, y in SIDES]
"""Where a name may stand, from its point (points), the best place first."""


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG: ``loss_tokens``, ``loss_time``, ``perplexity_memory`` or ``score_memory``.

    A line is a label at its best rate, with its first seed. A figure without anything to show is left out.

    Args:
        comparison: The comparison.
        folder: An existing folder.

    Returns:
        The files.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    files = []
    if lines := _lines(comparison):
        files += save(draw_loss(comparison, against="tokens"), folder / "loss_tokens")
        if any(run.train.time_s[-1] > 0 for _, run in lines):
            files += save(draw_loss(comparison, against="time_s"), folder / "loss_time")
    if _points(comparison):
        kind = "perplexity" if comparison.metric == "perplexity" else "score"
        files += save(draw_memory(comparison), folder / f"{kind}_memory")
    return files


def draw_loss(comparison: Comparison, *, against: str) -> Figure:
    """Training loss as lines, lightly smoothed, and validation loss as points.

    Args:
        comparison: The comparison; at least one of its runs has a curve.
        against: ``tokens`` or ``time_s``.
    """
    from matplotlib.ticker import FuncFormatter

    lines = _lines(comparison)
    figure = new_figure(SIZE[0] + LEGEND, SIZE[1])
    axes = figure.add_subplot()
    divisor, unit = _time_unit(max(run.train.time_s[-1] for _, run in lines)) if against == "time_s" else (1.0, "")
    for number, (name, run) in enumerate(lines):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
        below = 2 + 1 / (1 + number)  # the best line on top
        places = [x / divisor for x in getattr(run.train, against)]
        axes.plot(
            places, _smooth(run.train.loss), color=colour, linestyle=style, linewidth=1.6, label=name, zorder=below
        )
        places = [x / divisor for x in getattr(run.validation, against)]
        axes.plot(places, run.validation.loss, "o", color=colour, markersize=4.5, mec="white", mew=0.6, zorder=4)
    unit_of_loss = "nats per token" if comparison.metric in ("perplexity", "loss") else "of the task"
    axes.set(
        title=fill(comparison.title, TITLE_WIDTH),
        xlabel="training tokens" if against == "tokens" else f"time in optimizer steps ({unit})",
        ylabel=f"loss ({unit_of_loss})",
        ylim=_span([curve for _, run in lines for curve in (run.train, run.validation)]),
    )
    axes.set_xlim(left=0)
    if against == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    plain(axes)
    place: dict[str, Any] = {"loc": "outside right upper", "alignment": "left", "frameon": False}
    figure.legend(fontsize="small", title="lines: training\npoints: validation", title_fontsize="small", **place)
    return figure


def draw_memory(comparison: Comparison) -> Figure:
    """The score of each label against the memory of its weights, gradients and optimizer state; bars: its seeds."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = _points(comparison)
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    scale, unit = (1e9, "GB") if max(size for _, size, _ in points) >= 1e10 else (1e6, "MB")
    percent = 1.0 if comparison.metric in ("perplexity", "loss") else 100.0
    for number, (row, size, score) in enumerate(points):
        spread = [score - min(row.scores.values()), max(row.scores.values()) - score]
        bars = [[percent * max(part, 0.0)] for part in spread]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar([size / scale], [percent * score], yerr=bars if any(spread) else None, capsize=3, color=colour)
        axes.plot(size / scale, percent * score, "o", color=colour, markersize=8, mec="white", mew=0.8, zorder=3)
    scores = [score for *_, score in points]
    if comparison.metric == "perplexity" and max(scores) > DECADE * min(scores) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.14, 0.14)
    axes.set(
        title=fill(comparison.title, TITLE_WIDTH),
        xlabel=f"model memory: weights, gradients and optimizer state ({unit})",
        ylabel=f"{comparison.metric}{'' if percent == 1.0 else ' (%)'}, "
        f"{'higher' if comparison.greater_is_better else 'lower'} is better",
    )
    plain(axes)
    _label(figure, axes, [(row, size / scale, percent) for row, size, _ in points])
    return figure


def short_count(value: float) -> str:
    """A number of tokens on an axis: 400K, 1.5M, 13B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _lines(comparison: Comparison) -> list[tuple[str, Run]]:
    """For each label its name in the legend and the run to draw; of a label without a result the longest run."""
    found = []
    for row in comparison.rows:
        own = [run for run in comparison.runs if run.label == row.label and run.train.step]
        best = [run for run in comparison.best_runs(row.label) if run.train.step]
        if best:
            found.append((as_text(f"{row.label}, lr {best[0].lr:g}"), best[0]))
        elif own:
            run = max(own, key=lambda run: run.train.step[-1])
            found.append((as_text(f"{row.label}, lr {run.lr:g} ({run.outcome})"), run))
    return found


def _points(comparison: Comparison) -> list[tuple[Row, int, float]]:
    """Rows with both a score and a known memory."""
    return [
        (row, size, row.score)
        for row in comparison.rows
        if row.score is not None and (size := row.model_memory_bytes) is not None
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred means over about a fortieth of the curve; fewer at its ends."""
    reach = len(values) // 80
    windows = [
        values[max(place - min(reach, place), 0) : place + min(reach, place) + 1] for place in range(len(values))
    ]
    return [sum(window) / len(window) for window in windows]


def _span(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the axis of losses: all but the fall at the beginning, and no more of a divergence than its start."""
    settled = [
        loss
        for curve in curves
        for step, loss in zip(curve.step, curve.loss, strict=True)
        if step >= UNSETTLED * curve.step[-1]
    ]
    starts = [curve.loss[0] for curve in curves if curve.loss]
    low, high = min(settled), min(max(settled), max(starts))
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _time_unit(seconds: float) -> tuple[float, str]:
    """What to divide seconds by, and its name."""
    return (3600.0, "h") if seconds >= 3 * 3600 else (60.0, "min") if seconds >= 180 else (1.0, "s")


def _label(figure: Figure, axes: Any, points: Sequence[tuple[Row, float, float]]) -> None:
    """Write the label beside each row's point, where it covers no point, bar or label as far as there is room.

    Args:
        figure: The figure, complete but for the labels.
        axes: Its panel.
        points: Each a row with a score, its place on the axis of memory, and the unit of scores on theirs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # the axes find their place
    renderer, panel = canvas.get_renderer(), axes.get_window_extent()
    taken = []
    for row, x, unit in points:
        ends = [axes.transData.transform((x, unit * of(row.scores.values()))) for of in (min, max)]
        taken.append(Bbox(ends).padded(POINT))
    for row, x, unit in points:
        point = (x, unit * (row.score or 0.0))
        text = axes.annotate(
            as_text(row.label), point, PLACES[0], textcoords="offset points", fontsize="small", zorder=5
        )
        found: list[tuple[float, int, tuple[int, int], Any]] = []
        for place in PLACES:
            _move(text, place)
            box = text.get_window_extent(renderer)
            outside = not all(map(panel.contains, *zip(box.min, box.max, strict=True)))
            found.append((sum(map(box.overlaps, taken)) + outside, len(found), place, box))
        _, _, best, box = min(found, key=lambda one: one[:2])
        _move(text, best)
        taken.append(box)


def _move(text: Any, place: tuple[int, int]) -> None:
    """Put a text at so many points from its mark, its near side towards it."""
    horizontal, vertical = place
    text.set_position(place)
    text.set_horizontalalignment("left" if horizontal > 0 else "right" if horizontal < 0 else "center")
    text.set_verticalalignment("bottom" if vertical > 0 else "top" if vertical < 0 else "center")
