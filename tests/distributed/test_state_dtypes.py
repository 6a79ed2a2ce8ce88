"""8-bit moments and rounding at random in several processes: as in one, saved by two and resumed by one and three."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import Plan, alone, whole
from tests.distributed.test_checkpoints import finish, keys, load, save
from tests.distributed.test_options import refuse
from tests.distributed.training import STEPS, train, weights

pytestmark = pytest.mark.slow

WIDTH = 240
"""Embeddings of 19 x 240 numbers have codes; rows of a shard are of 2.5 blocks."""
HALFWAY = 5
EIGHT: dict[str, Any] = {"state_dtype": "8bit"}
PLANS = {
    "8bit-full": Plan("full", EIGHT, width=WIDTH, unused=False),
    "8bit-fira": Plan("fira", {**EIGHT, "rotate_moments": True}, width=WIDTH),
    "8bit-galore": Plan("galore", {**EIGHT, "proj_type": "full"}, width=WIDTH),
    "8bit-sift": Plan("sift", {**EIGHT, "density": 0.1}, width=WIDTH, unused=False),
    "8bit-relora": Plan("relora", {**EIGHT, "reset": "magnitude"}, width=WIDTH, unused=False),
}
TRAINED = [
    Case(name, functools.partial(train, plan=plan, way="fsdp2"), (3,) if name == "8bit-galore" else (2,))
    for name, plan in PLANS.items()
]


@each(TRAINED)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    found = weights(outcome(case, world)[0])
    assert_same_weights(found, trained_alone(PLANS[case.name], STEPS), tolerance=1e-9)


def save_or_resume(place: Place, *, plan: Plan) -> dict[str, Any]:
    """Two processes save after half of the steps, three go on from there."""
    from tests.distributed.wrapping import WAYS

    folder = place.folder / f"saved-8bit-{plan.method}"
    run = WAYS["fsdp2"](plan)
    if place.world == 3:
        load(run, folder)
        return finish(run)
    run.steps(STEPS[:HALFWAY])
    save(run, folder)
    return {"folder": str(folder), "keys": keys(run), "fresh": keys(WAYS["fsdp2"](plan))}


RESUMES = [
    Case(f"resumed-{name}", functools.partial(save_or_resume, plan=PLANS[name]), (2, 3))
    for name in ("8bit-full", "8bit-fira", "8bit-sift")
]


@each(RESUMES)
def test_resumed(case: Case, world: int, outcome: Any) -> None:
    """``world`` 2 stands for what two processes saved, resumed here by one."""
    plan = PLANS[case.name.removeprefix("resumed-")]
    found = outcome(case, world)[0]
    if world == 3:
        resumed = weights(found)
    else:
        assert found.values["keys"] == found.values["fresh"]
        assert any(key.endswith("exp_avg_scale") for key in found.values["keys"])
        run = alone(plan)
        load(run, Path(found.values["folder"]), no_dist=True)
        resumed = {name.removeprefix("weight/"): weight for name, weight in finish(run).items()}
    assert_same_weights(resumed, trained_alone(plan, STEPS), tolerance=1e-9)


RANDOM = {**EIGHT, "weight_rounding": "stochastic"}


def copies(place: Place, *, way: str) -> dict[str, Any]:
    """The weights of a run in bfloat16 that rounds at random, and of the same run again."""
    from tests.distributed.wrapping import WAYS

    plan = Plan("fira", {**RANDOM, "partition_states": way == "ddp"}, dtype="bfloat16", width=WIDTH)
    runs = [WAYS[way](plan) for _ in range(2)]
    for run in runs:
        run.steps(range(4))
    once, again = (run.weights() for run in runs)
    differing = [name for name, weight in once.items() if not torch.equal(weight, again[name])]
    return {**{f"weight/{name}": whole(weight) for name, weight in once.items()}, "differing": differing}


COPIES = [Case(f"rounded-{way}", functools.partial(copies, way=way), (2,)) for way in ("ddp", "fsdp2")]


@each(COPIES)
def test_rounding_is_the_same_in_all_processes_and_runs(case: Case, world: int, outcome: Any) -> None:
    found = outcome(case, world)
    first = weights(found[0])
    for other in found:
        assert not other.values["differing"]
        assert all(torch.equal(weight, first[name]) for name, weight in weights(other).items())


REFUSED = {
    "refused-8bit-columns": Plan("full", EIGHT, width=WIDTH),
    "refused-8bit-columns-fira": Plan("fira", EIGHT, width=WIDTH),
}
REFUSALS = [Case(name, functools.partial(refuse, plan=plan, way="columns"), (2,)) for name, plan in REFUSED.items()]


@each(REFUSALS)
def test_blocks_are_not_cut(case: Case, world: int, outcome: Any) -> None:
    for found in outcome(case, world):
        assert "UnsupportedError" in found.values["refused"]
        assert "across the blocks of its 8-bit moments" in found.values["refused"]


CASES = named(*TRAINED, *RESUMES, *COPIES, *REFUSALS)
