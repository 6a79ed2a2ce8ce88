"""The file of a trace, ``trace.jsonl``: what a step made of the gradient of every matrix, a line for each traced step.

The first line says what is traced and which columns; each further line is one optimizer step, with a list in the
order of these matrices for every quantity (null: no gradient at that step, or not finite):

    {"format": 1, "every": 20, "num_columns": 100, "seed": 0, "optimizer": "FiraAdamW", "matrices":
     {"model.layers.0.self_attn.q_proj.weight": {"shape": [256, 256], "num_factors": 256, "columns": [...]}, ...}}
    {"step": 20, "mean": [...], "grad_norm": [...], "limited_norm": [...], "limiter": [...], "columns": [[...], ...]}

``limited_norm`` and ``limiter`` are there for methods that have a norm-growth limiter, also where it is turned off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.report import write_whole

TRACE = "trace.jsonl"
FORMAT = 1
DIGITS = 6
"""Significant digits of every number."""


@dataclass(frozen=True)
class TracedMatrix:
    """One matrix of a trace."""

    shape: tuple[int, ...]
    num_factors: int
    """Scaling factors that it has: its columns, or 1."""
    columns: tuple[int, ...]
    """The columns whose factors are kept."""


@dataclass(frozen=True)
class Trace:
    """A trace as it was read: what is traced, and the rows."""

    folder: Path
    every: int
    num_columns: int
    seed: int
    optimizer: str
    """Class of the optimizer."""
    matrices: Mapping[str, TracedMatrix]
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def steps(self) -> list[int]:
        """The traced optimizer steps."""
        return [row["step"] for row in self.rows]

    @property
    def has_limiter(self) -> bool:
        """Whether its rows tell of a norm-growth limiter."""
        return bool(self.rows) and "limiter" in self.rows[0]


def header(*, every: int, num_columns: int, seed: int, optimizer: str, matrices: Mapping[str, TracedMatrix]) -> str:
    """The first line."""
    content = {"format": FORMAT, "every": every, "num_columns": num_columns, "seed": seed, "optimizer": optimizer}
    return json.dumps(content | {"matrices": {name: asdict(matrix) for name, matrix in matrices.items()}}) + "\n"


def rounded(value: float) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a trace; a last line that was cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def begin(folder: Path, first: str, keep: Callable[[dict[str, Any]], bool]) -> bool:
    """Start a trace, or go on with the one that is there: rows that ``keep`` accepts stay.

    Returns:
        Whether there was one.

    Raises:
        ConfigError: If there are rows to keep, and they are of other matrices, columns or steps.
    """
    path = folder / TRACE
    found = lines_of(path)
    rows = [row for row in found[1:] if keep(row)]
    if rows and found[0] != json.loads(first):
        old, new = found[0], json.loads(first)
        differ = ", ".join(
            key if key == "matrices" else f"{key} {old.get(key)} (now {new[key]})"
            for key in new
            if old.get(key) != new[key]
        )
        raise ConfigError(f"{path} was begun with other settings: {differ}. Go on with those it was begun with.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, first + "".join(json.dumps(row) + "\n" for row in rows))
    return bool(found)


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add the row of one step."""
    with (folder / TRACE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_trace(folder: str | Path) -> Trace:
    """The trace in a run's folder (or a file that is one).

    Raises:
        ConfigError: If there is none, or it holds no step yet.
        CheckpointError: If it is not of the format that this version reads.
    """
    path = Path(folder) / TRACE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {TRACE}. Train with fullrank.train.trace.ScalingTrace among the callbacks, or let the "
            "analysis train: give --config."
        )
    found = lines_of(path)
    try:
        first, rows = found[0], found[1:]
        if first["format"] != FORMAT:
            raise ValueError(f"format {first['format']}")
        matrices = {
            name: TracedMatrix(tuple(entry["shape"]), entry["num_factors"], tuple(entry["columns"]))
            for name, entry in first["matrices"].items()
        }
        settings = {key: first[key] for key in ("every", "num_columns", "seed", "optimizer")}
        width = len(matrices)
        if any(len(row["mean"]) != width or int(row["step"]) < 1 for row in rows):
            raise ValueError("rows of another length")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a trace of format {FORMAT}, the one this version reads ({error!r}). Make it again."
        ) from None
    if not rows:
        raise ConfigError(f"{path} holds no step yet. Train for at least {settings['every']} optimizer steps.")
    return Trace(Path(folder), matrices=matrices, rows=rows, **settings)
