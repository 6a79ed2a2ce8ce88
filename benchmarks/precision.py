"""Validation perplexity by the types of weights and moments and by rounding: one model, one loop, the same tokens.

    python benchmarks/precision.py --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz \\
        --output benchmarks/results/precision_HARDWARE_YYYYMM.json

The model and the loop of ``convergence.py`` at one learning rate for each method, the best of that benchmark for
float32 weights. Besides, how a second moment follows gradients whose size changes, in each type. Writes JSON with the
environment and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from grid import Variant, add_arguments, run, write_report

FIRA = {"rank": 64, "update_proj_gap": 50, "alpha": 0.25, "basis": "power", "alpha_on": "update"}
FULL = {"matrix_lr_scale": 0.25}
MOMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "fira": {
        "float32": {"state_dtype": "float32", "plain_state_dtype": "float32"},
        "float32, plain bfloat16": {"state_dtype": "float32", "plain_state_dtype": "bfloat16"},
        "bfloat16": {"state_dtype": "bfloat16", "plain_state_dtype": "bfloat16"},
        "8bit": {"state_dtype": "8bit"},
    },
    "full": {name: {"state_dtype": name} for name in ("float32", "bfloat16", "8bit")},
}
"""Moments of each method by name: of low-rank ones, and of plain ones if they differ."""
METHODS = {"fira": (5e-3, FIRA), "full": (1.5e-3, FULL)}
REPEATED = (
    "fira, float32, moments float32, nearest",
    "fira, bfloat16, moments float32, nearest",
    "fira, bfloat16, moments float32, stochastic",
    "fira, bfloat16, moments 8bit, stochastic",
)
"""Variants that are trained with every seed, because a choice rests on them; the others with the first."""
FOLLOWED = 10_000
"""Steps for which a second moment follows."""


def variants() -> list[Variant]:
    """Float32 weights with float32 and 8-bit moments, and bfloat16 weights with all, rounded either way."""
    found = []
    for method, (rate, options) in METHODS.items():
        for weights in ("float32", "bfloat16"):
            for moments, types in MOMENTS[method].items():
                for rounding in ("nearest", "stochastic"):
                    if weights == "float32" and (rounding == "stochastic" or moments not in ("float32", "8bit")):
                        continue
                    if rounding == "stochastic" and moments == "bfloat16":
                        continue
                    if method == "full" and moments == "8bit" and rounding == "nearest":
                        continue
                    name = f"{method}, {weights}, moments {moments.replace(', ', ' ')}, {rounding}"
                    more = {**options, **types, "weight_rounding": rounding}
                    found.append(Variant(name, method, (rate,), more, dtype=weights))
    return found


def follow() -> list[dict[str, Any]]:
    """A second moment (betas[1] = 0.999) of 4,096 entries, over the exact one, mean of roots.

    ``steady``: gradients of one size. ``fallen``: after as many steps of gradients a hundredth of that size.
    """
    import torch

    from fullrank import AdamW

    rows = []
    for kept in ("float32", "bfloat16", "8bit"):
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = AdamW([weight], lr=1e-3, weight_decay=0.0, state_dtype=kept)
        generator = torch.Generator().manual_seed(0)
        exact, found = torch.zeros(64, 64, dtype=torch.float64), []
        for size in (1.0, 0.01):
            for _ in range(FOLLOWED):
                weight.grad = size * torch.randn(64, 64, generator=generator)
                exact.mul_(0.999).addcmul_(weight.grad.double(), weight.grad.double(), value=0.001)
                optimizer.step()
            state = optimizer.state[weight]
            found.append((read(state).sqrt().mean() / exact.sqrt().mean()).item())
        rows.append({"moments": kept, "steady": found[0], "fallen": found[1]})
    return rows


def read(state: dict[str, Any]) -> Any:
    """The second moment as numbers."""
    from fullrank import moments

    return moments.read(state, "exp_avg_sq").double()


def summarise(variant: Variant, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    each = [row["perplexity"] for row in sorted(rows, key=lambda row: row["seed"])]
    return {
        "variant": variant.name,
        "method": variant.method,
        "weights": variant.dtype,
        "moments": next(
            name for name, types in MOMENTS[variant.method].items() if types.items() <= variant.options.items()
        ),
        "rounding": variant.options["weight_rounding"],
        "options": variant.options,
        "lr": variant.rates[0],
        "perplexity": statistics.fmean(each),
        "perplexity_by_seed": each,
        "optimizer_state_bytes": rows[0]["optimizer_state_bytes"],
        "adamw_state_bytes": rows[0]["adamw_state_bytes"],
    }


def page_tables(report: dict[str, Any]) -> list[str]:
    """The lines of the two tables of docs/precision.md."""
    seeds = [f"seed {seed}" for seed in report["seeds"]]
    lines = [
        f"| method | weights | moments | rounding | {' | '.join(seeds)} | state |",
        "|" + " --- |" * (5 + len(seeds)),
    ]
    for row in report["results"]:
        found = [f"{value:.1f}" for value in row["perplexity_by_seed"]]
        found += ["-"] * (len(seeds) - len(found))
        state = row["optimizer_state_bytes"] / (2 * 4 * report["model"]["parameters"])
        cells = [row["method"], row["weights"], row["moments"], row["rounding"], *found]
        lines.append(f"| {' | '.join(cells)} | {state:.0%} |")
    lines += ["", "| moments | gradients of one size | a hundredth of it |", "| --- | --- | --- |"]
    lines += [f"| {row['moments']} | {row['steady']:.2f} | {row['fallen']:.2f} |" for row in report["followed"]]
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=250, work="runs/precision")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    chosen = [variant for variant in variants() if variant.method in args.methods]
    todo = [
        (variant, variant.rates[0], seed)
        for seed in args.seeds
        for variant in chosen
        if variant.name in REPEATED or seed == args.seeds[0]
    ]
    rows: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(run, *zip(*todo, strict=True), [args] * len(todo)):
            rows[row["variant"]].append(row)
    followed = follow()
    table = [summarise(variant, rows[variant.name]) for variant in chosen]
    write_report("precision", table, rows, args, followed_steps=FOLLOWED, followed=followed)
    print("\n".join(page_tables(json.loads(args.output.read_text()))))


if __name__ == "__main__":
    main()
