"""The file ``eval.json`` of an output folder: what was measured, of which model, and how.

It is written whole after every task, so that a stopped evaluation goes on where it was. A folder holds one model, and
the tasks of a kind in it are measured in one way, so that its averages mean something.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullrank.errors import CheckpointError, ConfigError
from fullrank.evaluation.tasks import CATEGORIES, GROUPS, kind_of
from fullrank.evaluation.unit import Outcome, Unit
from fullrank.train.report import hardware, versions, write_whole

FILE = "eval.json"


class Record:
    """The results in a folder, new or begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"model": None, "tasks": {}, "groups": {}}
        path = folder / FILE
        if path.is_file():
            self.content = _read(path)

    @property
    def tasks(self) -> dict[str, Any]:
        """Entries by task."""
        tasks: dict[str, Any] = self.content["tasks"]
        return tasks

    def differences(self, unit: Unit) -> list[str]:
        """What makes a task unlike those of its kind in the folder, as sentences; none: it fits."""
        found = []
        for task, entry in self.tasks.items():
            if kind_of(task) == kind_of(unit.task):
                found += _differences(task, entry["settings"], unit.settings)
            if task == unit.task and _content(entry["data"]) != _content(unit.data):
                found.append(f"{task} there is of {entry['data']['source']}, not of this {unit.data['source']}")
        return list(dict.fromkeys(found))

    def claim(self, model: dict[str, Any]) -> None:
        """Say which model the folder is of.

        Raises:
            ConfigError: If it is of another.
        """
        held = self.content["model"]
        if held is not None and held["content"] != model["content"]:
            raise ConfigError(
                f"{self.folder / FILE} holds results of {held['name']}, whose weights, tokenizer or data type are not "
                f"those of {model['name']}. Choose another output_dir."
            )
        self.content["model"] = model

    def add(self, unit: Unit, outcome: Outcome, *, batch_size: int, seconds: float) -> None:
        """Add a task's numbers, and write the file and the answers one by one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if outcome.records is not None:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in outcome.records)
            write_whole(self.folder / f"{unit.task}.jsonl", rows)
        self.tasks[unit.task] = {
            "metric": outcome.metric,
            "value": outcome.metrics[outcome.metric],
            "metrics": outcome.metrics,
            "stderr": outcome.stderr,
            "num_examples": outcome.num_examples,
            "protocol": unit.protocol,
            **({"note": unit.note} if unit.note else {}),
            **outcome.details,
            "data": unit.data,
            "settings": unit.settings,
            "batch_size": batch_size,
            "seconds": seconds,
        }
        self.content["groups"] = averages(self.tasks)
        self.content["versions"] = versions()
        self.content["hardware"] = hardware()
        write_whole(self.folder / FILE, json.dumps(self.content, indent=1) + "\n")


def _content(data: dict[str, Any]) -> object:
    """What tells examples apart: their hash, wherever they lie, or the name of where they come from."""
    return data.get("content", data["source"])


def _read(path: Path) -> dict[str, Any]:
    """The content of an eval.json."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for task, entry in content["tasks"].items():
            kind_of(task), entry["data"]["source"], entry["protocol"], dict(entry["settings"])
            numbers = [entry["value"], entry["num_examples"], entry["metrics"][entry["metric"]]]
            if not all(isinstance(number, int | float) for number in [*numbers, *dict(entry["stderr"]).values()]):
                raise ValueError(f"{task} has values that are no numbers")
        content["groups"] = averages(content["tasks"])
        content["model"]["content"], content["model"]["name"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Remove it, or choose another output_dir.") from error
    return content


def _differences(task: str, held: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    keys = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
    return [f"{task} there has {key} {held.get(key)!r}, not {asked.get(key)!r}" for key in keys]


def averages(tasks: dict[str, Any]) -> dict[str, Any]:
    """Averages of the groups of which at least two tasks are there: over questions for MMLU, else over tasks."""
    found = {}
    for group, members in GROUPS.items():
        there = [task for task in members if task in tasks]
        if len(there) < 2:
            continue
        entries = [tasks[task] for task in there]
        by_question = group == "mmlu" or group in CATEGORIES
        sizes = [entry["num_examples"] if by_question else 1 for entry in entries]
        stderr = _pooled(entries) if by_question else None
        found[group] = {
            "metric": entries[0]["metric"] if len({entry["metric"] for entry in entries}) == 1 else "average",
            "value": sum(entry["value"] * size for entry, size in zip(entries, sizes, strict=True)) / sum(sizes),
            **({} if stderr is None else {"stderr": stderr}),
            "over": "questions" if by_question else "tasks",
            "num_examples": sum(entry["num_examples"] for entry in entries),
            "num_tasks": len(there),
            "of_tasks": len(members),
        }
    return found


def _pooled(entries: Sequence[dict[str, Any]]) -> float | None:
    """Standard error of a mean over the questions of all tasks, as lm-evaluation-harness pools it."""
    pairs = [(entry["stderr"].get(entry["metric"]), entry["num_examples"]) for entry in entries]
    if any(error is None for error, _ in pairs):
        return None
    total = sum(size for _, size in pairs)
    variance = sum((size - 1) * error**2 * size for error, size in pairs) / (total - len(pairs))
    return math.sqrt(variance / total)
