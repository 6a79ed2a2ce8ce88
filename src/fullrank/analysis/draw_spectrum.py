"""The figure of spectra: for each type of matrix the singular values of what training changed, a line for each run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fullrank.analysis.figure import COLOURS, GREY, STYLES, as_text, new_figure, plain, save_png
from fullrank.analysis.spectrum import Spectrum
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 6
"""How far below the largest singular value a panel reaches: what is lower is rounding."""


def draw(spectra: Mapping[str, Spectrum], path: str | Path) -> Path:
    """Draw the spectra of runs, by their labels, as a PNG.

    Raises:
        ConfigError: If there is none.
        UnsupportedError: If matplotlib is not installed.
    """
    return save_png(make_figure(spectra), path)


def make_figure(spectra: Mapping[str, Spectrum]) -> Figure:
    """The figure that ``draw`` saves, at most four panels in a row."""
    if not spectra:
        raise ConfigError("spectra must hold at least one run, got none.")
    kinds = list(dict.fromkeys(kind for found in spectra.values() for kind in found.types))
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    width = max(1 + 2.9 * columns, 5.0)  # inches
    longest = max(len("threshold 0.1"), *map(len, spectra))
    ncols = max(int(width / (0.8 + 0.09 * longest)), 1)
    height = 0.8 + 2.5 * rows + 0.22 * -(-(len(spectra) + 1) // ncols)
    figure = new_figure(width, height)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    places = list(grid.flat)
    largest = max(found.types[kind].largest for found in spectra.values() for kind in found.types)
    limits = [found.threshold for found in spectra.values()]
    top = max(largest, *limits)
    places[0].set(yscale="log", ylim=(min(top / 10**DECADES, min(limits) / 10), 2 * top))  # all share it
    for axes, kind in zip(places, kinds, strict=False):
        _draw_panel(axes, kind, spectra)
    for axes in places[len(kinds) :]:
        axes.remove()
    for axes in places[max(len(kinds) - columns, 0) : len(kinds)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("place of the singular value, largest first (% of all)", fontsize="medium")
    figure.supylabel("singular value, mean over layers", fontsize="medium")
    handles, labels = _legend(places[: len(kinds)])
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), ncols), frameon=False)
    return figure


def _draw_panel(axes: Any, kind: str, spectra: Mapping[str, Spectrum]) -> None:
    """One line a run, and the threshold."""
    for number, (label, found) in enumerate(spectra.items()):
        if kind not in found.types:
            continue
        values = found.types[kind].mean_values()
        places = torch.linspace(0, 100, len(values) + 1)[1:]
        axes.plot(
            places.tolist(),
            [value if value > 0 else float("nan") for value in values.tolist()],  # zero has no place on the axis
            color=COLOURS[number % len(COLOURS)],
            linestyle=STYLES[number % len(STYLES)],
            linewidth=1.8,
            label=as_text(label),
        )
    for limit in sorted({found.threshold for found in spectra.values()}):
        axes.axhline(limit, color=GREY, linewidth=0.8, linestyle=":", label=f"threshold {limit:g}")
    axes.set_xlim(0, 100)
    axes.set_title(kind, fontsize="medium")
    plain(axes)


def _legend(panels: list[Any]) -> tuple[list[Any], list[str]]:
    """Every label once, whichever panel has it; thresholds last."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: label.startswith("threshold "))
    return [found[label] for label in labels], labels
