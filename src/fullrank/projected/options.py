"""The options that all projected groups have, and what is wrong with them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fullrank.ops import subspace
from fullrank.optimizer import is_number

BASES = ("svd", "power", "random")


def is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether this group projects this parameter: a group with a rank, two or more dimensions."""
    return group["rank"] is not None and parameter.ndim >= 2


def projection_problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with the options that all projected groups have, one sentence each."""
    problems = []
    gap, alpha = group["update_proj_gap"], group["alpha"]
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        problems.append(f"update_proj_gap must be a whole number of optimizer steps, at least 1, got {gap!r}.")
    if not (is_number(alpha) and 0.0 < alpha < math.inf):
        problems.append(f"alpha must be a number above 0 and finite, got {alpha!r}.")
    if group["proj_type"] not in subspace.PROJ_TYPES:
        problems.append(f"proj_type must be one of {', '.join(subspace.PROJ_TYPES)}, got {group['proj_type']!r}.")
    if group["basis"] not in BASES:
        problems.append(f"basis must be one of {', '.join(BASES)}, got {group['basis']!r}.")
    for key, kind in (("rotate_moments", bool), ("stagger_refresh", bool), ("seed", int)):
        if not isinstance(group[key], kind):
            problems.append(f"{key} must be of type {kind.__name__}, got {group[key]!r}.")
    gamma, floor = group.get("limiter_gamma"), group.get("limiter_floor", 0.0)
    if gamma is not None and not (is_number(gamma) and gamma >= 1.0):
        problems.append(f"limiter_gamma must be a number, at least 1, or None for no limiter, got {gamma!r}.")
    if not (is_number(floor) and 0.0 <= floor < math.inf):
        problems.append(f"limiter_floor must be a number, at least 0 and finite, got {floor!r}.")
    return problems
