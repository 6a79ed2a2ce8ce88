"""Loss spikes by their definition: two logged steps or more above the running median by more than the height."""

from __future__ import annotations

import math

import pytest

from fullrank.analysis.spikes import Spike, find_spikes
from fullrank.errors import ConfigError


def spikes(losses: list[float], window: int = 4, height: float = 0.5) -> list[Spike]:
    return find_spikes(list(range(1, len(losses) + 1)), losses, window=window, height=height)


def test_a_stretch_above_the_median_is_one_spike() -> None:
    assert spikes([2.0, 2.0, 2.0, 2.0, 2.9, 3.5, 2.6, 2.0, 2.0]) == [Spike(5, 7, 1.5)]


def test_one_hard_batch_is_none() -> None:
    assert spikes([2.0, 2.0, 2.0, 2.0, 9.0, 2.0, 9.0, 2.0]) == []


def test_the_height_must_be_exceeded() -> None:
    assert spikes([2.0, 2.0, 2.0, 2.0, 2.5, 2.5, 2.0]) == []
    assert spikes([2.0, 2.0, 2.0, 2.0, 2.51, 2.51, 2.0]) == [Spike(5, 6, pytest.approx(0.51))]


def test_a_long_spike_does_not_raise_its_own_median() -> None:
    assert spikes([1.0] * 4 + [3.0] * 20) == [Spike(5, 24, 2.0)]


def test_two_spikes() -> None:
    assert spikes([1.0] * 4 + [2.0] * 2 + [1.0] * 4 + [3.0] * 3) == [Spike(5, 6, 1.0), Spike(11, 13, 2.0)]


def test_a_falling_loss_has_none() -> None:
    assert spikes([10 / step for step in range(1, 100)]) == []


def test_too_short_a_run_has_no_median() -> None:
    assert spikes([1.0, 9.0, 9.0, 9.0]) == []
    assert spikes([]) == []


def test_what_is_not_finite_is_above() -> None:
    assert spikes([1.0] * 4 + [math.nan, math.inf]) == [Spike(5, 6, math.inf)]


@pytest.mark.parametrize(("window", "height"), [(0, 0.5), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_out_of_bounds(window: int, height: float) -> None:
    with pytest.raises(ConfigError, match="spike_window must be at least 1 logged step and spike_height above 0, got"):
        spikes([1.0], window, height)
