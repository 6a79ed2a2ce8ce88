"""torch.distributed.checkpoint: saved by two processes, resumed by one and by three on the same trajectory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from fullrank import METHODS
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import Plan, Run, alone
from tests.distributed.training import STEPS, weights

pytestmark = pytest.mark.slow

HALFWAY = 5
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def plan_of(method: str, *ways: str) -> Plan:
    """Our optimizers make all states of sharded parameters at once; others none for what never has a gradient."""
    return Plan(method, unused=set(ways) == {"fsdp2"} and method in ("galore", "fira", "apollo"))


def save(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.plain, run.built.optimizer)
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load(run: Run, folder: Path, **options: Any) -> None:
    """Into a run that has just been made."""
    model, optimizer = get_state_dict(run.plain, run.built.optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    checkpoint.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(), **options)
    set_state_dict(
        run.plain,
        run.built.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def finish(run: Run) -> dict[str, Any]:
    """The second half of the steps."""
    if run.built.at_step is not None:
        run.built.at_step(HALFWAY)
    run.steps(STEPS[HALFWAY:])
    return {f"weight/{name}": weight for name, weight in run.weights().items()}


def keys(run: Run) -> list[str]:
    """Of the optimizer's state, as a checkpoint has them."""
    state: Any = get_optimizer_state_dict(run.plain, run.built.optimizer)["state"]
    return sorted(f"{name}/{key}" for name, held in state.items() for key in held)


def save_or_resume(place: Place, *, method: str, ways: Sequence[str]) -> dict[str, Any]:
    """Two processes save after half of the steps, in the first way; three go on from there in the second."""
    from tests.distributed.wrapping import WAYS

    folder = place.folder / "-".join(["saved", method, *ways])
    plan = plan_of(method, *ways)
    if place.world == 3:
        run = WAYS[ways[1]](plan)
        load(run, folder)
        return finish(run)
    run = WAYS[ways[0]](plan)
    run.steps(STEPS[:HALFWAY])
    save(run, folder)
    return {"folder": str(folder), "keys": keys(run), "fresh": keys(WAYS[ways[0]](plan))}


RESUMED = {f"resumed-{method}-{way}": (method, way, way) for method in METHODS for way in ("ddp", "fsdp2")}
RESUMED |= {f"crossed-{first}-{then}": ("fira", first, then) for first, then in (("ddp", "fsdp2"), ("fsdp2", "ddp"))}
RESUMES = [
    Case(name, functools.partial(save_or_resume, method=method, ways=ways)) for name, (method, *ways) in RESUMED.items()
]


@each(RESUMES)
def test_resumed(case: Case, world: int, outcome: Any) -> None:
    """``world`` 2 stands for what two processes saved, resumed here by one."""
    plan = plan_of(*RESUMED[case.name])
    found = outcome(case, world)[0]
    if world == 3:
        resumed = weights(found)
    else:
        assert found.values["keys"] == found.values["fresh"]  # none would be passed over by a load
        run = alone(plan)
        load(run, Path(found.values["folder"]), no_dist=True)
        resumed = weights_of(finish(run))
    assert_same_weights(resumed, trained_alone(plan, STEPS), tolerance=1e-9)


def gather_whole(place: Place, *, method: str) -> dict[str, Any]:
    """The whole state in the first process, as a file; and given back to a new run from there."""
    from tests.distributed.wrapping import WAYS

    file = place.folder / f"whole-{method}-{place.world}.pt"
    plan = plan_of(method, "fsdp2")
    run = WAYS["fsdp2"](plan)
    run.steps(STEPS[:HALFWAY])
    model = get_model_state_dict(run.plain, options=WHOLE)
    optimizer = get_optimizer_state_dict(run.plain, run.built.optimizer, options=WHOLE)
    if place.rank == 0:
        torch.save({"model": model, "optimizer": optimizer}, file)
    fresh = WAYS["fsdp2"](plan)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh.plain, model, options=options)
    set_optimizer_state_dict(fresh.plain, fresh.built.optimizer, optimizer, options=options)
    return finish(fresh) | {"file": str(file)}


GATHERED = {f"whole-{method}": method for method in METHODS}
GATHERS = [Case(name, functools.partial(gather_whole, method=method), (2,)) for name, method in GATHERED.items()]


@each(GATHERS)
def test_whole_state_in_the_first_process(case: Case, world: int, outcome: Any) -> None:
    plan, found = plan_of(GATHERED[case.name], "fsdp2"), outcome(case, world)[0]
    expected = trained_alone(plan, STEPS)
    assert_same_weights(weights(found), expected, tolerance=1e-9)
    run, saved = alone(plan), torch.load(found.values["file"], weights_only=True)
    run.plain.load_state_dict(saved["model"])
    set_optimizer_state_dict(run.plain, run.built.optimizer, saved["optimizer"], options=WHOLE)
    assert_same_weights(weights_of(finish(run)), expected, tolerance=1e-9)


def weights_of(found: dict[str, Any]) -> dict[str, Any]:
    """What ``finish`` returned, by the names of the weights."""
    return {name.removeprefix("weight/"): weight for name, weight in found.items()}


CASES = named(*RESUMES, *GATHERS)
