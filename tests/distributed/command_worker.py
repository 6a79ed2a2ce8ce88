"""What torchrun starts for tests of the command: several runs, one after the other, in the same processes.

``python -m tests.distributed.command_worker FOLDER``: ``FOLDER/plan.json`` is a list of runs. What became of each, or
the traceback, is written beside it by every process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from fullrank import sharding
from fullrank.train import run
from fullrank.train.resolve import resolve
from tests.train.held import Hold


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for job in json.loads((folder / "plan.json").read_text(encoding="utf-8")):
        try:
            found = {"result": perform(job, folder), "error": ""}
        except Exception:
            found = {"result": None, "error": traceback.format_exc()}
        path = folder / f"{job['name']}-{os.environ['RANK']}.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        if found["error"]:
            sys.exit(1)  # the others may wait for this process
    sharding.disconnect()


def perform(job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """One run: a recipe, or a folder to resume, and overrides."""
    resumed, overrides = job.get("resume"), dict(job.get("overrides", {}))
    if resumed is not None:
        overrides["output_dir"] = resumed
    config = resolve(job["recipe"] if resumed is None else Path(resumed) / "config.yaml", overrides)
    callbacks = [Hold(**job["hold"], told=folder / "held")] if "hold" in job else []
    return getattr(run, config.command)(config, resume=resumed is not None, callbacks=callbacks)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
