"""What lives at every moment of a step, for any number of layers and of sequences.

Every tensor of a step belongs to the layers or to what is around them, and has a dimension for the sequences of the
batch or none. So a sum over what lives at a moment is affine in the layers and in the sequences, as long as the same
operations are made; in the first and in the last layer, and around them, they are. Within a pass forward or backward
the sum at a place in a layer between is affine in that layer's number, so it is largest in the first or the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullrank.plan.tracker import CATEGORIES, HOST, Region

INNER = "inner"
"""The place of a layer that is neither the first nor the last."""
STEP = "step"
"""The part of a region that is an optimizer's step."""
FIRST, STEADY = "first", "steady"
"""The pass that a run begins with, and all others."""
Moments = Mapping[Region, NDArray[np.int64]]
"""Region -> bytes by category (columns) at each of its moments (rows)."""


@dataclass(frozen=True)
class Held:
    """Bytes by category at one moment."""

    weights: int
    gradients: int
    states: int
    other: int
    host: int

    @property
    def total(self) -> int:
        """All of them on the device."""
        return self.weights + self.gradients + self.states + self.other


def as_moments(found: Mapping[Region, Sequence[tuple[int, ...]]]) -> dict[Region, NDArray[np.int64]]:
    """What a tracker has kept; of an optimizer's step, which goes over all layers, the moment at which most lives."""
    moments = {}
    for region, kept in found.items():
        rows = np.array(kept, dtype=np.int64).reshape(-1, len(CATEGORIES))
        if STEP in region:
            place = int(on_device(rows).argmax())
            rows = rows[place : place + 1]
        moments[region] = rows
    return moments


def alike(first: Moments, second: Moments) -> bool:
    """Whether the same regions have as many moments: the same operations were made."""
    shared = _ends(first)
    return shared == _ends(second) and all(len(first[region]) == len(second[region]) for region in shared)


def extended(first: Moments, second: Moments, at: tuple[int, int], to: int) -> dict[Region, NDArray[np.int64]]:
    """The moments at ``to`` layers or sequences, from those at two other numbers of them."""
    share, over = to - at[0], at[1] - at[0]
    return {region: first[region] + (second[region] - first[region]) * share // over for region in _ends(first)}


def peak(moments: Moments, extra: Sequence[int] = (0,) * len(CATEGORIES)) -> tuple[Held, Region]:
    """The moment at which most lives, and where in the step that is.

    Args:
        moments: Of the step.
        extra: Bytes by category that live all the time and were not traced.
    """
    best: tuple[int, Region, NDArray[np.int64]] | None = None
    for region, rows in moments.items():
        sums = on_device(rows)
        place = int(sums.argmax())
        if best is None or sums[place] > best[0]:
            best = (int(sums[place]), region, rows[place])
    assert best is not None
    held = [int(value) + more for value, more in zip(best[2], extra, strict=True)]
    return Held(*held), best[1]


def on_device(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum at each moment, without what is on the host."""
    sums: NDArray[np.int64] = rows[:, :HOST].sum(axis=1)
    return sums


def most(moments: Moments, category: int) -> int:
    """The most that a category holds at a time."""
    return max(int(rows[:, category].max()) for rows in moments.values())


def _ends(moments: Moments) -> set[Region]:
    """All regions but those of layers between the first and the last."""
    return {region for region in moments if not any(INNER in part for part in region)}
