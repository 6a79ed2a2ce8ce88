"""Every method under DDP and FSDP2: after ten steps the weights are those of one process.

In float64, so that rounding hides no error, and once in float32 as users train. In bfloat16 the gradients of one
process differ by the rounding of each process's own sum, and the signs that Adam makes of small ones with them; so
one process is given the gradients that the processes reduced, and the optimizers are compared.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank import METHODS
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights, assert_within_spacings, trained_alone
from tests.distributed.launch import Outcome
from tests.distributed.loop import Plan, Recorded, replay

pytestmark = pytest.mark.slow

STEPS = range(10)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32"},
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "clipping": {"clip": 0.5},
    "bfloat16": {"dtype": "bfloat16"},
}


def train(place: Place, *, plan: Plan, way: str) -> dict[str, Any]:
    """Ten steps; the weights, and in bfloat16 the gradients too."""
    from tests.distributed.wrapping import WAYS

    run = WAYS[way](plan)
    run.recorded = [] if plan.dtype == "bfloat16" else None
    run.steps(STEPS)
    found = {f"weight/{name}": weight for name, weight in run.weights().items()}
    for step, gradients in enumerate(run.recorded or []):
        found |= {f"gradient/{step}/{name}": gradient for name, gradient in gradients.items()}
    return found


PLANS = {
    f"{method}-{way}-{variant}": (Plan(method, **options), way)
    for method in METHODS
    for way in ("ddp", "fsdp2")
    for variant, options in VARIANTS.items()
}
CASES = named(*(Case(name, functools.partial(train, plan=p, way=way)) for name, (p, way) in PLANS.items()))


@each(CASES.values())
def test_as_in_one_process(case: Case, world: int, outcome: Any) -> None:
    plan, _ = PLANS[case.name]
    found: list[Outcome] = outcome(case, world)
    for other in found[1:]:  # whatever they computed, they hold one model
        assert all(torch.equal(tensor, found[0].tensors[name]) for name, tensor in other.tensors.items())
    weights = part(found[0], "weight")
    if plan.dtype == "bfloat16":
        assert_within_spacings(weights, replay(plan, gradients(found[0])).weights(), num=1)
    else:
        assert_same_weights(weights, trained_alone(plan, STEPS), tolerance=1e-5 if plan.dtype == "float32" else 1e-9)


def part(outcome: Outcome, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    named = {name.partition("/")[::2]: tensor for name, tensor in outcome.tensors.items()}
    return {name: tensor for (kind, name), tensor in named.items() if kind == prefix}


def gradients(outcome: Outcome) -> Recorded:
    """The recorded gradients of each step."""
    steps: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, gradient in part(outcome, "gradient").items():
        number, _, name = key.partition("/")
        steps[int(number)][name] = gradient
    return [steps[number] for number in sorted(steps)]
