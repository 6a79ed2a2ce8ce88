"""One training loop for a process alone and for one of several: what the cases run, and what the tests compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fullrank import METHODS, Built
from tests.distributed.network import BATCH, TARGETS, WIDTH, Network, batch, loss_of

LEARNING_RATE = 1e-2
DEVICE_VARIABLE = "FULLRANK_TEST_DEVICE"
DEVICE = torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "galore": {"rank": 2, "update_proj_gap": 3},
    "fira": {"rank": 2, "update_proj_gap": 3},
    "apollo": {"rank": 2, "update_proj_gap": 3},
    "sift": {"density": 0.3, "target_modules": TARGETS, "exception": ["embed"], "scope": "row"},
    "lora": {"rank": 2, "lora_alpha": 4.0, "factor_dtype": None},
    "relora": {
        "rank": 2,
        "lora_alpha": 4.0,
        "factor_dtype": None,
        "restart_every": 4,
        "restart_warmup_steps": 1,
        "merge_rounding": "nearest",
    },
}
"""Of every method, so that ten steps see several refreshes or restarts."""

Recorded = list[dict[str, Tensor]]
"""The gradients of each step, by the place of their parameter in the optimizer."""


@dataclass(frozen=True)
class Plan:
    """How to train; the same plan in one process and in several must end at the same weights."""

    method: str
    """Of METHODS."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the method's configuration, over OPTIONS."""
    dtype: str = "float64"
    """Of the weights. float64 by default, so that no rounding hides an error."""
    accumulation: int = 1
    checkpointing: bool = False
    clip: float | None = None
    width: int = WIDTH
    num_blocks: int = 1
    unused: bool = True
    """Whether the network has a parameter that is never used."""
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    """Makes the optimizer from groups, in place of the method's own."""

    def network(self) -> nn.Module:
        """The model as it is before anything is wrapped: with the LoRA layers that the method asks for."""
        model = Network(self.width, self.num_blocks, checkpointing=self.checkpointing, unused=self.unused)
        model.to(device=DEVICE, dtype=DTYPES[self.dtype])
        adapters = METHODS[self.method].adapters
        if adapters is not None and (request := adapters(self.config())) is not None:
            from fullrank.train.adapters import Adapters

            Adapters(model, request)  # type: ignore[arg-type]
        return model.train()

    def config(self) -> Any:
        """The method's configuration."""
        return METHODS[self.method].config(**{"lr": LEARNING_RATE} | OPTIONS[self.method] | dict(self.options))

    def build(self, model: nn.Module) -> Built:
        """The method at work on the model as it will train."""
        if self.optimizer is None:
            return METHODS[self.method].build(model, self.config())
        from fullrank.methods.base import projected_groups

        return Built(self.optimizer(projected_groups(model, self.config()), lr=LEARNING_RATE))


@dataclass
class Run:
    """A model in training."""

    plan: Plan
    model: Any
    """As it is called: wrapped by DDP, sharded by fully_shard, or plain."""
    built: Built
    recorded: Recorded | None = None
    """Gets the gradients of every step, this process's parts of them, if it is a list."""

    @property
    def plain(self) -> nn.Module:
        """The model without a wrapper."""
        plain: nn.Module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return plain

    def steps(self, numbers: range) -> None:
        """Train these steps."""
        for number in numbers:
            self.model.zero_grad()
            self.backward(number)
            self.finish(number)

    def backward(self, number: int) -> None:
        """The gradients of one step, clipped."""
        rank, world = place()
        micro_batches = batch(number).to(DEVICE).chunk(self.plan.accumulation)
        for index, tokens in enumerate(micro_batches):
            with self.syncing(index == len(micro_batches) - 1):
                (loss_of(self.model, tokens[rank::world]) / len(micro_batches)).backward()
        if self.plan.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        if self.recorded is not None:
            self.recorded.append({place: own(p.grad) for place, p in self.trained() if p.grad is not None})

    def finish(self, number: int) -> None:
        """The optimizer's step and what the method does after it."""
        self.built.optimizer.step()
        if self.built.after_step is not None:
            self.built.after_step(number + 1)

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """No gradient is sent before the last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters by name, without what a method put beside them."""
        return ((name, p) for name, p in self.plain.named_parameters() if not name.endswith("_sparse"))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer was given, by its place there, which is the same in one process and in several."""
        given = (parameter for group in self.built.optimizer.param_groups for parameter in group["params"])
        return ((f"{number:03}", parameter) for number, parameter in enumerate(given))

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights, whole, in every process."""
        return {name: whole(parameter.detach()) for name, parameter in self.parameters()}


def alone(plan: Plan) -> Run:
    """A run of one process."""
    model = plan.network()
    return Run(plan, model, plan.build(model))


def replay(plan: Plan, gradients: Recorded) -> Run:
    """A run of one process whose optimizer is given these gradients, so that only what it does with them can differ."""
    run = alone(plan)
    for number, given in enumerate(gradients):
        run.model.zero_grad()
        run.backward(number)
        for place, parameter in run.trained():
            parameter.grad = given.get(place)
        run.finish(number)
    return run


def place() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def own(tensor: Tensor) -> Tensor:
    """A copy of this process's part of a tensor, in host memory."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().cpu().clone()


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, in host memory."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


assert BATCH % 12 == 0, "a global batch is shared out evenly"
