"""HumanEval's problems: from a file in its authors' layout, or from the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError, first_line
from fullrank.train.data.sources import find_files, fingerprint

HUB = "openai/openai_humaneval"
FIELDS = ("task_id", "prompt", "entry_point", "test")


@dataclass(frozen=True)
class Problem:
    """A function to be written, and what tests it."""

    task_id: str
    prompt: str
    """The head of the function, with its docstring."""
    entry_point: str
    """The function's name."""
    test: str
    """The source of ``check(candidate)``."""

    def program(self, completion: str) -> str:
        """The source that comes to its end if a completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def load_problems(data: str | None, *, limit: int | None = None) -> list[Problem]:
    """Read the problems.

    Args:
        data: HumanEval.jsonl, plain or compressed (.gz); None: the hub's dataset.
        limit: How many at most, the first ones.

    Raises:
        ConfigError: If there is no such file, a row of it is wrong, or the hub does not give the dataset.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}. Raise it, or leave it out for all problems.")
    problems = _from_hub() if data is None or data == HUB else _from_file(data)
    return problems[:limit]


def content(problems: list[Problem]) -> str:
    """A hash of all problems: others have another (16 hexadecimal digits)."""
    return fingerprint([astuple(problem) for problem in problems])


def _from_file(data: str) -> list[Problem]:
    files = find_files(data, setting="data.humaneval")
    if len(files) > 1:
        raise ConfigError(f"data.humaneval {data} has {len(files)} files, expected one. Name HumanEval.jsonl itself.")
    opener = gzip.open if files[0].suffix == ".gz" else open
    try:
        with opener(files[0], "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"{data} cannot be read: {error}. Copy the file again.") from error
    rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return _parse(((number, _row(line, f"{data}, row {number}")) for number, line in rows), source=data)


def _row(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON ({error}). Copy the file again.") from error


def _from_hub() -> list[Problem]:
    try:
        rows: Iterable[Any] = load_dataset(HUB, split="test")
    except (OSError, ValueError, DatasetsError) as error:
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"the hub does not give {HUB}: {reason}. Name a local HumanEval.jsonl by data.humaneval."
        ) from error
    return _parse(enumerate(rows, start=1), source=HUB)


def _parse(rows: Iterable[tuple[int, object]], *, source: str) -> list[Problem]:
    """Problems of numbered rows, each checked."""
    problems: dict[str, Problem] = {}
    for number, row in rows:
        place = f"{source}, row {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: expected an object with {', '.join(FIELDS)}, got {type(row).__name__}.")
        for name in FIELDS:
            if not isinstance(row.get(name), str) or not row[name]:
                raise ConfigError(
                    f"{place}: field {name!r} must be text that is not empty, got {row.get(name)!r}. Each row needs "
                    f"{', '.join(FIELDS)}, as in the authors' HumanEval.jsonl."
                )
        problem = Problem(**{name: row[name] for name in FIELDS})
        if not problem.entry_point.isidentifier():
            raise ConfigError(f"{place}: field 'entry_point' must be a function's name, got {problem.entry_point!r}.")
        if problem.task_id in problems:
            raise ConfigError(f"{place}: field 'task_id' is {problem.task_id!r}, which an earlier row has. Remove one.")
        problems[problem.task_id] = problem
    if not problems:
        raise ConfigError(f"{source} has no problem. Name HumanEval.jsonl as its authors publish it.")
    return list(problems.values())
