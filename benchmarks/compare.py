"""All seven methods side by side on text of your own, each at the best of a grid of learning rates: `fullrank compare`.

    python benchmarks/compare.py --size 4m --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz \\
        --work runs/compare_4m --output benchmarks/results/compare_4m_HARDWARE_YYYYMM

4m and 10m are an hour or less of one CPU core; 60m and 130m are for a GPU. The ranks are a quarter of the width (130m:
the papers' third), SIFT's density gives it the state that a projected method has, and the gaps and cycles are a
fraction of the run. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.compare.config import CompareConfig
from fullrank.compare.run import compare
from fullrank.report.table import terminal
from fullrank.report.write import write_report

METHODS = ["full", "fira", "galore", "apollo", "relora", "lora", "sift"]
SIFT_DENSITY = 3 / 16
"""Of the entries: three numbers and a place for each are what rank = width / 4 keeps in moments and basis (float32)."""
SIFT_DENSE = ["embed_tokens", "norm", "lm_head"]
"""What trains densely beside them, as under the projected methods."""


@dataclass(frozen=True)
class Size:
    """What differs between the sizes."""

    rank: int
    gap: int
    """Optimizer steps between two refreshes of a basis."""
    cycle: int
    """Optimizer steps of ReLoRA's cycles and warm start, and between two choices of SIFT."""
    grids: dict[str, tuple[float, ...]] = field(default_factory=dict)
    extend_grid: int = 2
    seeds: tuple[int, ...] = (1, 2)


SIZES = {
    "4m": Size(
        rank=64,
        gap=50,
        cycle=100,
        grids={
            "full": (5e-4, 1e-3, 2e-3),
            "fira": (2.5e-3, 5e-3, 1e-2),
            "galore": (2.5e-3, 5e-3, 1e-2),
            "apollo": (1.5e-3, 3e-3, 6e-3),
            "lora": (5e-4, 1e-3, 2e-3),
            "relora": (2e-3, 4e-3, 8e-3),
            "sift": (1e-3, 2e-3, 4e-3),
        },
    ),
    "10m": Size(  # the best rates at 4m, or close to them; not searched
        rank=96,
        gap=40,
        cycle=60,
        grids={
            "full": (1e-3,),
            "fira": (5e-3,),
            "galore": (5e-3,),
            "apollo": (3e-3,),
            "lora": (1e-3,),
            "relora": (4e-3,),
            "sift": (2e-3,),
        },
        extend_grid=0,
        seeds=(1,),
    ),
    "60m": Size(rank=128, gap=200, cycle=500),
    "130m": Size(rank=256, gap=200, cycle=500),
}
"""Size -> its settings; the rest is in recipes/wikipedia-SIZE.yaml."""


def settings(size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """The settings of every run beyond the recipe."""
    return {
        "data.name": str(args.data),
        "data.validation": str(args.validation),
        "method.rank": size.rank,
        "method.update_proj_gap": size.gap,
        "method.lora_alpha": size.rank,
        "relora.restart_every": size.cycle,
        "relora.restart_warmup_steps": max(1, size.cycle // 10),
        "relora.warm_start_steps": size.cycle,
        "relora.warm_start_lr": 1e-3,
        "sift.density": SIFT_DENSITY,
        "sift.exception": SIFT_DENSE,
        "sift.keep_base": False,
        "sift.reselect_every": size.cycle,
    }


def main() -> None:
    """Run the comparison and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--data", type=Path, required=True, help="training text, as data.name")
    parser.add_argument("--validation", type=Path, required=True, help="validation text, as data.validation")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: as the size has them")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; one that was interrupted goes on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = SIZES[args.size]
    config = CompareConfig(
        config=str(Path(__file__).parent / "recipes" / f"wikipedia-{args.size}.yaml"),
        methods=args.methods,
        lr_grid=dict(size.grids),
        extend_grid=size.extend_grid,
        seeds=args.seeds or list(size.seeds),
        jobs=args.jobs,
        keep_models="none",
        title=f"LLaMA {args.size.upper()} on English Wikipedia",
        output_dir=str(args.work),
    )
    comparison = compare(config, settings(size, args))
    if comparison is not None:
        print(terminal(comparison))
        write_report(comparison, args.output)


if __name__ == "__main__":
    main()
