"""The file of a trace, ``trace.jsonl``: what a step made of the gradient of every matrix, a line for each traced step.

The first line says what is traced and which columns; each further line is one optimizer step, with a list in the
order of these matrices for every quantity (null: no gradient at that step, or not finite):

    {"format": 1, "every": 20, "num_columns": 100, "seed": 0, "optimizer": "FiraAdamW", "matrices":
     {"model.layers.0.self_attn.q_proj.weight": {"shape": [256, 256], "num_factors": 256, "columns": [...]}, ...}}
    {"step": 20, "mean": [...], "grad_norm": [...], "limited_norm": [...], "limiter": [...], "columns": [[...], ...]}
    {"step": 40, "skipped": true}

``limited_norm`` and ``limiter`` are there for methods that have a norm-growth limiter, also where it is turned off.
A step that mixed precision skipped has nothing but its number. Only the last line may be cut short, by a kill.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.report import write_whole

logger = logging.getLogger(__name__)

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
    skipped: tuple[int, ...] = ()
    """Steps that were due, and that mixed precision skipped."""

    @property
    def steps(self) -> list[int]:
        """The traced optimizer steps."""
        return [row["step"] for row in self.rows]

    @property
    def last_step(self) -> int:
        """The last step that it tells of, skipped or not; 0: none."""
        return max((*self.steps[-1:], *self.skipped[-1:]), default=0)

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


def begin(folder: Path, first: str, *, step: int) -> bool:
    """Start a trace, or go on with the one that is there: rows up to a step stay.

    Args:
        folder: Where to.
        first: The header.
        step: Optimizer step that training goes on from; 0: a fresh run.

    Returns:
        Whether there was one.

    Raises:
        ConfigError: If there are rows, and they are of another optimizer, or of other matrices, columns or steps.
        CheckpointError: If what is there is no trace, or damaged.
    """
    path = folder / TRACE
    old, _, found = _read(path)
    new = json.loads(first)
    if found and old != new:
        differ = ", ".join(
            key if key == "matrices" else f"{key} {old.get(key)} (now {new[key]})"
            for key in new
            if old.get(key) != new[key]
        )
        raise ConfigError(
            f"{path} was begun with other settings: {differ}. Go on with those it was begun with, or trace to another "
            "folder; nothing was overwritten."
        )
    rows = [row for row in found if row["step"] <= step]
    if found and step == 0:
        logger.warning("%s: training begins anew, so its %d traced steps are traced again", path, len(found))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, first + "".join(json.dumps(row) + "\n" for row in rows))
    return bool(old)


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add the row of one step."""
    with (folder / TRACE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_trace(folder: str | Path) -> Trace:
    """The trace in a run's folder (or a file that is one).

    Raises:
        ConfigError: If there is none, or it holds no step yet.
        CheckpointError: If it is not of the format that this version reads, or a line is damaged, which it names.
    """
    found = find_trace(folder)
    if found is None:
        raise ConfigError(
            f"{folder} holds no {TRACE}. Train with fullrank.train.trace.ScalingTrace among the callbacks, or let the "
            "analysis train: give --config."
        )
    if found.skipped and not found.rows:
        raise ConfigError(f"mixed precision skipped every step that {folder} was to trace. Train for more steps.")
    if not found.rows:
        raise ConfigError(f"{folder} holds no step yet. Train for at least {found.every} optimizer steps.")
    return found


def find_trace(folder: str | Path) -> Trace | None:
    """What a trace holds so far; None: there is none.

    Raises:
        CheckpointError: As ``read_trace``.
    """
    path = Path(folder) / TRACE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        return None
    first, matrices, lines = _read(path)
    if not first:
        raise CheckpointError(f"{path} is not a trace of format {FORMAT}: it has no whole line. Make it again.")
    settings = {key: first[key] for key in ("every", "num_columns", "seed", "optimizer")}
    rows = [row for row in lines if "skipped" not in row]
    skipped = tuple(row["step"] for row in lines if "skipped" in row)
    return Trace(Path(folder), matrices=matrices, rows=rows, skipped=skipped, **settings)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, TracedMatrix], list[dict[str, Any]]]:
    """The header, its matrices and the rows of a file, all checked; nothing of a file without a whole line."""
    lines = _lines(path)
    if not lines:
        return {}, {}, []
    try:
        matrices = _matrices(lines[0])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a trace of format {FORMAT}, the one this version reads ({error!r}). Make it again."
        ) from None
    before, rows = 0, lines[1:]
    measured = (row for row in rows if isinstance(row, dict) and "skipped" not in row)
    has_limiter = "limiter" in next(measured, {})
    for number, row in enumerate(rows, 2):
        try:
            before = _check_row(row, list(matrices.values()), before=before, has_limiter=has_limiter)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}, line {number}: {error}. Make the trace again.") from None
    return lines[0], matrices, rows


def _lines(path: Path) -> list[Any]:
    """Every whole line; the last one is left out if it was cut short."""
    content = path.read_bytes().rstrip(b"\n").split(b"\n") if path.is_file() else []
    found = []
    for number, line in enumerate(content, 1):
        try:
            found.append(json.loads(line.decode("utf-8")))
        except ValueError as error:
            if number < len(content):
                raise CheckpointError(
                    f"{path}, line {number} is damaged ({error}), and {len(content) - number} follow. Make the trace "
                    "again."
                ) from None
    return found


def _matrices(first: Any) -> dict[str, TracedMatrix]:
    """What the header says is traced."""
    if first["format"] != FORMAT:
        raise ValueError(f"format {first['format']}")
    for key, least in (("every", 1), ("num_columns", 0), ("seed", 0)):
        if not _is_whole(first[key]) or first[key] < least:
            raise ValueError(f"{key} is {first[key]!r}")
    found = {}
    for name, entry in first["matrices"].items():
        matrix = TracedMatrix(tuple(entry["shape"]), entry["num_factors"], tuple(entry["columns"]))
        if not all(_is_whole(value) for value in (*matrix.shape, matrix.num_factors, *matrix.columns)):
            raise ValueError(f"{name} is {entry!r}")
        found[name] = matrix
    if not found or not isinstance(first["optimizer"], str):
        raise ValueError("no matrices, or no optimizer")
    return found


def _check_row(row: Any, matrices: Sequence[TracedMatrix], *, before: int, has_limiter: bool) -> int:
    """Refuse a row that does not hold what the header announces, or comes too early; returns its step."""
    if not isinstance(row, dict) or not _is_whole(row.get("step")):
        raise ValueError("a row must be an object with a whole number as its step")
    if row["step"] <= before:
        raise ValueError(f"step {row['step']} must come after {before}")
    step: int = row["step"]
    if "skipped" in row:
        return step
    for key in ("mean", "grad_norm", "limited_norm", "limiter"):
        if key in row and not _is_numbers(row[key], len(matrices)):
            raise ValueError(f"{key} must list {len(matrices)} numbers or nulls, one for each matrix")
    needed = ("mean", "limited_norm", "limiter") if has_limiter else ("mean",)
    if absent := [key for key in needed if key not in row]:
        raise ValueError(f"the row has no {' and no '.join(absent)}")
    _check_columns(row, matrices)
    return step


def _check_columns(row: dict[str, Any], matrices: Sequence[TracedMatrix]) -> None:
    if not any(matrix.columns for matrix in matrices):
        return
    columns = row.get("columns")
    if not isinstance(columns, list) or len(columns) != len(matrices):
        raise ValueError(f"columns must hold {len(matrices)} lists, one for each matrix")
    for place, (values, matrix, mean) in enumerate(zip(columns, matrices, row["mean"], strict=True)):
        if values is None and mean is None:  # no gradient
            continue
        if not _is_numbers(values, len(matrix.columns)):
            raise ValueError(f"columns of matrix {place} must be {len(matrix.columns)} numbers or nulls")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_numbers(values: Any, count: int) -> bool:
    """Whether this is a list of so many finite numbers or None."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
            for value in values
        )
    )
