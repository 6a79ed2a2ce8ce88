"""What may be chosen, how it is asked for, and how many units that are."""

from __future__ import annotations

from typing import Any

from fullrank.errors import UnsupportedError
from fullrank.ops.sparse import GRANULARITIES, Layout
from fullrank.optimizer import is_number

CHOICES = {
    "selection": ("gradient", "magnitude", "random"),
    "scope": ("matrix", "model", "row"),
    "granularity": GRANULARITIES,
}


def setting_problems(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the settings of a SIFT, one sentence each."""
    density, problems = settings["density"], []
    if not is_number(density) or not 0.0 < density <= 1.0:
        problems.append(f"density (sparse_rate) must be above 0 and at most 1, got {density!r}. 0.01 is 1%.")
    for key, choices in CHOICES.items():
        if settings[key] not in choices and not (key == "selection" and settings[key] == "function"):
            problems.append(f"{key} must be one of {', '.join(choices)}, got {settings[key]!r}.")
    for key in ("selection_batches", "block_size", "reselect_every"):
        value = settings[key]
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1) and not (
            key == "reselect_every" and value is None
        ):
            problems.append(f"{key} must be a whole number, at least 1, got {value!r}.")
    if not isinstance(settings["seed"], int) or isinstance(settings["seed"], bool) or settings["seed"] < 0:
        problems.append(f"seed must be a whole number, at least 0, got {settings['seed']!r}.")
    if settings["scope"] == "row" and settings["granularity"] != "entry":
        problems.append(
            f"scope row chooses entries, as many of each row, got granularity {settings['granularity']!r}. Use "
            "granularity entry."
        )
    if settings["scope"] == "model" and (settings["granularity"] != "entry" or settings["selection"] == "function"):
        problems.append("scope model compares entries by one score. Use granularity entry and a selection by name.")
    return problems


def refuse_for_spread(settings: dict[str, Any]) -> None:
    """Raise UnsupportedError for settings that a model spread over processes cannot be trained with."""
    if settings["reselect_every"] is not None and settings["keep_base"]:
        raise UnsupportedError(
            "reselect_every with keep_base keeps a record of every entry that has ever trained, which grows by another "
            "number in each row, and no DTensor of a sharded weight can hold that. Set keep_base to false, or "
            "reselect_every to null."
        )


def refuse_for_codes(settings: dict[str, Any]) -> None:
    """Raise UnsupportedError for settings that weights kept as codes cannot be trained with."""
    if settings["reselect_every"] is not None:
        raise UnsupportedError(
            f"reselect_every {settings['reselect_every']} lets entries leave the choice with what they have learned, "
            "and a weight that is kept as codes has no place for it. Set it to null, or keep the weights plain "
            "(model.quantization null)."
        )


def num_chosen(density: float, layout: Layout) -> int:
    """How many units train, of each row under scope row: the share rounded down, plus one, as in the authors' code."""
    num_units = layout.columns if layout.per_row else layout.num_units
    return min(int(density * num_units) + 1, num_units)


def values_shape(layout: Layout, num_units: int) -> tuple[int, ...]:
    """Shape of the values of so many units: a vector, or under scope row so many of each row."""
    return (layout.rows, num_units) if layout.per_row else (num_units * layout.unit_numel,)
