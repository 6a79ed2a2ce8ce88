"""What one process makes of a plan, and how close to it several must come."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from tests.distributed.loop import Plan, alone

Weights = Mapping[str, Tensor]
_known: dict[str, tuple[Weights, Weights]] = {}


def trained_alone(plan: Plan, steps: range) -> tuple[Weights, Weights]:
    """The weights of one process before and after these steps."""
    key = repr((plan, steps))
    if key not in _known:
        run = alone(plan)
        before = run.weights()
        run.steps(steps)
        _known[key] = before, run.weights()
    return _known[key]


def assert_same_weights(found: Weights, alone: tuple[Weights, Weights], *, tolerance: float) -> None:
    """No entry is further off than this share of the largest change of all; what never changed is equal bit for bit."""
    before, wanted = alone
    assert found.keys() == wanted.keys()
    moved = {name: largest(weight - before[name]) for name, weight in wanted.items()}
    off = {name: largest(found[name] - weight) for name, weight in wanted.items()}
    bounds = {name: tolerance * max(moved.values()) if moved[name] else 0.0 for name in wanted}
    wrong = {name: f"{off[name] / max(moved.values()):.2g}" for name in wanted if not off[name] <= bounds[name]}
    assert not wrong, f"difference by weight, of the largest change ({len(wrong)} of {len(wanted)} weights): {wrong}"


def largest(tensor: Tensor) -> float:
    """The largest magnitude."""
    return tensor.abs().max().item()


def assert_rounded_alike(found: Weights, wanted: Weights, *, share: float) -> None:
    """At most this share of the bfloat16 entries differ, each by four steps between numbers as large as its weight's.

    A step there is 2% of what ten steps of training change.
    """
    assert found.keys() == wanted.keys()
    differ = sum(int((weight != found[name]).sum()) for name, weight in wanted.items())
    assert differ <= share * sum(weight.numel() for weight in wanted.values())
    for name, weight in wanted.items():
        spacing = 2.0 ** (math.frexp(largest(weight))[1] - 8)
        off = largest(found[name].float() - weight.float())
        assert off <= 4 * spacing, f"{name} of shape {tuple(weight.shape)}: {off / spacing:.3g} spacings"
