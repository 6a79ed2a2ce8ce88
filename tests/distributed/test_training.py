"""Every method under DDP and FSDP2: after ten steps the weights are those of one process.

In float64, so that no rounding hides an error, and once in float32 as users train. In bfloat16 the gradients of one
process differ from those of several by the rounding of each one's own sum; so one process is given the gradients
that the processes reduced, and the optimizers are compared.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fullrank import METHODS
from tests.distributed.case import Case, each, named
from tests.distributed.comparing import assert_rounded_alike, assert_same_weights, trained_alone
from tests.distributed.loop import Plan, replay
from tests.distributed.training import STEPS, gradients, train, weights

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32", "options": {"eps": 1e-5}},
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "clipping": {"clip": 0.5},
    "together": {"accumulation": 2, "checkpointing": True, "clip": 0.5},
    "bfloat16": {"dtype": "bfloat16"},
}
"""float32: Adam divides by what a gradient near zero is, of which rounding leaves little: a larger eps than that."""
CHOICE = {"selection": "magnitude"}
"""Of SIFT in bfloat16: by what is equal in one process and in several, whose gradients are not."""
WORLDS = {
    "plain": (2, 3),
    "float32": (2,),
    "accumulation": (2,),
    "checkpointing": (2,),
    "clipping": (2,),
    "together": (3,),
    "bfloat16": (3,),
}

PLANS = {
    f"{method}-{way}-{variant}": Plan(
        method, **options | ({"options": CHOICE} if (method, variant) == ("sift", "bfloat16") else {})
    )
    for method in METHODS
    for way in ("ddp", "fsdp2")
    for variant, options in VARIANTS.items()
}
ON_SHARDS = [f"{method}-fsdp2-bfloat16" for method in ("fira", "galore", "apollo")]


def case(name: str, plan: Plan) -> Case:
    """Named after method, way and variant."""
    _, way, variant = name.split("-")
    run = functools.partial(train, plan=plan, way=way, record=variant == "bfloat16")
    return Case(name, run, WORLDS[variant])


CASES = named(*(case(name, plan) for name, plan in PLANS.items()))


@each(CASES.values())
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    plan, found = PLANS[case.name], outcome(case, world)
    for other in found[1:]:  # whatever they computed, they hold one model
        assert all(torch.equal(weight, weights(found[0])[name]) for name, weight in weights(other).items())
    if plan.dtype == "bfloat16":
        alone = replay(plan, gradients(found)).weights()
        # Under DDP all is computed as in one process; of the products with a basis each part on its own is rounded.
        assert_rounded_alike(weights(found[0]), alone, share=0.25 if case.name in ON_SHARDS else 0.0)
    else:
        if "sift-fsdp2" in case.name:  # which sees the sum of the micro-batches, as FSDP2 reduces no other
            plan = replace(plan, options={**plan.options, "selection_batches": plan.accumulation})
        tolerance = 1e-5 if plan.dtype == "float32" else 1e-9
        assert_same_weights(weights(found[0]), trained_alone(plan, STEPS), tolerance=tolerance)
