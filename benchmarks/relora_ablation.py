r"""The paper's ablation of ReLoRA (arXiv:2307.05695, Table 6) on a small scale, with the spectra of its runs.

    python benchmarks/relora_ablation.py --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz \
        --figures docs/figures --output benchmarks/results/relora_ablation_HARDWARE_YYYYMM.json

A LLaMA of about 4 M parameters; each variant at a small grid of learning rates (``grid.py``), all over the same
tokens and the same number of steps, those of the warm start included. Then the singular values of what the best
run of each variant changed since the warm start (since the beginning, for those without one).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from grid import Variant, add_arguments, best_row, run_all, summarise, write_report

from fullrank.analysis.draw_spectrum import draw
from fullrank.analysis.figure import COLOURS, STYLES
from fullrank.analysis.spectrum import spectrum, table
from fullrank.train.report import read_metrics
from fullrank.train.start import start_weights
from fullrank.weights import from_tensors, read_weights

RANK, CYCLE, RISE, WARM_START = 32, 75, 10, 120
"""Rank of the factors, length of a cycle, of its warm-up, and of the warm start (optimizer steps)."""
FULL_LR = 1e-3
"""Rate of full-rank training, and so of the warm starts; the grid of ``full`` holds it."""
LORA = {"rank": RANK, "lora_alpha": RANK}
RESTARTS = LORA | {"restart_every": CYCLE}
RATES = (1e-3, 2e-3)
WARM = {"warm_start_steps": WARM_START, "warm_start_lr": FULL_LR, "restart_warmup_steps": RISE}
VARIANTS = [
    Variant("full", "full", (FULL_LR / 2, FULL_LR, FULL_LR * 2)),
    Variant("lora", "lora", RATES, LORA),
    Variant("lora + restarts", "relora", RATES, RESTARTS | {"reset": "keep", "restart_warmup_steps": 0}),
    Variant("lora + restarts + reset", "relora", RATES, RESTARTS | {"restart_warmup_steps": 0}),
    Variant("lora + restarts + jagged", "relora", RATES, RESTARTS | {"reset": "keep", "restart_warmup_steps": RISE}),
    Variant("lora + restarts + reset + jagged", "relora", RATES, RESTARTS | {"restart_warmup_steps": RISE}),
    Variant("lora + warm start", "lora", RATES, LORA | WARM),
    Variant("lora + restarts + reset + jagged + warm start", "relora", RATES, RESTARTS | WARM),
    Variant("galore", "galore", (5e-3,), {"rank": RANK, "update_proj_gap": CYCLE, "alpha": 0.25}),
    Variant("fira", "fira", (1e-2,), {"rank": RANK, "update_proj_gap": CYCLE, "alpha": 0.25, "alpha_on": "update"}),
]


SMOOTHED = 3
"""Logged losses that one point of a curve is the mean of; one is logged every 10 steps."""
AFTER_WARM_START = {
    "full": "full",
    "ReLoRA": "lora + restarts + reset + jagged + warm start",
    "LoRA": "lora + warm start",
}
"""Whose change since the warm start is compared, as in the paper: all three went through the same one."""
FROM_SCRATCH = {
    "full": "full",
    "Fira": "fira",
    "GaLore": "galore",
    "ReLoRA": "lora + restarts + reset + jagged",
    "LoRA": "lora",
}
"""Whose whole change is compared."""


def measure_spectra(rows: dict[str, list[dict[str, Any]]], figures: Path) -> dict[str, Any]:
    """Singular values of what the best run of each variant changed, and a figure for each comparison."""
    folders = {name: Path(best_row(found)["folder"]) for name, found in rows.items()}
    full = {row["lr"]: Path(row["folder"]) for row in rows["full"] if row["seed"] == rows["full"][0]["seed"]}
    started = folders[AFTER_WARM_START["ReLoRA"]] / "warm_start"
    measured = {}
    for title, chosen in (("after_warm_start", AFTER_WARM_START), ("from_scratch", FROM_SCRATCH)):
        found = {}
        for label, variant in chosen.items():
            folder = folders[variant]
            if title == "after_warm_start":
                base = read_weights(started)
                folder = full[FULL_LR] if variant == "full" else folder  # the warm start's rate: the same first steps
            else:
                base = from_tensors(start_weights(folder), source="its initial weights")
            found[label] = spectrum(read_weights(folder), base)
        draw(found, figures / f"relora_spectra_{title}.png")
        print(table(found))
        measured[title] = {label: without_curves(one.to_dict()) for label, one in found.items()}
    return measured


def without_curves(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of each type of matrix; the curves are in the figure."""
    keys = ("num_values", "num_below", "effective_rank", "numerical_rank", "largest")
    types = {name: {key: numbers[key] for key in keys} for name, numbers in found["types"].items()}
    return {"threshold": found["threshold"], "types": types}


def draw_losses(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss over the optimizer steps, the best run of each variant of the ablation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown = [variant for variant in VARIANTS if variant.method in ("full", "lora", "relora")]
    for number, variant in enumerate(shown):
        logged = [row for row in read_metrics(Path(best_row(rows[variant.name])["folder"])) if "loss" in row]
        windows = [logged[i : i + SMOOTHED] for i in range(0, len(logged) - SMOOTHED + 1)]
        axes.plot(
            [window[-1]["step"] for window in windows],
            [statistics.fmean(row["loss"] for row in window) for window in windows],
            color=COLOURS[number % len(COLOURS)],
            linestyle=STYLES[number % len(STYLES)],
            label=variant.name,
        )
    axes.set(xlabel="optimizer step", ylabel=f"training loss, mean of {SMOOTHED * 10} steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=500, work="runs/relora_ablation")
    parser.add_argument("--figures", type=Path, required=True, help="folder of the figures")
    args = parser.parse_args()
    rows = run_all(VARIANTS, args)
    results = [summarise(variant, rows[variant.name]) for variant in VARIANTS]
    args.figures.mkdir(parents=True, exist_ok=True)
    draw_losses(rows, args.figures / "relora_ablation.png")
    spectra = measure_spectra(rows, args.figures)
    lengths = {"rank": RANK, "restart_every": CYCLE, "restart_warmup_steps": RISE, "warm_start_steps": WARM_START}
    write_report("relora_ablation", results, rows, args, **lengths, spectra=spectra)


if __name__ == "__main__":
    main()
