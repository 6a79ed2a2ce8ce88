"""The figure of scaling.py: what is sent for how long, and what state a GPU holds, over the number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling import BATCH_TOKENS, CASES, NETWORKS, Case, Network, communication, layouts, project
from scaling_machine import Machine

from fullrank.analysis.figure import COLOURS, GREY, STYLES, new_figure, plain, save_png

SHOWN = [8 << power for power in range(10)]
LINES = (
    ("fsdp2", "full"),
    ("fsdp2", "fira"),
    ("fsdp2", "apollo"),
    ("fsdp2, shard_size 8", "fira"),
    ("ddp", "fira"),
    ("ddp, partition_states", "fira"),
)
"""Strategy and method of each line; GaLore's are Fira's."""
LEAST, MOST = 2e-3, 2e2
"""Gigabytes at the foot and the top of the lower panels."""


def draw(path: Path) -> None:
    """Two rows of panels over the number of GPUs, a column for each model."""
    machine = Machine()
    figure = new_figure(9.0, 7.0)
    panels = figure.subplots(2, len(NETWORKS), sharex=True, sharey="row")
    for column, (model, network) in enumerate(NETWORKS.items()):
        top, foot = panels[0][column], panels[1][column]
        for number, (strategy, method) in enumerate(LINES):
            found = [project_at(world, strategy, CASES[method], network, machine) for world in SHOWN]
            style: dict[str, Any] = {"color": COLOURS[number], "linestyle": STYLES[number % len(STYLES)]}
            label = f"{method}, {strategy}"
            top.plot(SHOWN, [communication(row) / row["compute_s"] for row in found], label=label, **style)
            foot.plot(SHOWN, [row["states_gb"] for row in found], label=label, **style)
        top.axhline(1.0, color=GREY, linewidth=0.8)
        top.set_title(f"LLaMA {model}, {BATCH_TOKENS / 2**20:g} Mi tokens a step")
        for axes in (top, foot):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            plain(axes)
        foot.set_xticks(SHOWN, [str(world) for world in SHOWN], rotation=45)
        foot.set_xlabel("GPUs")
    panels[0][0].set_ylabel("seconds that a step sends\nover seconds that it computes")
    panels[1][0].set_ylabel("optimizer state of a GPU, GB")
    panels[1][0].set_ylim(LEAST, MOST)
    panels[0][0].legend(frameon=False, fontsize="small")
    save_png(figure, path)


def project_at(world: int, strategy: str, case: Case, network: Network, machine: Machine) -> dict[str, float]:
    """One point of a line."""
    return project(case, network, layouts(world, machine)[strategy], machine)
