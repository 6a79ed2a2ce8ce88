"""Traces made up in a test, of numbers that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullrank.train.trace_file import TracedMatrix, append, begin, header

KINDS = ("q_proj", "v_proj", "up_proj")


def write_trace(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    num_matrices: int = 0,
    columns: Sequence[int] = (),
    num_factors: int = 8,
    optimizer: str = "FiraAdamW",
    shape: tuple[int, int] = (8, 4),
) -> Path:
    """A trace of matrices ``layers.<n>.<kind>.weight`` with these rows."""
    count = num_matrices or len(rows[0]["mean"])
    names = [f"layers.{place // len(KINDS)}.{KINDS[place % len(KINDS)]}.weight" for place in range(count)]
    matrices = {name: TracedMatrix(shape, num_factors, tuple(columns)) for name in names}
    first = header(every=1, num_columns=len(columns), seed=0, optimizer=optimizer, matrices=matrices)
    begin(folder, first, step=0)
    for row in rows:
        append(folder, row)
    return folder
