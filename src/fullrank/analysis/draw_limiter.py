"""The figure of the limiter: training loss and norm of the scaled residual with it and without it, and its factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fullrank.analysis.figure import COLOURS, GREY, STYLES, new_figure, plain
from fullrank.analysis.limiter import Limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_FACTOR = 0.01
"""The darkest colour: what the limiter holds back more than a hundredfold looks the same."""


def make_figure(found: Limits) -> Figure:
    """Three panels over the optimizer steps: loss, norm, and a map of the factors (matrix by step).

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    heights = [2.6, 2.6, max(2.4, 0.07 * len(found.matrices) + 0.8)]
    figure = new_figure(8.0, sum(heights))
    panels = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    _draw_losses(panels[0], found)
    _draw_norms(panels[1], found)
    _draw_factors(figure, panels[2], found)
    steps = [step for _, run in found.runs() for step in (*run.loss_steps, *run.steps)]
    panels[2].set_xlim(min(steps) - 0.5, max(steps) + 0.5)  # the map would cut off what lies beside the traced steps
    panels[2].set_xlabel("optimizer step")
    return figure


def _draw_losses(axes: Any, found: Limits) -> None:
    """Training loss, with a mark above every spike."""
    for number, (label, run) in enumerate(found.runs()):
        style: dict[str, Any] = {"color": COLOURS[number], "linestyle": STYLES[number]}
        axes.plot(run.loss_steps, run.losses, linewidth=1.2, label=f"{label}: {len(run.spikes)} spikes", **style)
        losses = dict(zip(run.loss_steps, run.losses, strict=True))
        tops = [max((s for s in losses if one.first <= s <= one.last), key=losses.__getitem__) for one in run.spikes]
        axes.plot(tops, [losses[step] for step in tops], "v", color=COLOURS[number], markersize=6)
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, fontsize="small")
    plain(axes)


def _draw_norms(axes: Any, found: Limits) -> None:
    """Norm over all matrices of what goes into the update, and thinly what it was before the limiter."""
    before = found.on.total_norms(limited=False)
    axes.plot(found.on.steps, _positive(before), color=GREY, linewidth=0.7, label="with limiter, before it")
    for number, (label, run) in enumerate(found.runs()):
        axes.plot(
            run.steps,
            _positive(run.total_norms(limited=True)),
            color=COLOURS[number],
            linestyle=STYLES[number],
            linewidth=1.2,
            label=label,
        )
    axes.set(yscale="log", ylabel="norm of the scaled\nresidual, all matrices")
    axes.legend(frameon=False, fontsize="small")
    plain(axes)


def _draw_factors(figure: Figure, axes: Any, found: Limits) -> None:
    """A row for each matrix, sorted by type, a column for each traced step; white: the limiter did not act."""
    rows = [matrix for matrices in list(found.types().values())[:-1] for matrix in matrices]
    steps = found.on.steps
    values = [[_logarithm(factor) for factor in found.on.factors[matrix.name]] for matrix in rows]
    between = (steps[-1] - steps[0]) / max(len(steps) - 1, 1)
    extent = (steps[0] - between / 2, steps[-1] + between / 2, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues_r",
        vmin=math.log10(LEAST_FACTOR),
        vmax=0,
        extent=extent,
    )
    kinds = [matrix.kind for matrix in rows]
    axes.set_yticks([kinds.index(kind) + (kinds.count(kind) - 1) / 2 for kind in dict.fromkeys(kinds)])
    axes.set_yticklabels(list(dict.fromkeys(kinds)), fontsize="small")
    for place in range(1, len(rows)):
        if kinds[place] != kinds[place - 1]:
            axes.axhline(place - 0.5, color=GREY, linewidth=0.5)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, pad=0.02)
    bar.set_ticks([math.log10(LEAST_FACTOR), math.log10(0.1), 0], labels=[f"{LEAST_FACTOR:g} or less", "0.1", "1"])
    bar.set_label("factor of the limiter", fontsize="small")


def _positive(values: list[float]) -> list[float]:
    """The same with gaps where a logarithmic axis has no place."""
    return [value if value > 0 else math.nan for value in values]


def _logarithm(factor: float | None) -> float:
    return math.nan if factor is None else math.log10(max(factor, LEAST_FACTOR))
