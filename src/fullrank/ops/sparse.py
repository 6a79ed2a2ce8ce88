"""Choosing units of a weight, and moving their entries in and out of it.

A unit is what is chosen as a whole: one entry, one row, or one block of B x B entries. Units are
numbered row by row over a grid; a set of them is a sorted tensor of numbers (int32 where they fit). Where the
same number of entries is chosen in each row, they are kept as the sorted columns of each row (M x k).

    W   the weight, of any shape and memory layout (rows and blocks: M x N)
    U   number of chosen units,  K = U x entries of a unit: number of chosen entries
    k   entries of each row, where all rows have the same number
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GRANULARITIES = ("entry", "row", "block")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight of this shape is divided into units."""

    shape: tuple[int, ...]
    granularity: str = "entry"
    block_size: int = 1
    """Side of a block (entries)."""
    per_row: bool = False
    """Whether each row has the same number of chosen entries. An entry of a vector is a row of its own."""

    @property
    def rows(self) -> int:
        """Size of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Entries of a row: of all dimensions but the first."""
        return math.prod(self.shape[1:])

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of units along each dimension in which they are counted."""
        if self.granularity == "row":
            return self.shape[:1]
        if self.granularity == "block":
            return (self.shape[0] // self.block_size, self.shape[1] // self.block_size)
        return self.shape

    @property
    def num_units(self) -> int:
        """Units in the whole weight."""
        return math.prod(self.grid)

    @property
    def unit_numel(self) -> int:
        """Entries of one unit."""
        return 1 if self.granularity == "entry" else math.prod(self.shape) // self.num_units

    @property
    def index_dtype(self) -> torch.dtype:
        """The smallest dtype that holds every number that units are kept by."""
        return _smallest_dtype(self.num_places)

    @property
    def num_places(self) -> int:
        """What the numbers that units are kept by are below: units of the weight, or columns of a row."""
        return self.columns if self.per_row else self.num_units


def unit_scores(scores: Tensor, layout: Layout) -> Tensor:
    """Sum the scores of the entries of each unit (shape of W to one number a unit, flat)."""
    if layout.granularity == "entry":
        return scores.reshape(-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if layout.granularity == "row":
        return scores.sum(1, dtype=wide)
    return _tiles(scores, layout).sum((2, 3), dtype=wide).reshape(-1)


def top_units(scores: Tensor, num: int) -> Tensor:
    """Numbers of the ``num`` highest scores, sorted (U, int64)."""
    return scores.topk(num, sorted=False).indices.sort().values


def top_of_rows(scores: Tensor, num: int, layout: Layout) -> Tensor:
    """Columns of the ``num`` highest scores (flat) of each row, sorted (M x ``num``, int64)."""
    return scores.view(layout.rows, layout.columns).topk(num, dim=1, sorted=False).indices.sort(dim=1).values


def flat_units(kept: Tensor, layout: Layout) -> Tensor:
    """Sorted numbers of the units (U) from what they are kept by: these numbers, or the columns of each row."""
    if not layout.per_row:
        return kept
    numbers = torch.arange(len(kept), dtype=_smallest_dtype(layout.num_units), device=kept.device)
    return (numbers[:, None] * layout.columns + kept).view(-1)


def top_of_all(scores: list[Tensor], num: int) -> list[Tensor]:
    """Numbers of the ``num`` highest scores over all tensors, sorted, for each tensor: at least its highest one."""
    for score in scores:
        score[score.argmax()] = torch.inf
    tops = [score.topk(min(num, len(score)), sorted=False) for score in scores]
    values = torch.cat([top.values.float() for top in tops])
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[values.topk(min(num, len(values)), sorted=False).indices] = True
    parts = kept.split([len(top.values) for top in tops])
    return [top.indices[part].sort().values for top, part in zip(tops, parts, strict=True)]


def take(tensor: Tensor, units: Tensor, layout: Layout) -> Tensor:
    """The entries of the chosen units, unit by unit (K)."""
    if layout.granularity == "row":
        return tensor.index_select(0, units).reshape(-1)
    if layout.granularity == "block":
        return _tiles(tensor, layout)[block_places(units, layout.grid[1])].reshape(-1)
    flat, positions = _flat(tensor, units)
    return flat.index_select(0, positions)


def put_(tensor: Tensor, units: Tensor, values: Tensor, layout: Layout) -> None:
    """Overwrite the entries of the chosen units with ``values`` (K), in place, rounded to the tensor's dtype."""
    values = values.to(tensor.dtype)
    if layout.granularity == "row":
        tensor.index_copy_(0, units.long(), values.view(-1, tensor.shape[1]))
    elif layout.granularity == "block":
        size = layout.block_size
        _tiles(tensor, layout)[block_places(units, layout.grid[1])] = values.view(-1, size, size)
    else:
        flat, positions = _flat(tensor, units)
        flat.index_copy_(0, positions.long(), values)


def shared_units(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where the units that both sorted sets hold stand in the first and in the second (int64 positions)."""
    place = torch.searchsorted(new, old).clamp_(max=max(len(new) - 1, 0))
    stays = new[place] == old
    return stays.nonzero()[:, 0], place[stays]


def carry(values: Tensor, stay: tuple[Tensor, Tensor], num: int, *, unit_numel: int) -> Tensor:
    """Values (K) of the units that stay, at their new places; zero for the others (``num`` units)."""
    carried = values.new_zeros(num, unit_numel)
    carried[stay[1]] = values.view(-1, unit_numel)[stay[0]]
    return carried.view(-1)


def block_places(units: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column (U each, int64) of numbered blocks in a grid with so many columns."""
    numbers = units.long()
    return numbers // columns, numbers % columns


def _smallest_dtype(num: int) -> torch.dtype:
    return torch.int32 if num <= torch.iinfo(torch.int32).max else torch.int64


def _tiles(tensor: Tensor, layout: Layout) -> Tensor:
    """A matrix as a grid of blocks, without a copy (M/B x N/B x B x B)."""
    shape = (-1, layout.block_size)
    tiles: Tensor = tensor.unflatten(1, shape).unflatten(0, shape)
    return tiles.transpose(1, 2)


def _flat(tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's memory as a vector, and where in it the entries with these row-major numbers lie."""
    if tensor.is_contiguous():
        return tensor.view(-1), index
    positions = torch.zeros_like(index, dtype=torch.int64)
    rest = index.long()
    span = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        positions += rest % size * stride
        rest = rest // size
        span += (size - 1) * stride
    return tensor.as_strided((span,), (1,)), positions
