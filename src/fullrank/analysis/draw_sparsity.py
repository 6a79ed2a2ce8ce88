"""The figure of a gradient's sparsity: share of the norm against share of the entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fullrank.analysis.gradient_sparsity import GradientSparsity, Shares
from fullrank.errors import ConfigError, UnsupportedError

# Okabe and Ito's palette, told apart by colour-blind readers; every kind of line also has a style of its own.
WEIGHT, ALL, BY_MATRIX, CLAIM, GAUSSIAN = "#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#555555"


def draw(panels: Mapping[str, GradientSparsity], path: str | Path) -> Path:
    """Draw the share of the norm against the density as a PNG: a panel for each measurement, by its title.

    Raises:
        ConfigError: If there is no panel.
        UnsupportedError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib. Install it: pip install 'fullrank[report]'") from error
    if not panels:
        raise ConfigError("panels must hold at least one measurement, got none.")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.3 * columns, 0.9 + 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = list(grid.flat)
    for axes, (title, measured) in zip(places, panels.items(), strict=False):
        _draw_panel(axes, measured, title)
    for axes in places[len(panels) :]:
        axes.remove()
    figure.supxlabel("density: share of the entries kept, largest first (%)", fontsize="medium")
    figure.supylabel("share of the gradient's L2 norm (%)", fontsize="medium")
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns + 1, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    return Path(path)


def _draw_panel(axes: Any, measured: GradientSparsity, title: str) -> None:
    """One line a weight, the whole model thick, and what to compare them with."""
    order = sorted(range(len(measured.densities)), key=measured.densities.__getitem__)
    x = [100 * measured.densities[i] for i in order]

    def line(shares: Shares, **style: Any) -> None:
        axes.plot(x, [100 * shares.norm[i] for i in order], **style)

    drawn = [row.shares for row in measured.weights if row.shares]
    for number, shares in enumerate(drawn):
        label = f"one weight ({len(drawn)})" if number == 0 else None
        line(shares, color=WEIGHT, linewidth=0.7, alpha=0.5, label=label)
    assert measured.model.shares is not None  # summarise refuses a gradient of zeros
    assert measured.by_matrix.shares is not None
    line(measured.model.shares, color=ALL, linewidth=2.6, label="all, the largest of all")
    line(measured.by_matrix.shares, color=BY_MATRIX, linewidth=1.6, linestyle="--", label="all, the largest of each")
    gaussian = [100 * gaussian_norm_share(density / 100) for density in x]
    axes.plot(x, gaussian, color=GAUSSIAN, linewidth=1.2, linestyle=":", label="entries of a Gaussian")
    axes.axvline(1, color=CLAIM, linewidth=0.9)
    axes.plot([1], [99], "x", color=CLAIM, markersize=9, markeredgewidth=2.4, label="SIFT's paper: 1% hold 99%")
    axes.set(xscale="log", xlim=(x[0], 100), ylim=(0, 103), title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def gaussian_norm_share(density: float) -> float:
    """The share of the L2 norm that the largest of many Gaussian entries hold, in closed form."""
    if density >= 1:
        return 1.0
    threshold = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - density, dtype=torch.float64)))
    bell = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(density + 2 * threshold * bell)
