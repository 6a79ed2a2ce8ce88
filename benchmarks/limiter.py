"""When does Fira's norm-growth limiter act, and what is training without it? `fullrank analyze limiter`.

    python benchmarks/limiter.py --size 4m --data wikipedia.train.jsonl.gz --validation wikipedia.validation.jsonl.gz \\
        --work runs/limiter --output benchmarks/results/limiter_HARDWARE_YYYYMM

Two runs at each learning rate, with the limiter and without it, traced at every step. Interrupted, the same command
goes on.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from compare import SIZES
from keep import keep

from fullrank.analysis.limiter_run import LimiterOptions, analyze_limiter

RATES = (5e-3, 2e-2)
"""The best rate of benchmarks/compare.py at 4m, and four times that."""


def main() -> None:
    """Run the analysis at each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4m")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--data", type=Path, required=True, help="training text, as data.name")
    parser.add_argument("--validation", type=Path, required=True, help="validation text, as data.validation")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for rate in args.rates:
        name = f"{args.size}-lr{rate:g}"
        overrides = {
            "data.name": str(args.data),
            "data.validation": str(args.validation),
            "method.name": "fira",
            "method.lr": rate,
            "method.rank": SIZES[args.size].rank,
            "method.update_proj_gap": SIZES[args.size].gap,
            "trainer.disable_tqdm": True,
        }
        recipe = Path(__file__).parent / "recipes" / f"wikipedia-{args.size}.yaml"
        options = LimiterOptions(config=str(recipe), overrides=overrides, output_dir=str(args.work / name))
        findings = analyze_limiter(options)
        if findings is None:
            return
        keep(findings.files, args.output / name, places=(args.work, args.data, args.validation))
        print(findings.table)


if __name__ == "__main__":
    main()
