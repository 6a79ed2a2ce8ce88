"""Units as people give them: flat or stacked per dimension, numpy or torch, in any order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import ConfigError
from fullrank.ops.sparse import Layout


def parse_units(given: Any, layout: Layout, *, name: str) -> Tensor:
    """Units as someone gives them, flat or stacked per dimension, as sorted numbers.

    Args:
        given: Numbers of units (K), or one row of places for each dimension of the grid (D x K). Where all rows have
            the same number of entries, the columns of each (M x k).
        layout: How the weight is divided into units.
        name: The weight's, for messages.

    Raises:
        ConfigError: If they are not whole numbers, out of bounds or repeated.
    """
    try:
        units = torch.stack([torch.as_tensor(row) for row in given]) if _is_nested(given) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"idx of {name} must hold whole numbers, got {type(given).__name__}: {error}") from None
    if units.is_floating_point() or units.is_complex() or units.dtype == torch.bool or units.ndim not in (1, 2):
        raise ConfigError(
            f"idx of {name} must hold whole numbers, {_forms(layout)}, got "
            f"{str(units.dtype).removeprefix('torch.')} of shape {tuple(units.shape)}."
        )
    units = units.long().cpu()
    if layout.per_row:
        return _parse_columns(units, layout, name=name)
    grid = layout.grid
    if units.ndim == 2:
        if len(units) != len(grid):
            raise ConfigError(f"idx of {name} must have {len(grid)} rows, one a dimension, got {len(units)}.")
        if bool(((units < 0) | (units >= torch.tensor(grid)[:, None])).any()):
            raise ConfigError(
                f"idx of {name} must lie within {grid}, got {units.amin(1).tolist()} to {units.amax(1).tolist()}."
            )
        strides = [math.prod(grid[dimension + 1 :]) for dimension in range(len(grid))]
        units = (units * torch.tensor(strides)[:, None]).sum(0)
    units = units.sort().values
    total = layout.num_units
    if not len(units) or units[0] < 0 or units[-1] >= total:
        found = f"{int(units[0])} to {int(units[-1])}" if len(units) else "none"
        raise ConfigError(f"idx of {name} must hold numbers from 0 to {total - 1}, got {found}.")
    if bool((units[1:] == units[:-1]).any()):
        raise ConfigError(f"idx of {name} holds a number twice. Pass it through torch.unique.")
    return units


def _parse_columns(columns: Tensor, layout: Layout, *, name: str) -> Tensor:
    """The columns of each row, checked and sorted (M x k)."""
    if columns.ndim != 2 or len(columns) != layout.rows or not columns.shape[1]:
        raise ConfigError(f"idx of {name} must hold {_forms(layout)}, got shape {tuple(columns.shape)}.")
    columns = columns.sort(dim=1).values
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < layout.columns:
        raise ConfigError(
            f"idx of {name} must hold columns from 0 to {layout.columns - 1}, got {int(columns.min())} to "
            f"{int(columns.max())}."
        )
    if bool((columns[:, 1:] == columns[:, :-1]).any()):
        raise ConfigError(f"idx of {name} holds a column of a row twice. Give each row k different ones.")
    return columns


def _forms(layout: Layout) -> str:
    """The shapes in which units may be given."""
    if layout.per_row:
        return f"the columns of each row ({layout.rows} x k) with scope row"
    return f"flat or stacked per dimension ({len(layout.grid)} x K)"


def _is_nested(given: Any) -> bool:
    """Whether these are rows, one a dimension, as ``numpy.unravel_index`` returns them."""
    return isinstance(given, tuple | list) and any(hasattr(row, "__len__") and len(row) for row in given)
