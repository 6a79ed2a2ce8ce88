"""Validation perplexity of every method at its best learning rate: one model, one loop, the same tokens.

    python benchmarks/convergence.py --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz \\
        --output benchmarks/results/convergence_HARDWARE_YYYYMM.json

A LLaMA of about 4 M parameters; each variant at a small grid of learning rates (``grid.py``). Writes JSON with the
environment and prints the table.
"""

from __future__ import annotations

import argparse

from grid import Variant, add_arguments, run_all, summarise, write_report

RANK, GAP = 64, 50
PROJECTED = {"rank": RANK, "update_proj_gap": GAP, "alpha": 0.25, "basis": "power"}
CODE = PROJECTED | {"alpha_on": "subspace"}  # the authors' alpha
LOW = (1.5e-3, 3e-3, 6e-3)
MIDDLE = (3e-3, 6e-3, 1.2e-2)
HIGH = (5e-3, 1e-2, 2e-2)
VARIANTS = [
    Variant("full", "full", (1e-3, 2e-3, 4e-3)),
    Variant("full, matrices at lr / 4", "full", MIDDLE, {"matrix_lr_scale": 0.25}),
    Variant("full, matrices at lr / 4, eps 1e-6", "full", MIDDLE, {"matrix_lr_scale": 0.25, "eps": 1e-6}),
    Variant("galore", "galore", HIGH, PROJECTED),
    Variant("fira", "fira", LOW, CODE),
    Variant("fira, svd", "fira", LOW, CODE | {"basis": "svd"}),
    Variant("fira, alpha_on update", "fira", HIGH, PROJECTED | {"alpha_on": "update"}),
    Variant("fira, rotate_moments", "fira", LOW, CODE | {"rotate_moments": True}),
    Variant("fira, bfloat16 weights", "fira", (3e-3,), CODE, dtype="bfloat16"),
    Variant("fira, bfloat16 weights and moments", "fira", (3e-3,), CODE | {"state_dtype": None}, dtype="bfloat16"),
    Variant("apollo", "apollo", MIDDLE, PROJECTED | {"alpha": 1.0, "basis": "random"}),
]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=250, work="runs/convergence")
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    args = parser.parse_args()
    chosen = [variant for variant in VARIANTS if variant.name in args.variants]
    rows = run_all(chosen, args)
    write_report("convergence", [summarise(variant, rows[variant.name]) for variant in chosen], rows, args)


if __name__ == "__main__":
    main()
