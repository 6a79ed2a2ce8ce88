"""States partitioned over the processes of DDP: the same weights from a share of the state, saved and loaded whole."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import SIFT, FiraAdamW
from fullrank.errors import UnsupportedError
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import Plan, alone
from tests.distributed.training import STEPS, part, weights
from tests.problems import make_gradients, make_weight

pytestmark = pytest.mark.slow

HALFWAY = 5
PLANS = {
    f"partitioned-{method}-{basis}": Plan(method, {"basis": basis, "partition_states": True})
    for method in ("fira", "galore", "apollo")
    for basis in ("svd", "power")
}
CODED = {"basis": "random", "partition_states": True, "state_dtype": "8bit"}
PLANS["partitioned-fira-8bit"] = Plan("fira", CODED, width=240)  # so wide that the embeddings have codes too


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


def few(place: Place) -> dict[str, Any]:
    """One gradient for two processes: who keeps no state still saves it; copies keep their share; no pickle."""
    weight = nn.Parameter(make_weight((12, 8)))
    small = nn.Parameter(make_weight((3, 2)))
    optimizer = FiraAdamW([small, weight], rank=2, partition_states=True)
    twin: Any = None
    for number, gradient in enumerate(make_gradients((12, 8), 4)):
        weight.grad = gradient.clone()
        optimizer.step()
        if number == 1:
            other, twin = copy.deepcopy((weight, optimizer))
        elif twin is not None:
            other.grad = gradient.clone()
            twin.step()
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(optimizer)
    with pytest.raises(UnsupportedError, match="consolidate_state_dict"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict()
    saved = len(optimizer.state_dict()["state"]) if place.rank == 0 else 1
    return {"weight": weight.detach(), "copy": other.detach(), "saved": saved, "kept": len(optimizer.state[weight])}


def beside_sift(place: Place) -> dict[str, Any]:
    """What SIFT keeps with the optimizer's state is not partitioned: it survives a save in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    sift = SIFT(model, 0.2, ["0.weight", "2.weight"])
    optimizer = FiraAdamW(list(sift.parameters_in_optimizer()), partition_states=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    saved = {}
    for step in range(4):
        batch = torch.randn(6, 12, generator=torch.Generator().manual_seed(10 * step + place.rank))
        wrapped(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.consolidate_state_dict()
        if place.rank == 0:
            saved = optimizer.state_dict()["state"]
    keys = sorted(map(len, saved.values())) if saved else []
    return {"weight": model[0].weight.detach(), "keys": keys, "guests": len(sift.sparse_mapping)}


def two_models(place: Place) -> dict[str, Any]:
    """Weights that differ would be overwritten by those of another process: refused in all of them."""
    weight = nn.Parameter(make_weight((12, 8), seed=place.rank))
    optimizer = FiraAdamW([weight], rank=2, partition_states=True)
    weight.grad = make_gradients((12, 8), 1)[0]
    with pytest.raises(UnsupportedError, match="different weights"):
        optimizer.step()
    return {"same": float(torch.equal(weight, make_weight((12, 8), seed=place.rank)))}


RUNS = [Case(name, functools.partial(divide, plan=plan)) for name, plan in PLANS.items()]
FEW = Case("partitioned-few", few, worlds=(2,))
BESIDE = Case("partitioned-beside-sift", beside_sift, worlds=(2,))
MODELS = Case("partitioned-two-models", two_models, worlds=(2,))
CASES = named(*RUNS, FEW, BESIDE, MODELS)


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


@each([FEW])
def test_a_process_that_keeps_nothing(case: Case, world: int, outcome: Any) -> None:
    alone_weight = nn.Parameter(make_weight((12, 8)))
    optimizer = FiraAdamW([nn.Parameter(make_weight((3, 2))), alone_weight], rank=2)
    for gradient in make_gradients((12, 8), 4):
        alone_weight.grad = gradient.clone()
        optimizer.step()
    found = outcome(case, world)
    for process in found:
        torch.testing.assert_close(process.tensors["weight"], alone_weight.detach())
        assert torch.equal(process.tensors["copy"], process.tensors["weight"])
        assert process.values["saved"] == 1
    assert sorted(bool(process.values["kept"]) for process in found) == [False, True]


@each([BESIDE])
def test_beside_sift(case: Case, world: int, outcome: Any) -> None:
    first, second = outcome(case, world)
    assert torch.equal(first.tensors["weight"], second.tensors["weight"])
    assert first.values["keys"] == [8] * first.values["guests"]  # Adam's three and SIFT's five


@each([MODELS])
def test_two_models_are_refused(case: Case, world: int, outcome: Any) -> None:
    assert all(process.values["same"] for process in outcome(case, world))
