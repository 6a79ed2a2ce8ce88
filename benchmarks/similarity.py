"""Are Fira's scaling factors those of full-rank training? Both trained and compared: `fullrank analyze similarity`.

    python benchmarks/similarity.py --sizes 4m 10m --data wikipedia.train.jsonl.gz \\
        --validation wikipedia.validation.jsonl.gz --work runs/similarity \\
        --output benchmarks/results/similarity_HARDWARE_YYYYMM

Writes one folder a size with its numbers and its figure, and prints all sizes below the published table. Interrupted,
the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from compare import SIZES
from keep import keep

from fullrank.analysis.similarity import Similarity, similarity, table
from fullrank.analysis.similarity_run import SimilarityOptions, analyze_similarity

FIRA_LR, FULL_LR = 5e-3, 5e-4
"""Close to the best rates of benchmarks/compare.py at 4m."""
TRACE_EVERY = 10
"""Optimizer steps; the paper's runs are 25 times as long, and traced every 20."""


def options(size: str, args: argparse.Namespace) -> SimilarityOptions:
    """What the analysis of one size is told."""
    return SimilarityOptions(
        config=str(Path(__file__).parent / "recipes" / f"wikipedia-{size}.yaml"),
        overrides={
            "data.name": str(args.data),
            "data.validation": str(args.validation),
            "method.name": "fira",
            "method.lr": FIRA_LR,
            "method.rank": SIZES[size].rank,
            "method.update_proj_gap": SIZES[size].gap,
            "trainer.disable_tqdm": True,
        },
        full={"lr": FULL_LR},
        trace_every=TRACE_EVERY,
        output_dir=str(args.work / size),
    )


def main() -> None:
    """Run the analysis of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["4m", "10m"])
    parser.add_argument("--data", type=Path, required=True, help="training text, as data.name")
    parser.add_argument("--validation", type=Path, required=True, help="validation text, as data.validation")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found: dict[str, Similarity] = {}
    for size in args.sizes:
        findings = analyze_similarity(options(size, args))
        if findings is None:
            return
        keep(findings.files, args.output / size, places=(args.work, args.data, args.validation))
        found[size.upper()] = similarity(args.work / size / "fira", args.work / size / "full")
    print(table(found))


if __name__ == "__main__":
    main()
