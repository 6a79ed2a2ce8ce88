"""The figure of similarity: low-rank against full-rank scaling factors, a point for each matrix or column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fullrank.analysis.figure import COLOURS, new_figure, plain
from fullrank.analysis.similarity import Correlation, MatrixPair, Similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def make_figure(found: Similarity) -> Figure:
    """Two panels, matrix level and column level, on logarithmic axes; the colour is the type of matrix.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    num_panels = 1 if found.column is None else 2
    figure = new_figure(4.6 * num_panels, 4.6)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    kinds = list(dict.fromkeys(pair.kind for pair in found.matrices))
    _draw(panels[0], found.matrices, kinds, lambda pair: ([pair.low], [pair.full]), size=34, alpha=0.9)
    _title(panels[0], "matrix level", found.matrix)
    if found.column is not None:
        _draw(panels[1], found.matrices, kinds, lambda pair: (pair.low_columns, pair.full_columns), size=5, alpha=0.35)
        _title(panels[1], "column level", found.column)
    figure.supxlabel("scaling factor, full-rank AdamW (mean over steps)", fontsize="medium")
    figure.supylabel("scaling factor, low-rank (mean over steps)", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4 * num_panels), frameon=False)
    return figure


def _draw(
    axes: Any,
    pairs: Sequence[MatrixPair],
    kinds: Sequence[str],
    points: Callable[[MatrixPair], tuple[Sequence[float], Sequence[float]]],
    *,
    size: float,
    alpha: float,
) -> None:
    for number, kind in enumerate(kinds):
        low = [value for pair in pairs if pair.kind == kind for value in points(pair)[0]]
        full = [value for pair in pairs if pair.kind == kind for value in points(pair)[1]]
        axes.scatter(
            full,
            low,
            s=size,
            alpha=alpha,
            linewidths=0,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=kind,
            rasterized=len(low) > 200,  # thousands of points are a picture in the SVG
        )
    axes.set(xscale="log", yscale="log")
    plain(axes)


def _title(axes: Any, words: str, correlation: Correlation) -> None:
    axes.set_title(f"{words}: Spearman {correlation.spearman:.4f}, Kendall {correlation.kendall:.4f}", fontsize="small")
