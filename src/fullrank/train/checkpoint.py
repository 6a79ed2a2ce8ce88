"""Which checkpoint a run may go on from: complete, undamaged, and of the same run.

The Trainer writes a checkpoint file by file. When all are written, ``fullrank.json`` is put beside
them, by one rename, with the size of each and the run's configuration. A folder without it was cut
short and is never chosen.
"""

from __future__ import annotations

import json
import logging
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from fullrank.errors import CheckpointError
from fullrank.train.config import RunConfig
from fullrank.train.model import missing_weights
from fullrank.train.report import num_processes, versions, write_whole
from fullrank.weights import CHECKPOINT, MARKER, stored_names

logger = logging.getLogger(__name__)

FORMAT = 1
DEFINING = ("model", "data", "method", "seed")
"""Sections that define a trajectory: a resumed run may not change them."""
FREE = frozenset(
    {
        "resume_from_checkpoint",
        "load_best_model_at_end",
        "save_total_limit",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "report_to",
        "run_name",
        "project",
        "disable_tqdm",
        "log_level",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_private_repo",
        "hub_strategy",
        "strategy",
        "shard_size",
        "ddp_timeout",
    }
)
"""Fields of the trainer section that a resumed run may change: they do not touch its trajectory."""
FREE_OPTIONS = frozenset({"partition_states"})
"""Options of methods of which the same is true: who holds a state is not in a checkpoint."""


def write_marker(checkpoint: Path, config: RunConfig, *, content_hash: str) -> None:
    """Declare a checkpoint complete; called when all its other files are written."""
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != MARKER}
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "processes": num_processes(),
        "content_hash": content_hash,
        "files": files,
        "versions": versions(),
    }
    write_whole(checkpoint / MARKER, json.dumps(content, indent=2))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None if none was ever completed.

    Raises:
        CheckpointError: If there were complete ones and all of them are damaged.
    """
    inside = folder.iterdir() if folder.is_dir() else ()
    numbered = {int(found[1]): path for path in inside if (found := CHECKPOINT.fullmatch(path.name))}
    damaged = []
    for _, path in sorted(numbered.items(), reverse=True):
        if not (damage := find_damage(path)):
            return path
        logger.warning("%s is passed over: %s", path, damage)
        if (path / MARKER).exists():
            damaged.append(f"{path.name}: {damage}")
    if damaged:
        raise CheckpointError(
            f"every complete checkpoint of {folder} is damaged ({'; '.join(damaged)}). Restore one from a copy, or "
            "start a new run in another --output_dir."
        )
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def num_steps_taken(checkpoint: Path) -> int:
    """The optimizer steps taken by then, without those that mixed precision skipped."""
    state = torch.load(checkpoint / "scheduler.pt", map_location="cpu", weights_only=True)
    return int(state["last_epoch"])


def find_damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string; of the files only presence and size are checked."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        exists = checkpoint.is_dir()
        return f"{MARKER} is missing, so it was not written to its end" if exists else "there is no such folder"
    except (ValueError, OSError) as error:
        return f"{MARKER} cannot be read ({error})"
    entries = {"format", "config", "processes", "content_hash", "files"}
    if not isinstance(marker, dict) or not entries <= marker.keys() or marker["format"] != FORMAT:
        return f"{MARKER} is not of format {FORMAT}, the one this version reads"
    for name, size in marker["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, {size} were written"
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
    differences = config_differences(marker["config"], config)
    if not config.trainer.get("total_batch_size"):  # else the batch is the same whatever the number of processes
        differences += _differences("the number of processes", marker["processes"], num_processes())
    refuse(checkpoint, differences)


def config_differences(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """What of a saved configuration this one changes that could touch the trajectory, a line each."""
    # Through JSON, so that both sides have the same kinds of values.
    now = json.loads(json.dumps(config.to_dict()))
    if saved["method"].get("name") != now["method"]["name"]:
        return _differences("method.name", saved["method"].get("name"), now["method"]["name"])
    one, other = (
        content | {"method": {key: value for key, value in content["method"].items() if key not in FREE_OPTIONS}}
        for content in (saved, now)
    )
    differences = [line for key in DEFINING for line in _differences(key, one.get(key), other[key])]
    for key in sorted({*saved["trainer"], *now["trainer"]} - FREE):
        before, after = (_resolved(content["trainer"], key, now["seed"]) for content in (saved, now))
        if before != after:
            differences += _differences(f"trainer.{key}", saved["trainer"].get(key), now["trainer"].get(key))
    return differences


def _resolved(trainer: dict[str, Any], key: str, seed: int) -> Any:
    """What a field of the trainer section comes to in a run: an option that is left out has a value too."""
    if key == "max_grad_norm" and key in trainer:
        return trainer[key] or 0.0  # null: no clipping
    value = trainer.get(key)
    if value is None:
        value = {**_trainer_defaults(), "data_seed": seed}.get(key)
    return value


@cache
def _trainer_defaults() -> dict[str, Any]:
    """Field -> its value where it is left out: TrainingArguments' own, and of ours."""
    found: dict[str, Any] = {}
    for field in fields(TrainingArguments):
        found[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return {**found, "fused_backward": False, "gradient_checkpointing": False}


def verify_run(folder: Path, config: RunConfig) -> None:
    """Check that what is in a folder, if anything, is this run.

    Raises:
        CheckpointError: If it is a run under other settings, which the message names, or cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        differences = config_differences(yaml.safe_load(path.read_text(encoding="utf-8")), config)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}). Remove {folder} and start the run again.") from None
    refuse(folder, differences)


def verify_content(checkpoint: Path, content_hash: str) -> None:
    """Check that the text and the tokenizer are those that the checkpoint was trained on.

    Raises:
        CheckpointError: If they are not: the same numbers would mean other words.
    """
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    if marker["content_hash"] != content_hash:
        refuse(checkpoint, ["the text or the tokenizer of its data section has changed since"])


def keep_own_names(model: PreTrainedModel) -> None:
    """Let checkpoints hold the weights under the names of the model's modules, as a Trainer loads them.

    transformers would write some under the names of older versions (the head of GPT-NeoX), and a Trainer, which
    does not turn them back, would go on with a part of the model untrained.
    """
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)  # type: ignore[method-assign]


def verify_names(checkpoint: Path, model: nn.Module) -> None:
    """Check that a checkpoint holds every weight of the model: a Trainer would pass over what is missing.

    Raises:
        CheckpointError: If it does not.
    """
    if missing := missing_weights(model, stored_names(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} weights of the model, first {missing[0]}: other versions wrote it "
            "under other names. Resume with the versions in its fullrank.json."
        )


def refuse(checkpoint: Path, differences: list[str]) -> None:
    """Raise a CheckpointError that names the differences, if there are any."""
    if differences:
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {'; '.join(differences)}. Resume with what it was saved with "
            "(leave these options out), or start a new run in another --output_dir."
        )


def _differences(key: str, saved: Any, now: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted({*saved, *now})
        return [line for k in keys for line in _differences(f"{key}.{k}", saved.get(k), now.get(k))]
    return [] if saved == now else [f"{key} was {saved!r}, is now {now!r}"]
