"""Stepping weights of half precision: in float32, and how they are rounded back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fullrank.ops.rounding import DROPPED_BITS, round_stochastic
from fullrank.ops.seeded import seeded
from fullrank.sharding import local, split_of

ROUNDINGS = ("nearest", "stochastic")
NO_EFFECT = (
    "weight_rounding stochastic has no effect: no weight is of bfloat16 or float16. Load the model in bfloat16, or "
    "leave it out."
)
_DRAWS = 0x57E9
"""Sets the random numbers of rounding apart from those of bases, which follow from the same seed."""


def rounds_at_random(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether a step of this weight is rounded at random."""
    return group["weight_rounding"] == "stochastic" and weight.dtype in DROPPED_BITS


def steps_a_copy(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether a step of this weight is taken in a float32 copy.

    In float16 it always is: what scales a small gradient to a step may be beyond the largest number of that type.
    """
    return weight.dtype == torch.float16 or rounds_at_random(weight, group)


def rounding_seed(parameter: Tensor, group: dict[str, Any], seat: tuple[int, int], step: int) -> tuple[int, ...] | None:
    """What the random numbers of one parameter at one step follow from; None where it is rounded to nearest.

    They are the same in all copies of a part of a weight, and after a resume.
    """
    if not rounds_at_random(parameter, group):
        return None
    split = split_of(parameter)
    return (group["seed"], _DRAWS, *seat, step, split.part if split is not None and split.is_cut else 0)


@contextmanager
def stepped(parameter: Tensor, group: dict[str, Any], seat: tuple[int, int], step: int) -> Iterator[Tensor]:
    """What a step changes of a parameter: this process's part itself, or a float32 copy of it."""
    if not steps_a_copy(parameter, group):
        yield local(parameter)
        return
    with in_full(local(parameter), seed=rounding_seed(parameter, group, seat, step)) as full:
        yield full


@contextmanager
def in_full(weight: Tensor, *, seed: Sequence[int] | None, piece: int = 0) -> Iterator[Tensor]:
    """A weight in float32 at least, to be changed in place: itself, or a copy that is rounded back at the end.

    Args:
        weight: What this process holds of it.
        seed: Of rounding at random; None: to nearest.
        piece: Which part of a parameter it is, so that each draws numbers of its own.
    """
    full = weight.to(torch.promote_types(weight.dtype, torch.float32))
    yield full
    if full is weight:
        return
    if seed is not None:
        drawn = seeded(*seed, *([piece] if piece else ()), device=weight.device)
        full = round_stochastic(full, weight.dtype, drawn)
    weight.copy_(full)


def rounding_problems(value: Any) -> list[str]:
    """What is wrong with the option ``weight_rounding``."""
    if value in ROUNDINGS:
        return []
    return [f"weight_rounding must be one of {', '.join(ROUNDINGS)}, got {value!r}."]


def has_no_effect(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether rounding at random was asked for, and no group that asks has a weight of half precision."""
    asking = [group for group in groups if group["weight_rounding"] == "stochastic"]
    return bool(asking) and not any(p.dtype in DROPPED_BITS for group in asking for p in group["params"])
