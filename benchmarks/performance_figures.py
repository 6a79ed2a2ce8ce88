"""The figures of docs/performance.md: throughput of each run, and the time of optimizer steps against their bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fullrank.analysis.figure import COLOURS, GREY, new_figure, plain, save_png

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
PEERS = "transformers"
STEP_CASES = {
    ("torch AdamW fused", ""): "AdamW, fused",
    ("fullrank FiraAdamW", "power"): "Fira",
    ("fullrank FiraAdamW", "svd"): "Fira, SVD",
    ("fira FiraAdamW", "svd"): "Fira, package, SVD",
    ("pytorch_optimizer Fira", "svd"): "Fira, pytorch_optimizer, SVD",
    ("fullrank GaLoreAdamW", "power"): "GaLore",
    ("fullrank GaLoreAdamW", "svd"): "GaLore, SVD",
    ("galore-torch GaLoreAdamW", "svd"): "GaLore, package, SVD",
    ("fullrank ApolloAdamW", "random"): "APOLLO",
    ("apollo-torch APOLLOAdamW", "random"): "APOLLO, package",
}
"""Case and basis of step_time.py -> name of the bar."""
Report = dict[str, Any]


def draw(step_times: list[Report], throughputs: list[Report]) -> list[Path]:
    """Both figures; returns their files."""
    return [draw_step_time(step_times), draw_throughput(throughputs)]


def device_of(report: Report) -> str:
    return str(report["environment"]["gpu"] or "CPU")


def draw_throughput(reports: list[Report]) -> Path:
    """A panel a size: bars of the share of full AdamW's tokens a second, quartiles as whiskers."""
    panels = [(report, size) for report in reports for size in report["sizes"]]
    figure = new_figure(5.5 * len(panels), 0.4 + 0.27 * max(len(size["rows"]) for _, size in panels))
    for axes, (report, size) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = size["rows"]
        shares = [100 * row["ratio"] for row in rows]
        spread = [[100 * abs(row["ratio_quartiles"][end] - row["ratio"]) for row in rows] for end in (0, 1)]
        colours = [COLOURS[4] if row["case"].startswith(PEERS) else COLOURS[0] for row in rows]
        axes.barh(range(len(rows)), shares, color=colours, xerr=spread, error_kw={"ecolor": GREY, "elinewidth": 1})
        axes.axvline(100.0, color=GREY, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("tokens a second, % of full AdamW's")
        axes.set_title(
            f"LLaMA {size['size']}, {size['tokens_per_step']:,} tokens a step, {device_of(report)}", fontsize="medium"
        )
        plain(axes)
        axes.grid(visible=False, axis="y")
    return save_png(figure, FIGURES / "throughput.png")


def draw_step_time(reports: list[Report]) -> Path:
    """A panel a machine: bars of the time of a step with its share of a refresh, whole models, the bound as a line."""
    panels = [(report, size) for report in reports for size in report["settings"]["sizes"]]
    figure = new_figure(5.2 * len(panels), 3.4)
    for axes, (report, size) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = [row for row in report["rows"] if (row["size"], row["scope"]) == (size, "model")]
        dtype, rank = rows[0].get("dtype"), rows[0]["rank"]  # the first of several
        rows = [row for row in rows if (row.get("dtype"), row["rank"]) == (dtype, rank)]
        bound = next(row["step_s"] for row in rows if row["case"] == "bound")
        wanted = {(row["case"], row["basis"]): row for row in rows}
        shown = [(name, wanted[key]) for key, name in STEP_CASES.items() if key in wanted]
        steps = [1e3 * row["step_s"] for _, row in shown]
        rest = [1e3 * (row["amortised_s"] - row["step_s"]) for _, row in shown]
        own = ("fullrank", "torch ")
        colours = [COLOURS[0] if row["case"].startswith(own) else COLOURS[4] for _, row in shown]
        axes.barh(range(len(shown)), steps, color=colours)
        axes.barh(range(len(shown)), rest, left=steps, color=COLOURS[1], label="refresh, over 200 steps")
        axes.axvline(1e3 * bound, color=GREY, linewidth=1, linestyle="--", label="bound of Fira and GaLore")
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a step")
        axes.set_title(f"LLaMA {size}, {dtype or 'float32'}, {device_of(report)}", fontsize="medium")
        plain(axes)
        axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize="small")
    return save_png(figure, FIGURES / "step_time.png")
