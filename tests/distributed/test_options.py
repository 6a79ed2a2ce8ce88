"""Every option of the projected methods on shards: the weights after ten steps are those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fullrank import FiraRMSprop, GaLoreRMSprop
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, trained_alone
from tests.distributed.loop import Plan, own, replay, whole
from tests.distributed.training import STEPS, gradients, train, weights

pytestmark = pytest.mark.slow

HALF: dict[str, Any] = {"target_modules": ["attn.value", "mlp.up", "mlp.down"], "rank": 6}
"""A rank of at least half the short side, so that Fira forms the residual itself."""
ROTATED: dict[str, Any] = {"basis": "power", "rotate_moments": True, "stagger_refresh": True}

OPTIONS: dict[str, Plan] = {
    "fira-random": Plan("fira", {"basis": "random"}),
    "fira-rotated": Plan("fira", ROTATED),
    "fira-left": Plan("fira", {"proj_type": "left"}),
    "fira-right": Plan("fira", {"proj_type": "right", "rotate_moments": True}),
    "fira-reverse": Plan("fira", {"proj_type": "reverse_std"}),
    "fira-both": Plan("fira", {"proj_type": "full", **ROTATED}),
    "fira-matrix": Plan("fira", {"scaling": "matrix"}),
    "fira-matrix-free": Plan("fira", {"scaling": "matrix", "limiter_gamma": None}),
    "fira-free": Plan("fira", {"limiter_gamma": None, "weight_decay": 0.1}),
    "fira-on-subspace": Plan("fira", {"alpha_on": "subspace"}),
    "fira-half": Plan("fira", HALF),
    "fira-half-matrix": Plan("fira", {**HALF, "scaling": "matrix", "alpha_on": "subspace"}),
    "fira-rmsprop": Plan("fira", optimizer=FiraRMSprop),
    "galore-random": Plan("galore", {"basis": "random", "rotate_moments": True}),
    "galore-rotated": Plan("galore", ROTATED),
    "galore-left": Plan("galore", {"proj_type": "left"}),
    "galore-reverse": Plan("galore", {"proj_type": "reverse_std", "weight_decay": 0.1}),
    "galore-both": Plan("galore", {"proj_type": "full", "rotate_moments": True}),
    "galore-half": Plan("galore", HALF),
    "galore-rmsprop": Plan("galore", optimizer=GaLoreRMSprop),
    "apollo-tensor": Plan("apollo", {"scaling": "tensor"}),
    "apollo-tensor-free": Plan("apollo", {"scaling": "tensor", "limiter_gamma": None}),
    "apollo-power": Plan("apollo", ROTATED),
    "apollo-left": Plan("apollo", {"proj_type": "left", "weight_decay": 0.1}),
    "apollo-reverse": Plan("apollo", {"proj_type": "reverse_std"}),
    "apollo-both": Plan("apollo", {"proj_type": "full"}),
    "apollo-free": Plan("apollo", {"limiter_gamma": None}),
}
SENDING = ("both", "matrix", "half", "left", "right", "reverse", "tensor", "power")
"""In the names of what decides which parts go where: these run where shards are uneven and some are empty."""
WIDE: dict[str, Any] = {"width": 12}
"""Divides by 2 and 3, as FSDP2 wants of what is cut along its columns."""
COLUMNS: dict[str, Plan] = {
    "columns-full": Plan("full", **WIDE),
    "columns-fira": Plan("fira", ROTATED, **WIDE),
    "columns-fira-matrix": Plan("fira", {"scaling": "matrix"}, **WIDE),
    "columns-fira-both": Plan("fira", {"proj_type": "full"}, **WIDE),
    "columns-galore": Plan("galore", {"proj_type": "left"}, **WIDE),
    "columns-apollo": Plan("apollo", **WIDE),
}
COPIES: dict[str, Plan] = {
    "copies-full": Plan("full"),
    "copies-fira": Plan("fira", ROTATED),
    "copies-fira-both": Plan("fira", {"proj_type": "full", "scaling": "matrix"}),
    "copies-galore": Plan("galore"),
    "copies-apollo": Plan("apollo"),
}
PLANS = OPTIONS | COLUMNS | COPIES


def worlds(name: str) -> tuple[int, ...]:
    """Numbers of processes for an option."""
    return (3,) if any(word in name for word in SENDING) else (2,)


TRAINED = [
    *(Case(name, functools.partial(train, plan=plan, way="fsdp2"), worlds(name)) for name, plan in OPTIONS.items()),
    *(Case(name, functools.partial(train, plan=plan, way="columns"), (3,)) for name, plan in COLUMNS.items()),
    *(Case(name, functools.partial(train, plan=plan, way="hsdp"), (4,)) for name, plan in COPIES.items()),
]


@each(TRAINED)
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    found = weights(outcome(case, world)[0])
    assert_same_weights(found, trained_alone(PLANS[case.name], STEPS), tolerance=1e-9)


MIXED = Plan("fira", dtype="float32")
MIXED_CASE = Case("mixed-fira", functools.partial(train, plan=MIXED, way="mixed", record=True), (2,))


@each([MIXED_CASE])
def test_mixed_precision(case: Case, world: int, outcome: Any) -> None:
    """With FSDP2's policy for bfloat16 the optimizer sees float32, and does with it what it does in one process."""
    found = outcome(case, world)
    before, _ = trained_alone(MIXED, STEPS)
    alone = replay(MIXED, gradients(found)).weights()
    assert_same_weights(weights(found[0]), (before, alone), tolerance=1e-5)


def refuse(place: Place, *, plan: Plan, way: str = "fsdp2") -> dict[str, Any]:
    """The words with which a plan is refused when it is built."""
    from fullrank.errors import ConfigError, UnsupportedError
    from tests.distributed.wrapping import WAYS

    try:
        WAYS[way](plan)
    except (ConfigError, UnsupportedError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"refused": ""}


REFUSED = {
    "refused-svd": (Plan("fira", {"basis": "svd"}), ["UnsupportedError", "basis svd", 'basis="power"']),
    "refused-partition": (Plan("galore", {"partition_states": True}), ["ConfigError", "partition_states"]),
}
FLAT = [f"refused-fsdp1-{method}" for method in ("fira", "galore", "apollo", "sift", "relora", "lora")]
REFUSED |= {name: (Plan(name.rpartition("-")[2]), ["UnsupportedError", "FSDP1", "fully_shard"]) for name in FLAT}
REFUSALS = [
    Case(name, functools.partial(refuse, plan=plan, way="fsdp1" if name in FLAT else "fsdp2"), (2,))
    for name, (plan, _) in REFUSED.items()
]


@each(REFUSALS)
def test_refused_before_training(case: Case, world: int, outcome: Any) -> None:
    for found in outcome(case, world):
        assert all(word in found.values["refused"] for word in REFUSED[case.name][1]), found.values


def repeat(place: Place, *, plan: Plan, way: str) -> dict[str, Any]:
    """The same run twice in one process: what of its state does not end in the same bits; and the bases, whole."""
    from tests.distributed.wrapping import WAYS

    runs = [WAYS[way](plan) for _ in range(2)]
    for run in runs:
        run.steps(range(4))
    once, again = (run.built.optimizer.state_dict()["state"] for run in runs)
    keys = [(index, key) for index, state in once.items() for key in state]
    pairs = [(f"{index}/{key}", once[index][key], again[index][key]) for index, key in keys]
    differing = [name for name, first, second in pairs if not torch.equal(own(first), own(second))]
    bases = {f"{index}/{key}": whole(once[index][key]) for index, key in keys if "basis" in key}
    return {**bases, "differing": differing}


REPEATED = {
    "repeated-ddp": (Plan("fira", {"rotate_moments": True}), "ddp"),
    "repeated-fsdp2": (Plan("fira", {"rotate_moments": True}), "fsdp2"),
    "repeated-both": (Plan("galore", {"proj_type": "full"}), "fsdp2"),
    "repeated-float32": (Plan("apollo", {"basis": "power"}, dtype="float32"), "fsdp2"),
    "repeated-copies": (Plan("fira", {"rotate_moments": True}), "hsdp"),
}
REPEATS = [
    Case(name, functools.partial(repeat, plan=plan, way=way), (4,) if way == "hsdp" else (2, 3))
    for name, (plan, way) in REPEATED.items()
]


@each(REPEATS)
def test_bases_are_equal_in_all_processes_and_runs(case: Case, world: int, outcome: Any) -> None:
    found = outcome(case, world)
    assert found[0].tensors
    for other in found:
        assert not other.values["differing"]
        assert other.tensors.keys() == found[0].tensors.keys()
        assert all(torch.equal(basis, found[0].tensors[name]) for name, basis in other.tensors.items())


CASES = named(*TRAINED, MIXED_CASE, *REFUSALS, *REPEATS)
