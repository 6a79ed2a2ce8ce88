"""Loss spikes of a run, plainly defined.

A spike is a stretch of at least two logged steps in a row whose training loss lies more than ``height`` above the
running median: the median of the last ``window`` logged losses before the stretch. One step alone is a hard batch,
not a spike. Its size is the largest excess over that median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fullrank.errors import ConfigError

WINDOW = 20
HEIGHT = 0.3
LEAST_STEPS = 2


@dataclass(frozen=True)
class Spike:
    """One stretch of steps with an excessive training loss."""

    first: int
    """Its first optimizer step."""
    last: int
    size: float
    """Largest excess over the running median (the loss's unit)."""


def find_spikes(
    steps: Sequence[int], losses: Sequence[float], *, window: int = WINDOW, height: float = HEIGHT
) -> list[Spike]:
    """The spikes of a training loss, in order.

    Args:
        steps: The logged optimizer steps.
        losses: The training loss at each of them; one that is not finite is above every median.
        window: Logged losses that a median is over; the first ``window`` steps have none, and no spike.
        height: Excess that makes a spike (the loss's unit).

    Raises:
        ConfigError: If ``window`` or ``height`` is out of bounds.
    """
    if window < 1 or not height > 0:
        raise ConfigError(
            f"spike_window must be at least 1 logged step and spike_height above 0, got {window} and {height}."
        )
    found: list[Spike] = []
    place = window
    while place < len(losses):
        level = median(losses[place - window : place])  # before the stretch, so that a long spike does not raise it
        end = place
        while end < len(losses) and not losses[end] <= level + height:
            end += 1
        if end - place >= LEAST_STEPS:
            size = max(math.inf if math.isnan(loss) else loss - level for loss in losses[place:end])
            found.append(Spike(steps[place], steps[end - 1], size))
        place = max(end, place + 1)
    return found
