"""The case that most tests share: train a plan, return the weights; and what a test reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.distributed.case import Place
from tests.distributed.launch import Outcome
from tests.distributed.loop import Plan, Recorded

STEPS = range(10)


def train(place: Place, *, plan: Plan, way: str, record: bool = False) -> dict[str, Any]:
    """Ten steps; the weights, and if asked for the gradients of each step."""
    from tests.distributed.wrapping import WAYS

    run = WAYS[way](plan)
    run.recorded = [] if record else None
    run.steps(STEPS)
    found: dict[str, Any] = {f"weight/{name}": weight for name, weight in run.weights().items()}
    for step, gradients in enumerate(run.recorded or []):
        found |= {f"gradient/{step:02}/{name}": gradient for name, gradient in gradients.items()}
    return found | {"is_cut": way != "ddp"}


def part(outcome: Outcome, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): t for key, t in outcome.tensors.items() if key.startswith(prefix)}


def weights(outcome: Outcome) -> dict[str, Tensor]:
    """The weights that a process ended with."""
    return part(outcome, "weight/")


def gradients(outcomes: Sequence[Outcome]) -> Recorded:
    """The recorded gradients of each step, joined along their rows where every process has its own."""
    steps: Recorded = []
    while named := part(outcomes[0], f"gradient/{len(steps):02}/"):
        if outcomes[0].values["is_cut"]:
            parts = [part(outcome, f"gradient/{len(steps):02}/") for outcome in outcomes]
            named = {name: torch.cat([own[name] for own in parts]) for name in named}
        steps.append(named)
    return steps
