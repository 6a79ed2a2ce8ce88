"""What a projected optimizer keeps of a parameter, in which types, and what may be wrong with their options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fullrank.moments import EIGHT_BIT, Kept, dtype_problems, kept_as, spec_of, suits_codes
from fullrank.ops import subspace
from fullrank.projected.options import is_projected
from fullrank.saved_state import StateSpec
from fullrank.stepping import rounding_problems

FEWEST = 2
"""Rank from which on a code for each number and a scale for each row are smaller than float32."""


def precision_problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with the options of types and rounding, one sentence each."""
    return dtype_problems(group, "state_dtype", "plain_state_dtype") + rounding_problems(group["weight_rounding"])


def plain_kept(parameter: Tensor, group: dict[str, Any]) -> Kept:
    """How the moments of a parameter that is not projected are kept.

    By default in its own type, as in ``torch.optim.AdamW``, but for float16, and as codes where those of matrices are.
    """
    name = group["plain_state_dtype"]
    if name is None and group["state_dtype"] == EIGHT_BIT:
        name = EIGHT_BIT
    kept = kept_as(name, parameter.dtype)
    if kept == EIGHT_BIT and not suits_codes(parameter.shape):
        return torch.promote_types(parameter.dtype, torch.float32)
    return kept


def low_kept(parameter: Tensor, group: dict[str, Any]) -> Kept:
    """How the low-rank moments of a projected parameter are kept.

    Of rank 1 never as codes, whose scales, one for each row, would make them larger than float32.
    """
    name = group["state_dtype"]
    kept = parameter.dtype if name is None else kept_as(name, parameter.dtype)
    if kept == EIGHT_BIT and group["rank"] < FEWEST:
        return torch.promote_types(parameter.dtype, torch.float32)
    return kept


def projected_spec(parameter: Tensor, group: dict[str, Any], moments: Sequence[str]) -> StateSpec:
    """Low-rank moments in ``state_dtype``, basis and limiter in float32 (float64 for float64 weights); plain ones."""
    spec: StateSpec = {"step": ((), torch.float32)}
    if not is_projected(parameter, group):
        return spec | spec_of(moments, parameter.shape, plain_kept(parameter, group))
    working = torch.promote_types(parameter.dtype, torch.float32)
    rank = group["rank"]
    rows, columns = parameter.shape[0], parameter.shape[1:].numel()
    if subspace.projects_rows((rows, columns), group["proj_type"]):
        rows, columns = columns, rows
    low = (rank if group["proj_type"] == "full" else rows, rank)
    spec["basis"] = ((columns, rank), working)
    if group["proj_type"] == "full":
        spec["basis_left"] = ((rows, rank), working)
    if group.get("limiter_gamma") is not None:
        spec["limiter_norm"] = ((), working)
    return spec | spec_of(moments, low, low_kept(parameter, group))
