"""States partitioned over the processes of DDP: the same weights from a share of the state, saved and loaded whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import Plan, alone
from tests.distributed.training import STEPS, part, weights

pytestmark = pytest.mark.slow

HALFWAY = 5
PLANS = {
    f"partitioned-{method}-{basis}": Plan(method, {"basis": basis, "partition_states": True})
    for method in ("fira", "galore", "apollo")
    for basis in ("svd", "power")
}


def divide(place: Place, *, plan: Plan) -> dict[str, Any]:
    """Train, saving half-way; and go on from what two processes saved."""
    from tests.distributed.wrapping import WAYS

    file = place.folder / f"{plan.method}-{plan.options['basis']}.pt"
    run = WAYS["ddp"](plan)
    optimizer: Any = run.built.optimizer
    run.steps(STEPS[:HALFWAY])
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    owned = [index for index, (_, parameter, _) in enumerate(optimizer.named()) if optimizer.state.get(parameter)]
    optimizer.consolidate_state_dict()
    if place.rank == 0 and place.world == 2:
        torch.save({"model": run.plain.state_dict(), "optimizer": optimizer.state_dict()}, file)
    torch.distributed.barrier()
    run.steps(STEPS[HALFWAY:])
    found = {f"weight/{name}": weight for name, weight in run.weights().items()}
    resumed = WAYS["ddp"](plan)
    saved = torch.load(file, weights_only=True)
    resumed.plain.load_state_dict(saved["model"])
    resumed.built.optimizer.load_state_dict(saved["optimizer"])
    resumed.steps(STEPS[HALFWAY:])
    found |= {f"resumed/{name}": weight for name, weight in resumed.weights().items()}
    return {**found, "held": held, "owned": owned, "file": str(file)}


RUNS = [Case(name, functools.partial(divide, plan=plan)) for name, plan in PLANS.items()]
CASES = named(*RUNS)


@each(RUNS)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    expected = trained_alone(PLANS[case.name], STEPS)
    for found in outcome(case, world):
        assert_same_weights(weights(found), expected, tolerance=1e-9)
        assert_same_weights(part(found, "resumed/"), expected, tolerance=1e-9)


@each(RUNS)
def test_every_process_has_its_share(case: Case, world: int, outcome: Any) -> None:
    """No parameter has two owners, and no process holds much more than its share of the bytes."""
    found = outcome(case, world)
    owned = [index for process in found for index in process.values["owned"]]
    assert len(owned) == len(set(owned))
    held = [process.values["held"] for process in found]
    assert max(held) <= 1.1 * sum(held) / world


@each(RUNS)
def test_loads_in_one_process(case: Case, world: int, outcome: Any) -> None:
    run = alone(PLANS[case.name])
    saved = torch.load(outcome(case, world)[0].values["file"], weights_only=True)
    run.plain.load_state_dict(saved["model"])
    run.built.optimizer.load_state_dict(saved["optimizer"])
    run.steps(STEPS[HALFWAY:])
    assert_same_weights(run.weights(), trained_alone(PLANS[case.name], STEPS), tolerance=1e-9)
