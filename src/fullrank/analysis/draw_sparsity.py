"""The figure of a gradient's sparsity: share of the norm against share of the entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fullrank.analysis.figure import COLOURS, GREY, as_text, new_figure, plain, save_png
from fullrank.analysis.sparsity import GradientSparsity, Shares
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL, CLAIM, _, _, WEIGHT, BY_MATRIX, _ = COLOURS


def draw(panels: Mapping[str, GradientSparsity], path: str | Path) -> Path:
    """Draw the share of the norm against the density as a PNG: a panel for each measurement, by its title.

    Raises:
        ConfigError: If there is no panel.
        UnsupportedError: If matplotlib is not installed.
    """
    return save_png(make_figure(panels), path)


def make_figure(panels: Mapping[str, GradientSparsity]) -> Figure:
    """The figure that ``draw`` saves, at most two panels in a row."""
    if not panels:
        raise ConfigError("panels must hold at least one measurement, got none.")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(1 + 4.3 * columns, 0.9 + 3.1 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = list(grid.flat)
    for axes, (title, measured) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, measured, title)
    for axes in places[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the gradient's L2 norm (%)")
    for axes in places[max(len(panels) - columns, 0) : len(panels)]:  # the lowest of each column
        axes.set_xlabel("density: share of the entries, largest first (%)")
        axes.tick_params(labelbottom=True)
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns + 1, frameon=False, fontsize="small")
    return figure


def _draw_panel(axes: Any, measured: GradientSparsity, title: str) -> None:
    """One line a weight, the whole model thick, and what to compare them with."""
    order = sorted(range(len(measured.densities)), key=measured.densities.__getitem__)
    x = [100 * measured.densities[i] for i in order]

    def line(shares: Shares, first: int = 0, **style: Any) -> None:
        axes.plot(x[first:], [100 * shares.norm[i] for i in order[first:]], **style)

    drawn = [(row.shares, row.numel) for row in measured.weights if row.shares]
    for number, (shares, numel) in enumerate(drawn):
        # Below one entry there is nothing to see: one is kept, whatever the density.
        first = sum(density * numel < 1 for density in measured.densities)
        line(shares, first, color=WEIGHT, linewidth=0.8, alpha=0.6, label="each weight" if number == 0 else None)
    assert measured.model.shares is not None  # summarise refuses a gradient of zeros
    assert measured.by_matrix.shares is not None
    line(measured.model.shares, color=ALL, linewidth=2.6, label="all weights, largest of all")
    line(
        measured.by_matrix.shares, color=BY_MATRIX, linewidth=1.6, linestyle="--", label="all weights, largest of each"
    )
    gaussian = [100 * gaussian_norm_share(density / 100) for density in x]
    axes.plot(x, gaussian, color=GREY, linewidth=1.2, linestyle=":", label="entries of a Gaussian")
    axes.axvline(1, color=CLAIM, linewidth=0.9)
    axes.plot([1], [99], "x", color=CLAIM, markersize=9, markeredgewidth=2.4, label="SIFT's paper: 1% hold 99%")
    if 0.01 in measured.densities:
        share = 100 * measured.model.shares.norm[measured.densities.index(0.01)]
        axes.plot([1], [share], "o", color=ALL, markersize=6)
        axes.annotate(
            f"{share:.0f}%",
            (1, share),
            (8, -15),
            textcoords="offset points",
            color=ALL,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set(xscale="log", xlim=(x[0], 100), ylim=(0, 103))
    axes.set_title(as_text(title), fontsize="medium")
    axes.xaxis.set_major_formatter("{x:g}")
    plain(axes)


def gaussian_norm_share(density: float) -> float:
    """The share of the L2 norm that the largest of many Gaussian entries hold, in closed form."""
    if density >= 1:
        return 1.0
    threshold = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - density, dtype=torch.float64)))
    bell = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(density + 2 * threshold * bell)
