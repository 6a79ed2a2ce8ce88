"""The figure of a plan: for each method what a GPU holds at its peak, one bar a variant, and where the GPU ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.analysis.figure import COLOURS, GREY, as_text, new_figure, plain, save_png, save_svg
from fullrank.plan.options import Budget
from fullrank.plan.usage import Usage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fullrank.plan.run import Row

PARTS = ("weights", "states", "gradients", "other")
"""From the axis outwards: what stays, then what comes and goes."""
WORDS = {
    "weights": "weights",
    "states": "optimizer states",
    "gradients": "gradients",
    "other": "activations and temporaries",
}
VARIANTS = {
    "as asked": "as asked",
    "with checkpointing": "+ checkpointing",
    "with both": "+ update in backward",
    "with 8-bit states": "+ 8-bit states",
}
"""Variants that are drawn, and what they are called: the third has what the second has."""
BAR, GAP = 0.8, 0.9
"""Of a bar's row, and between methods."""


def draw(rows: Mapping[str, Row], budget: Budget | None, title: str) -> Figure:
    """Stacked bars, methods from the top.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    bars, place = [], 0.0
    heads = {}
    for name, row in rows.items():
        shown = {words: row.variants[key] for key, words in VARIANTS.items() if key in row.variants}
        heads[name] = place
        for words, usage in shown.items():
            bars.append((place, words, usage))
            place += 1.0
        place += GAP
    figure = new_figure(8.5, 1.3 + 0.19 * place)
    axes: Any = figure.add_subplot()
    for at, _, usage in bars:
        _bar(axes, at, usage)
    axes.set_yticks([at for at, _, _ in bars], [words for _, words, _ in bars], fontsize=7)
    for name, at in heads.items():
        axes.annotate(as_text(name), (-0.19, at), xycoords=("axes fraction", "data"), ha="right", va="center",
                      fontweight="bold", fontsize=9)  # fmt: skip
    if budget is not None:
        axes.axvline(budget.usable / (1 << 30), color=GREY, linestyle="--", linewidth=1.2)
        axes.annotate("usable", (budget.usable / (1 << 30), 1.0), xycoords=("data", "axes fraction"), fontsize=7,
                      color=GREY, ha="center", va="bottom")  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak of a step")
    axes.set_title(as_text(title), fontsize=8, loc="left", pad=14)
    plain(axes)
    axes.grid(visible=False, axis="y")
    handles = [axes.barh([0], [0], color=_colour(part), label=WORDS[part]) for part in PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write it in the format of the file's name, whole or not at all."""
    if path.suffix == ".png":
        save_png(figure, path)
    else:
        save_svg(figure, path)


def _bar(axes: Any, at: float, usage: Usage) -> None:
    start = 0.0
    for part in PARTS:
        width = getattr(usage.at_peak, part) / (1 << 30)
        axes.barh([at], [width], left=[start], height=BAR, color=_colour(part), linewidth=0)
        start += width
    axes.annotate(f" {start:.1f}" if start >= 10 else f" {start:.2f}", (start, at), va="center", fontsize=7)


def _colour(part: str) -> str:
    return COLOURS[PARTS.index(part)]
