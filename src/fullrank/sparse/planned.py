"""What would train of a model, from shapes alone: the chosen values of each weight, and what trains densely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.coded import dtype_beside, layer_with_codes
from fullrank.ops.sparse import Layout
from fullrank.sparse.seat import divide, layout_of
from fullrank.sparse.settings import num_chosen, values_shape


@dataclass(frozen=True, eq=False)
class PlannedValues:
    """The values of one weight that would train."""

    kept: torch.dtype
    """Of the weight, decoded where it is kept as codes."""
    layout: Layout
    shape: tuple[int, ...]
    """Of the values."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values: float32, or the weight's where that is more."""
        return torch.promote_types(self.kept, torch.float32)

    @property
    def numel(self) -> int:
        """Values that train."""
        return math.prod(self.shape)


def planned_values(model: nn.Module, config: Any) -> tuple[list[PlannedValues], list[nn.Parameter]]:
    """The values that would train of each weight under a method's options, and the parameters that train densely.

    Raises:
        ConfigError: If a pattern has no match, or a weight cannot be trained so.
    """
    targets, dense, _ = divide(model, config.target_modules, config.exception)
    planned = []
    for name, weight in targets.items():
        layout = layout_of(model, name, weight, config.granularity, config.block_size, config.scope)
        kept = weight.dtype if layer_with_codes(model, name) is None else dtype_beside(model.parameters())
        planned.append(PlannedValues(kept, layout, values_shape(layout, num_chosen(config.density, layout))))
    return planned, list(dense.values())
