"""Record the loss and gradient norm of every step of a tiny run with each method.

    python -m tests.golden.record

Run it after a change that is meant to change training, and say why in the commit.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from fullrank import METHODS
from fullrank.train.report import hardware, read_metrics, versions
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import recipe, write_text

PATH = Path(__file__).with_name("losses.json")


def golden_run(method: str, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    os.environ["FULLRANK_CACHE"] = str(folder / "cache")
    text = write_text(folder / "documents.jsonl")
    pretrain(resolve(recipe(text, folder / method, method, save_strategy="no", eval_strategy="no")))
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / method) if "loss" in row]


def main() -> None:
    """Write ``losses.json``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {method: golden_run(method, Path(folder)) for method in METHODS}
    PATH.write_text(json.dumps({"versions": versions(), "hardware": hardware(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
