"""Which checkpoint a run may go on from: complete, undamaged, and of the same run.

The Trainer writes a checkpoint file by file. When all are written, ``fullrank.json`` is put beside
them, by one rename, with the size of each and the run's configuration. A folder without it was cut
short and is never chosen.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from fullrank.errors import CheckpointError
from fullrank.train.config import RunConfig
from fullrank.train.report import num_processes, versions

logger = logging.getLogger(__name__)

MARKER = "fullrank.json"
FORMAT = 1
DEFINING = ("model", "data", "method", "seed")
"""Sections that define a trajectory: a resumed run may not change them."""
SCHEDULE = (
    "max_steps",
    "num_train_epochs",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "total_batch_size",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "max_grad_norm",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
"""Fields of the trainer section that do, too, and intervals, which the Trainer reads from the checkpoint."""


def write_marker(checkpoint: Path, config: RunConfig) -> None:
    """Declare a checkpoint complete; called when all its other files are written."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != MARKER}
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "processes": num_processes(),
        "files": files,
        "versions": versions(),
    }
    write_json(checkpoint / MARKER, content)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run folder.

    Raises:
        CheckpointError: If there is none.
    """
    numbered = [
        (int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(numbered, reverse=True):
        if not (damage := find_damage(path)):
            return path
        logger.warning("%s is passed over: %s", path, damage)
    raise CheckpointError(
        f"{folder} holds no complete checkpoint to resume from. Start again in another --output_dir, with a "
        "smaller trainer.save_steps."
    )


def find_damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MARKER} is missing, so it was not written to its end"
    except ValueError:
        return f"{MARKER} is not valid JSON"
    if marker.get("format") != FORMAT:
        return f"{MARKER} has format {marker.get('format')!r}, this version reads {FORMAT}"
    for name, size in marker["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return ""


def verify(checkpoint: Path, config: RunConfig) -> None:
    """Check that a run with this configuration may go on from this checkpoint.

    Raises:
        CheckpointError: If it is incomplete, or was written under another model, data, method, seed
            or schedule; the message names every difference.
    """
    if damage := find_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be used: {damage}. Choose an earlier checkpoint of the run.")
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    saved = marker["config"]
    # Through JSON, so that both sides have the same kinds of values.
    now = json.loads(json.dumps(config.to_dict()))
    differences = [line for key in DEFINING for line in _differences(key, saved.get(key), now[key])]
    for key in SCHEDULE:
        differences += _differences(f"trainer.{key}", saved["trainer"].get(key), now["trainer"].get(key))
    if not config.trainer.get("total_batch_size"):  # else the batch is the same whatever the number of processes
        differences += _differences("the number of processes", marker["processes"], num_processes())
    if differences:
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {'; '.join(differences)}. Resume with the settings it was saved "
            "with (leave these options out), or start a new run in another --output_dir."
        )


def _differences(key: str, saved: Any, now: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted({*saved, *now})
        return [line for k in keys for line in _differences(f"{key}.{k}", saved.get(k), now.get(k))]
    return [] if saved == now else [f"{key} was {saved!r}, is now {now!r}"]
