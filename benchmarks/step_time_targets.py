"""What the step is held to, checked against the rows of ``step_time.py``, and the bytes that a step must move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def bytes_moved(shapes: list[tuple[int, int]], rank: int, itemsize: int, num_plain: int) -> dict[str, int]:
    """Bytes between memory and processor in one step, if every tensor of a pass is read or written once.

    For a matrix of M x N numbers (M the longer side) of ``itemsize`` bytes each: Fira reads the gradient twice, and the
    weight is read and written once; R, the direction and two moments in float32 (M x r each), and the basis (N x r).
    The kernels reach it where one finds row norms on the way; elsewhere a third pass over the gradient takes them.
    AdamW reads gradient, weight and moments and writes all but the gradient.
    """
    numbers = sum(rows * columns for rows, columns in shapes)
    tall, short = (sum(side(shape) for shape in shapes) for side in (max, min))
    moments = 4 * rank * tall * 4  # read and written in float32
    low = rank * tall * (4 * 4 + 2 * itemsize) + 2 * rank * short * itemsize  # R and direction, their sum, the basis
    plain = 7 * num_plain * itemsize
    return {
        "fira": 4 * numbers * itemsize + moments + low + plain,
        "fira_separate_norms": 5 * numbers * itemsize + moments + low + plain,
        "galore": 3 * numbers * itemsize + moments + low + plain,
        "adamw": 7 * numbers * itemsize + plain,
        "adamw_float32": 7 * (numbers + num_plain) * 4,
    }


def targets_of(rows: list[Row]) -> list[Row]:
    """Every target that these rows can be held to: what it is, of which row, found, wanted, whether it is reached."""
    ours = [row for row in rows if (row["case"], row["basis"]) == ("fullrank FiraAdamW", "power")]
    return [
        {
            "target": name,
            "of": _name(row),
            "found": found,
            "wanted": f"{sign} {bound}",
            "reached": _holds(found, sign, bound),
        }
        for row in ours
        for name, found, sign, bound in _candidates(row)
    ]


def _candidates(row: Row) -> Iterator[tuple[str, float, str, float]]:
    if row["device"] == "cpu":
        if row["dtype"] == "float32" and row["size"] in ("60M", "130M"):
            yield "amortised step over the bound", row["amortised_over_bound"], "<=", 1.25
            if row["authors_amortised_over_this"] is not None:
                yield "package fira over this, amortised", row["authors_amortised_over_this"], ">=", 5.0
    elif row["dtype"] == "bfloat16":
        if "amortised_over_adamw_float32" in row:
            yield "amortised step over AdamW in float32", row["amortised_over_adamw_float32"], "<=", 1.0
        yield "refreshing step over step", row["refreshing_over_step"], "<", 3.0


def _holds(found: float, sign: str, bound: float) -> bool:
    return {"<": found < bound, "<=": found <= bound, ">=": found >= bound}[sign]


def _name(row: Row) -> str:
    return f"{row['size']} {row['dtype']} rank {row['rank']} {row['scope']}"
