"""HumanEval's samples with their outcomes in a file, written as they come, so that a stopped evaluation goes on.

Line 1 holds the settings, every other line one sample. A last line that was cut off is dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.errors import ConfigError
from fullrank.train.report import write_whole

SETTINGS = "settings"


@dataclass(frozen=True)
class Sample:
    """A program that a model wrote, and how it ended."""

    task_id: str
    sample: int
    """Its number among those of its problem, from 0."""
    completion: str
    passed: bool
    reason: str


KINDS = {"task_id": str, "sample": int, "completion": str, "passed": bool, "reason": str}
"""Field of a line -> its type."""


class Records:
    """The samples of one evaluation, kept in a file if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Open the file, or begin it.

        Raises:
            ConfigError: If it holds something else, or samples obtained otherwise.
        """
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        if path is None:
            return
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({SETTINGS: settings}) + "\n")
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        self._read(path, data[:whole].decode("utf-8", "replace").split("\n")[:-1], settings)
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)

    def _read(self, path: Path, lines: list[str], settings: dict[str, Any]) -> None:
        head = _parse(lines[0], f"{path}, row 1").get(SETTINGS) if lines else None
        if not isinstance(head, dict):
            raise ConfigError(f"{path}, row 1: field {SETTINGS!r} is missing: these are no samples. Name another file.")
        names = [name for name in {**head, **settings} if head.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(f"{name} was {head.get(name)!r}, is {settings.get(name)!r}" for name in names)
            raise ConfigError(f"{path} holds samples obtained otherwise: {differences}. Remove it, or name another.")
        for number, line in enumerate(lines[1:], start=2):
            row = _parse(line, f"{path}, row {number}")
            for name, kind in KINDS.items():
                if type(row.get(name)) is not kind:
                    raise ConfigError(
                        f"{path}, row {number}: field {name!r} must be {kind.__name__}, got {row.get(name)!r}. "
                        "Remove the file to begin again."
                    )
            sample = Sample(**{name: row[name] for name in KINDS})
            self.samples[sample.task_id, sample.sample] = sample

    def add(self, sample: Sample) -> None:
        """Keep a sample, at once in the file."""
        self.samples[sample.task_id, sample.sample] = sample
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(sample)) + "\n")


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON ({error}). Remove the file to begin again.") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected an object, got {type(row).__name__}. Remove the file to begin again.")
    return row
