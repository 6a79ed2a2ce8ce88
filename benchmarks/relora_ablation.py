"""The paper's ablation of ReLoRA (arXiv:2307.05695, Table 4) on a small scale, with the spectra of its runs.

    python benchmarks/relora_ablation.py --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz

A LLaMA of about 4 M parameters; each variant at a small grid of learning rates (``grid.py``), all over the same
tokens and the same number of steps, those of the warm start included. Then the singular values of what the best
run of each variant changed since the warm start (since the beginning, for those without one).
"""

from __future__ import annotations

import argparse

from grid import Variant, add_arguments, run_all, summarise, write_report

RANK, CYCLE, RISE, WARM_START = 32, 75, 10, 125
"""Rank of the factors, length of a cycle, of its warm-up, and of the warm start (optimizer steps)."""
FULL_LR = 1e-3
"""Rate of full-rank training, and so of the warm starts; the grid of ``full`` holds it."""
LORA = {"rank": RANK, "lora_alpha": RANK}
RESTARTS = LORA | {"restart_every": CYCLE}
RATES = (4e-3, 8e-3)
WARM = {"warm_start_steps": WARM_START, "warm_start_lr": FULL_LR, "restart_warmup_steps": RISE}
VARIANTS = [
    Variant("full", "full", (FULL_LR / 2, FULL_LR, FULL_LR * 2)),
    Variant("lora", "lora", RATES, LORA),
    Variant("lora + restarts", "relora", RATES, RESTARTS | {"reset": "none", "restart_warmup_steps": 0}),
    Variant("lora + restarts + reset", "relora", RATES, RESTARTS | {"restart_warmup_steps": 0}),
    Variant("lora + restarts + jagged", "relora", RATES, RESTARTS | {"reset": "none", "restart_warmup_steps": RISE}),
    Variant("lora + restarts + reset + jagged", "relora", RATES, RESTARTS | {"restart_warmup_steps": RISE}),
    Variant("lora + warm start", "lora", RATES, LORA | WARM),
    Variant("lora + restarts + reset + jagged + warm start", "relora", RATES, RESTARTS | WARM),
    Variant("galore", "galore", (5e-3,), {"rank": RANK, "update_proj_gap": CYCLE, "alpha": 0.25}),
    Variant("fira", "fira", (1e-2,), {"rank": RANK, "update_proj_gap": CYCLE, "alpha": 0.25, "alpha_on": "update"}),
]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=500, work="runs/relora_ablation")
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    args = parser.parse_args()
    chosen = [variant for variant in VARIANTS if variant.name in args.variants]
    rows = run_all(chosen, args)
    write_report("relora_ablation", [summarise(variant, rows[variant.name]) for variant in chosen], rows, args)


if __name__ == "__main__":
    main()
