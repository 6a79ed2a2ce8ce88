"""Update during backward in several processes: the weights are those of one process in an ordinary loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fullrank import METHODS, FiraAdamW, FusedBackward, UnsupportedError, divide_params
from tests.distributed import branches
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import DEVICE, Plan, Run, alone, loss_of, whole
from tests.distributed.network import batch
from tests.distributed.training import STEPS, weights
from tests.distributed.wrapping import fsdp2

pytestmark = pytest.mark.slow

RANDOM = {"basis": "random"}
POWER = {"basis": "power"}


@dataclass(frozen=True)
class Fused:
    """A plan, and how its gradients are taken."""

    plan: Plan
    way: str
    worlds: tuple[int, ...] = (2,)
    max_grad_norm: float | None = None
    in_context: bool = False
    """Micro-batches are told by ``accumulating()``, not by what the wrapper has for it."""
    exact: bool = True
    """Whether it equals an ordinary loop; else the loop of one process with FusedBackward."""


PLANS: dict[str, Fused] = {
    **{f"{method}-ddp": Fused(Plan(method), "ddp", (3,)) for method in METHODS},
    **{f"{method}-fsdp2": Fused(Plan(method), "fsdp2", (3,)) for method in METHODS},
    "fira-ddp-checkpointing": Fused(Plan("fira", checkpointing=True, num_blocks=2), "ddp"),
    "fira-fsdp2-checkpointing": Fused(Plan("fira", checkpointing=True, num_blocks=2), "fsdp2"),
    "fira-ddp-clipped": Fused(Plan("fira"), "ddp", max_grad_norm=0.01, exact=False),
    "fira-fsdp2-clipped": Fused(Plan("fira"), "fsdp2", max_grad_norm=0.01, exact=False),
    "galore-ddp-random": Fused(Plan("galore", RANDOM, accumulation=2), "ddp", (3,)),
    "galore-ddp-both": Fused(Plan("galore", RANDOM | {"proj_type": "full"}, accumulation=2), "ddp", in_context=True),
    "galore-ddp-power": Fused(Plan("galore", POWER, accumulation=2), "ddp", (3,), exact=False),
    "galore-fsdp2-random": Fused(Plan("galore", RANDOM, accumulation=2), "fsdp2", (3,), in_context=True),
    "galore-fsdp2-both": Fused(
        Plan("galore", RANDOM | {"proj_type": "full"}, accumulation=2), "fsdp2", in_context=True
    ),
    "galore-fsdp2-power": Fused(Plan("galore", POWER, accumulation=2), "fsdp2", (3,), in_context=True, exact=False),
    "galore-fsdp2-whole": Fused(Plan("galore", POWER, accumulation=2), "fsdp2"),
    "fira-fsdp2-whole": Fused(Plan("fira", POWER, accumulation=2), "fsdp2"),
    "sift-ddp-accumulation": Fused(Plan("sift", accumulation=2), "ddp"),
}


@dataclass
class FusedRun(Run):
    """A model in training whose gradients are taken as they arrive."""

    fused: FusedBackward | None = None
    in_context: bool = False

    def backward(self, number: int) -> None:
        """The gradients of one step, all of them taken but for those of small parameters under DDP."""
        if not self.in_context:
            super().backward(number)
            return
        assert self.fused is not None
        first, last = batch(number).to(DEVICE).chunk(2)
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_several() else (0, 1)
        with self.fused.accumulating():
            (loss_of(self.model, first[rank::world]) / 2).backward()
        (loss_of(self.model, last[rank::world]) / 2).backward()


def is_several() -> bool:
    return torch.distributed.is_initialized()


def start(case: Fused, way: str) -> FusedRun:
    """The run of a case: under DDP, sharded, or alone."""
    plan = case.plan
    if way == "fsdp2":
        run = fsdp2(plan)
        model, built, wrapped = run.model, run.built, run.model
    else:
        model = plan.network()
        built, wrapped = plan.build(model), model
    fused = FusedBackward(built.optimizer, model=model if way == "ddp" else None, max_grad_norm=case.max_grad_norm)
    if way == "ddp":
        if torch.distributed.get_rank():
            with torch.no_grad():
                for parameter in model.parameters():
                    if plan.method != "sift":  # which compares
                        parameter.add_(1.0)  # all take the first one's weights
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    in_context = case.in_context or (way == "alone" and plan.accumulation > 1)
    return FusedRun(plan, wrapped, built, fused=fused, in_context=in_context)


def train(place: Place, *, case: Fused) -> dict[str, Any]:
    run = start(case, case.way)
    most = watch(run)
    norms = []
    for number in STEPS:
        run.steps(range(number, number + 1))
        assert run.fused is not None
        norms.append(run.fused.grad_norm.item())
    found: dict[str, Any] = {f"weight/{name}": weight for name, weight in run.weights().items()}
    return found | {"most": max(most), "norms": norms}


def watch(run: Run) -> list[int]:
    """How many matrices have a gradient, at the end of each backward pass that goes into a step."""
    found = []
    step = run.built.optimizer.step

    def stepping(*args: Any, **options: Any) -> Any:
        given = [p for _, p in run.trained() if p.grad is not None and p.ndim >= 2 and not hasattr(p, "train_num")]
        found.append(len(given))
        return step(*args, **options)

    run.built.optimizer.step = stepping  # type: ignore[method-assign]
    return found


def branch(place: Place) -> dict[str, Any]:
    """Processes with other parts of a model: what one has no gradient of is stepped with the others' mean."""
    model = branches.Branches().double()
    optimizer, fused = optimizer_of(model), None
    fused = FusedBackward(optimizer, model=model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(6):
        inputs, is_first = branches.batch(step)
        is_first &= step % 3 != 2  # in some steps nobody goes there
        loss = wrapped(inputs[place.rank :: place.world], is_first[place.rank :: place.world])["loss"]
        model.eval()
        model(inputs, is_first)  # beside training, of which DDP does not know
        model.train()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sorted(name for name, p in model.named_parameters() if optimizer.state[p])
    fused.detach()
    assert not model._ddp_params_and_buffers_to_ignore
    return {f"weight/{name}": whole(p.detach()) for name, p in model.named_parameters()} | {"state": state}


def branch_alone(world: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The same in one process: the mean of what the processes would have."""
    model = branches.Branches().double()
    optimizer = optimizer_of(model)
    for step in range(6):
        inputs, is_first = branches.batch(step)
        is_first &= step % 3 != 2
        for rank in range(world):
            (model(inputs[rank::world], is_first[rank::world])["loss"] / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sorted(name for name, p in model.named_parameters() if optimizer.state[p])
    return {name: p.detach().clone() for name, p in model.named_parameters()}, state


def optimizer_of(model: nn.Module) -> FiraAdamW:
    groups = divide_params(model, ["blocks", "side", "never"], rank=3)
    # a gradient of one sample has one direction: power would find the others in its rounding
    return FiraAdamW(groups, lr=1e-2, update_proj_gap=2, weight_decay=0.1, basis="random")


def refused(place: Place) -> dict[str, Any]:
    """Messages of what cannot work; each at the latest before the first step is over."""
    plan = Plan("fira")
    return {
        "no model": said(lambda: FusedBackward(plan.build(plan.network()).optimizer)),
        "partition": said(lambda: start(Fused(Plan("fira", {"partition_states": True}), "ddp"), "ddp")),
        "wrapped before": said(wrapped_before),
        "unwrapped": said(lambda: start(Fused(plan, "alone"), "ddp").plain(batch(0)[:, :-1])),
        "evaluation": said(evaluation),
        "unfinished": said(unfinished),
        "old wrapper": said(old_wrapper),
        "copy": said(wrapped_copy),
        "frozen matrix": said(lambda: trains_later(2)),
        "frozen vector": said(lambda: trains_later(1)),
        "between": said(lambda: trains_later(1, at_once=True)),
        "join": said(joined),
        "accumulation": said(lambda: start(Fused(Plan("fira", accumulation=2), "ddp"), "ddp").steps(range(1))),
    }


def wrapped_before() -> None:
    plan = Plan("fira")
    model = plan.network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    FusedBackward(plan.build(model).optimizer, model=model)
    wrapped(batch(0)[:, :-1])


def unfinished() -> None:
    run = start(Fused(Plan("galore"), "ddp"), "ddp")
    with run.model.no_sync():
        loss_of(run.model, batch(0)).backward()
    run.built.optimizer.step()


def evaluation() -> None:
    model, optimizer = small()
    FusedBackward(optimizer, model=model)
    a_step(DistributedDataParallel(model), optimizer)
    model.eval()
    model(torch.ones(2, 6)).sum().backward()


def small() -> tuple[nn.Module, FiraAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    return model, FiraAdamW(divide_params(model, [""], rank=2), lr=1e-2)


def a_step(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    wrapped(torch.full((2, 6), 1.0 + torch.distributed.get_rank())).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_one(model: nn.Module) -> None:
    """Weights are those of the first process in all of them."""
    for parameter in model.parameters():
        first = parameter.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(parameter, first)


def old_wrapper() -> None:
    """Anew it trains on: ordinarily, and with another one."""
    model, optimizer = small()
    with FusedBackward(optimizer, model=model) as fused:
        wrapped = DistributedDataParallel(model)
        a_step(wrapped, optimizer)
    a_step(DistributedDataParallel(model), optimizer)
    fused = FusedBackward(optimizer, model=model)
    a_step(wrapped, optimizer)  # which leaves alone what this one averages
    assert_one(model)
    fused.detach()
    a_step(wrapped, optimizer)


def wrapped_copy() -> None:
    model, optimizer = small()
    FusedBackward(optimizer, model=model)
    twin = copy.deepcopy(model)
    ordinary = torch.optim.AdamW(twin.parameters())
    wrapped = DistributedDataParallel(twin)
    message = said(lambda: a_step(wrapped, ordinary))
    a_step(DistributedDataParallel(twin), ordinary)
    a_step(DistributedDataParallel(model), optimizer)
    assert_one(twin)
    assert_one(model)
    raise UnsupportedError(message)


def trains_later(ndim: int, *, at_once: bool = False) -> None:
    """What was frozen when DDP wrapped the model; wrapped anew it is averaged."""
    model, optimizer = small()
    frozen = next(parameter for parameter in model.parameters() if parameter.ndim == ndim)
    frozen.requires_grad_(False)
    FusedBackward(optimizer, model=model)
    wrapped = DistributedDataParallel(model)
    if not at_once:
        a_step(wrapped, optimizer)
    frozen.requires_grad_(True)
    message = said(lambda: a_step(wrapped, optimizer))
    a_step(DistributedDataParallel(model), optimizer)
    assert_one(model)
    raise UnsupportedError(message)


def joined() -> None:
    model, optimizer = small()
    FusedBackward(optimizer, model=model)
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        a_step(wrapped, optimizer)


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except (UnsupportedError, ValueError) as error:
        return str(error)
    return "nothing"


def _case(name: str, fused: Fused) -> Case:
    return Case(f"fused-{name}", functools.partial(train, case=fused), fused.worlds)


CASES = named(
    *(_case(name, fused) for name, fused in PLANS.items()),
    Case("fused-branch", branch, (2, 3)),
    Case("fused-refused", refused, (2,)),
)


@functools.cache
def fused_alone(name: str) -> dict[str, Any]:
    case = PLANS[name]
    run = start(case, "alone")
    run.steps(STEPS)
    return run.weights()


@each([case for name, case in CASES.items() if name.removeprefix("fused-") in PLANS])
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    name = case.name.removeprefix("fused-")
    fused, found = PLANS[name], outcome(case, world)
    for other in found[1:]:
        assert all(torch.equal(weight, weights(found[0])[key]) for key, weight in weights(other).items())
        assert other.values["norms"] == found[0].values["norms"]
    plan = fused.plan
    before, wanted = trained_alone(plan, STEPS)
    if not fused.exact:
        wanted = fused_alone(name)
    assert_same_weights(weights(found[0]), (before, wanted), tolerance=1e-9)
    most = max(outcome.values["most"] for outcome in found)
    assert most == (plan.method == "sift" and fused.way == "ddp"), "DDP keeps a matrix where it has nothing else"


@each([CASES["fused-branch"]])
def test_processes_with_other_parts_of_the_model(case: Case, world: int, outcome: Any) -> None:
    wanted, state = branch_alone(world)
    for found in outcome(case, world):
        for name, weight in weights(found).items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-10, atol=1e-12, msg=name)
        assert found.values["state"] == state, "a parameter that nobody uses is left alone"


@each([CASES["fused-refused"]])
def test_what_cannot_work_is_refused(case: Case, world: int, outcome: Any) -> None:
    found = outcome(case, world)[0].values
    assert "Give FusedBackward the model" in found["no model"]
    assert "partition_states" in found["partition"]
    assert "wrap that very model then" in found["wrapped before"]
    assert "wrap that very model then" in found["unwrapped"]
    assert "returned to DistributedDataParallel" in found["evaluation"]
    assert "outside of accumulating()" in found["unfinished"]
    assert "needs the gradient of all micro-batches" in found["accumulation"]
    assert "Wrap the model anew" in found["old wrapper"]
    assert "Wrap the model anew" in found["copy"]
    assert "0.weight may have been frozen" in found["frozen matrix"]
    assert "0.bias may have been frozen" in found["frozen vector"]
    assert "0.bias" in found["between"]
    assert "leave join() out" in found["join"]


def test_the_loop_of_one_process_is_one() -> None:
    """What the inexact cases are compared with does train."""
    assert alone(PLANS["galore-ddp-power"].plan).weights().keys() == fused_alone("galore-ddp-power").keys()
