"""What one process makes of a plan, and how close to it several must come."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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
    """No entry is further off than this share of the largest change of its weight; what never changed is equal."""
    before, wanted = alone
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name], before[name]) for name in wanted}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst} of shape {tuple(wanted[worst].shape)}: {errors[worst]:.3g}"


def relative_error(found: Tensor, wanted: Tensor, before: Tensor) -> float:
    """The largest difference as a share of the largest change; infinite for what must not change, or is no number."""
    off = (found.double() - wanted.double()).abs().max().item()
    moved = (wanted.double() - before.double()).abs().max().item()
    if off == 0.0:
        return 0.0
    return off / moved if moved and off == off else float("inf")


def assert_within_spacings(found: Weights, wanted: Weights, *, num: int) -> None:
    """No entry is further off than so many steps from one bfloat16 number to the next."""
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        largest = torch.maximum(weight.abs(), found[name].abs()).float()
        spacing = torch.exp2(torch.frexp(largest).exponent.float() - 8)
        off = ((found[name].float() - weight.float()).abs() / spacing).max().item()
        assert off <= num, f"{name} of shape {tuple(weight.shape)}: {off:.3g} spacings"
