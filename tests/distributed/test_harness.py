"""A case that raises fails its own test, with every traceback, and the cases after it run."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch

from tests.distributed.case import Case, Place, each, named
from tests.distributed.loop import DEVICE

pytestmark = pytest.mark.slow


def raise_in_one(place: Place) -> dict[str, Any]:
    """The last process raises where the others wait for it, though not for long."""
    if place.rank == place.world - 1:
        raise ValueError("raised on purpose")
    torch.distributed.monitored_barrier(timeout=datetime.timedelta(seconds=2))
    return {}


def sum_up(place: Place) -> dict[str, Any]:
    total = torch.tensor([place.rank + 1.0], device=DEVICE)
    torch.distributed.all_reduce(total)
    return {"total": total}


RAISED = Case("raised", raise_in_one, (3,))
CASES = named(RAISED, Case("summed", sum_up, (3,)))


@each([RAISED])
def test_a_case_that_raises_fails_alone(case: Case, world: int, outcome: Any) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)process 0:.*process 2:.*raised on purpose"):
        outcome(case, world)


@each([CASES["summed"]])
def test_the_next_one_runs(case: Case, world: int, outcome: Any) -> None:
    for found in outcome(case, world):
        assert found.tensors["total"].item() == 6.0
