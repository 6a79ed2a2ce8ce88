"""LoRA and ReLoRA under FSDP2 in a bare loop: layers of every kind, warm start, resume on another number of processes.

In float64, so that rounding hides no error, and once in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fullrank import ReLoRA
from fullrank.factors import RESETS
from fullrank.methods.relora import Restart
from tests.distributed.case import Case, Place, each, named
from tests.distributed.comparing import assert_same_weights
from tests.distributed.loop import DEVICE, DTYPES, place, whole
from tests.restarting import VOCABULARY, inputs, peft_model

pytestmark = pytest.mark.slow

BATCH, STEPS, EVERY, LR = 24, 10, 3, 1e-2


@dataclass(frozen=True)
class Plan:
    """A model with PEFT's layers and the restarts on it, in a bare loop."""

    kind: str
    reset: str = "zero"
    dtype: str = "float64"
    restart_every: int | None = EVERY
    warm_start_steps: int = 0
    accumulation: int = 2
    clip: float | None = 0.5
    sharded_copies: int = 1
    """Copies of the model (HSDP), where there are several processes."""


class Run:
    """A plan at work in one process, or in one of several under FSDP2."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.model: Any = peft_model(plan.kind, DTYPES[plan.dtype]).to(DEVICE)
        beside = [p for name, p in self.model.named_parameters() if ".norm." in name or name.endswith(".bias")]
        for parameter in beside:
            parameter.requires_grad_(True)
        if distributed.is_initialized():
            self.shard()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self.relora = ReLoRA(
            self.model,
            self.optimizer,
            restart_every=plan.restart_every,
            restart_warmup_steps=1,
            reset=plan.reset,
            reset_ratio=0.6,
            warm_start_steps=plan.warm_start_steps,
            merge_rounding="nearest",
        )
        self.scheduler = self.relora.scheduler(num_training_steps=2 * STEPS, warmup_steps=1)
        self.restarts: list[Restart] = []

    def shard(self) -> None:
        """The layers of GPT-2 one by one, each child of the others, then the root."""
        copies, world = self.plan.sharded_copies, distributed.get_world_size()
        shape = (world,) if copies == 1 else (copies, world // copies)
        mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        inner = self.model.base_model.model
        for block in inner.transformer.h if self.plan.kind == "gpt2" else inner.children():
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def steps(self, numbers: range) -> None:
        """Train these steps."""
        rank, world = place()
        for number in numbers:
            self.optimizer.zero_grad()
            for index in range(self.plan.accumulation):
                if world > 1:
                    self.model.set_requires_gradient_sync(index == self.plan.accumulation - 1)
                self.backward(number, slice(index * world + rank, None, world * self.plan.accumulation))
            if self.plan.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
            self.optimizer.step()
            if (restart := self.relora.step()) is not None:
                self.restarts.append(restart)
            self.scheduler.step()

    def backward(self, number: int, rows: slice) -> None:
        """Gradients of the distance to a random target, of these rows of a batch."""
        generator = torch.Generator().manual_seed(number)
        if self.plan.kind in ("embedding", "gpt2"):
            data = torch.randint(0, VOCABULARY, (BATCH, 6), generator=generator)
        else:
            data = torch.randn(BATCH, *inputs(self.model, 0).shape[1:], generator=generator, dtype=torch.float64)
            data = data.to(DTYPES[self.plan.dtype])
        found = self.model(data[rows].to(DEVICE))
        found = found if torch.is_tensor(found) else found.logits
        target = torch.randn(BATCH, *found.shape[1:], generator=generator, dtype=torch.float64)[rows].to(DEVICE)
        ((found.double() - target).square().mean() / self.plan.accumulation).backward()

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(parameter.detach()) for name, parameter in self.model.named_parameters()}


def train(_: Place, *, plan: Plan) -> dict[str, Any]:
    """Ten steps; the weights and what the restarts did."""
    run = Run(plan)
    run.steps(range(STEPS))
    return run.weights() | {"restarts": [str(restart) for restart in run.restarts]}


PLANS = {
    **{f"linear-{reset}": Plan("linear", reset) for reset in RESETS},
    "conv": Plan("conv", "magnitude"),
    "embedding": Plan("embedding", "random"),
    "gpt2": Plan("gpt2", "magnitude", accumulation=1, clip=None),
    "lora": Plan("linear", restart_every=None),
    "warm-start": Plan("linear", warm_start_steps=4),
    "warm-start-gpt2": Plan("gpt2", warm_start_steps=5),
    "float32": Plan("linear", "magnitude", dtype="float32"),
}
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
"""Largest difference as a share of the largest change: sums are taken in another order, no more."""
TWO = ("conv", "embedding", "linear-keep", "lora")
"""In two processes only, for the sake of time; what is cut unevenly or not at all meets three."""
CASES = named(
    *(
        Case(name, functools.partial(train, plan=plan), (2,) if name in TWO else (3,) if "linear" in name else (2, 3))
        for name, plan in PLANS.items()
    )
)
HYBRID = Plan("linear", "random", sharded_copies=2)
CASES |= named(Case("hybrid", functools.partial(train, plan=HYBRID), worlds=(4,)))


@functools.cache
def alone(plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Weights before and after ten steps of one process, and its restarts."""
    run = Run(plan)
    before = run.weights()
    run.steps(range(STEPS))
    return before, run.weights(), [str(restart) for restart in run.restarts]


@each(CASES[name] for name in (*PLANS, "hybrid"))
def test_ten_steps_are_those_of_one_process(case: Case, world: int, outcome: Any) -> None:
    """Weights, and what every process reports of its restarts."""
    plan = PLANS.get(case.name, HYBRID)
    before, after, restarts = alone(plan)
    assert len(restarts) == (0 if plan.restart_every is None else (STEPS - plan.warm_start_steps) // EVERY)
    processes = outcome(case, world)
    for found in processes:
        assert found.values["restarts"] == processes[0].values["restarts"]
        assert found.values["restarts"] == restarts or plan.dtype != "float64"
        assert_same_weights(found.tensors, (before, after), tolerance=TOLERANCES[plan.dtype])


# Resume by torch.distributed.checkpoint on another number of processes.


SPLIT = Plan("linear", "magnitude", warm_start_steps=2)
WORLD_THAT_SAVES = 2


def resume(where: Place) -> dict[str, Any]:
    """Two processes save after a restart and go on; three load that."""
    folder = where.folder / "resumed-factors"
    run = Run(SPLIT)
    if where.world == WORLD_THAT_SAVES:
        run.steps(range(6))
        assert run.restarts
        checkpoint.save(parts(run), checkpoint_id=folder)
    else:
        load(run, folder)
    run.steps(range(6, STEPS))
    return run.weights()


def parts(run: Run) -> dict[str, Any]:
    model, optimizer = states.get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer, "relora": run.relora.state_dict()}


def load(run: Run, folder: Path) -> None:
    """Into a fresh run, whose factors have not trained."""
    run.relora.at_step(6)
    for _ in range(6):
        run.scheduler.step()
    state = parts(run)
    checkpoint.load(state, checkpoint_id=folder)
    states.set_state_dict(
        run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    run.relora.load_state_dict(state["relora"])


CASES |= named(Case("resume", resume))


@each([CASES["resume"]])
def test_it_resumes_in_three_processes(case: Case, world: int, outcome: Any) -> None:
    """Saved in two."""
    before, after, _ = alone(SPLIT)
    for found in outcome(case, world):
        assert_same_weights(found.tensors, (before, after), tolerance=1e-9)


@pytest.mark.parametrize("case", [CASES["resume"]], ids=["resume"])
def test_it_resumes_in_one_process(case: Case, launcher: Any, outcome: Any) -> None:
    outcome(case, WORLD_THAT_SAVES)
    before, after, _ = alone(SPLIT)
    run = Run(SPLIT)
    load(run, launcher.folder / "resumed-factors")
    run.steps(range(6, STEPS))
    assert_same_weights(run.weights(), (before, after), tolerance=1e-9)
