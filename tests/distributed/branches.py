"""A model of which processes use different parts, trained by SIFT, and the loop of one process or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fullrank import SIFT
from fullrank.factors.quantize import Quantization
from fullrank.sharding import local, part_of
from tests.distributed.loop import DTYPES, whole

WIDTH = 12
SAMPLES = 12
STEPS = range(8)
TARGETS = ("blocks", "side", "never")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).tanh())
        return y


class Branches(nn.Module):
    """Frozen entrance, blocks, a branch that sample 0 alone goes through, one that none does, a head of seven rows."""

    def __init__(self, seed: int = 0, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.side = nn.Linear(WIDTH, WIDTH)
            self.never = nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor, is_first: Tensor) -> dict[str, Tensor]:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        if is_first.any():
            x = torch.cat((x[~is_first], x[is_first] + self.side(x[is_first]).tanh()))
        scores = self.head(x)
        return {"loss": scores.double().square().mean() - scores.double().tanh().mean(), "scores": scores}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs of all processes (SAMPLES x WIDTH), and which of them is the first."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64), torch.arange(SAMPLES) == 0


@dataclass(frozen=True)
class Plan:
    """How to train; in one process and in several it must end at the same weights."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of SIFT."""
    dtype: str = "float64"
    accumulation: int = 1
    clip: float | None = None
    reentrant: bool | None = None
    """Checkpointing of the blocks, by which implementation; None: no."""
    targets: tuple[str, ...] = TARGETS
    exception: tuple[str, ...] = ("head",)
    by_hand: Mapping[str, Any] = field(default_factory=dict)
    """Units by the name of a weight."""
    alike: bool = False
    """All samples go through the branch, so that all processes use the same parts, as FSDP2 needs it."""
    codes: Any = None
    """How the layers that train sparsely are kept as codes, whatever their width; None: plain."""
    poisoned: int = -1
    """A step of which one sample is not finite."""


@dataclass
class Run:
    """A model in training."""

    plan: Plan
    model: nn.Module
    """As it is called."""
    sift: SIFT
    optimizer: torch.optim.Optimizer
    rank: int = 0
    world: int = 1

    def steps(self, numbers: range) -> None:
        for number in numbers:
            self.backward(number)
            if number != self.plan.poisoned:  # as a scaler of losses would
                self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self, number: int) -> None:
        inputs, is_first = batch(number)
        is_first |= torch.tensor(self.plan.alike)
        inputs[1] *= torch.inf if number == self.plan.poisoned else 1.0
        micro_batches = [(inputs[i :: self.plan.accumulation], is_first[i :: self.plan.accumulation]) for i in
                         range(self.plan.accumulation)]  # fmt: skip
        for index, (x, first) in enumerate(micro_batches):
            self.micro_batch(x, first, is_last=index == len(micro_batches) - 1)
        if self.plan.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)

    def micro_batch(self, x: Tensor, first: Tensor, *, is_last: bool) -> None:
        """This process's share of a global micro-batch; sent with the last one."""
        wrapper: Any = self.model
        if hasattr(wrapper, "set_requires_gradient_sync"):
            wrapper.set_requires_gradient_sync(is_last)
        mine = slice(self.rank, None, self.world)
        waits = not is_last and isinstance(wrapper, DistributedDataParallel)
        with wrapper.no_sync() if waits else nullcontext():
            output = self.model(x[mine].to(DTYPES[self.plan.dtype]), first[mine])
            (output["loss"] / self.plan.accumulation).backward()

    def found(self) -> dict[str, Any]:
        """Weights, choices and values, whole."""
        parameters = {name.removeprefix("module."): p for name, p in self.model.named_parameters()}
        found = {f"weight/{name}": whole(p.detach()) for name, p in parameters.items() if not name.endswith("_sparse")}
        for name, values in self.sift.sparse_mapping.items():
            if values.idx is not None:
                found |= {f"index/{name}": whole(values.idx), f"values/{name}": whole(values.detach())}
        return found


def start(
    plan: Plan,
    *,
    seed: int = 0,
    shard: Callable[[nn.Module], None] | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Run:
    """SIFT on a model that was sharded before, or is wrapped afterwards, or neither."""
    model = Branches(seed, reentrant=plan.reentrant)
    if plan.codes is not None:
        quantization = Quantization(plan.codes, torch.device("cpu"))
        quantization.apply_(model, keep={"enter", "head"})
        quantization.unmark_(model)
    model = model.to(DTYPES[plan.dtype]).train()
    if shard is not None:
        shard(model)
    sift = SIFT(model, 0.2, plan.targets, plan.exception, gradient_checkpointing=bool(plan.reentrant), **plan.options)
    for name, units in plan.by_hand.items():
        sift.sparse_mapping[name].idx = units
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, weight_decay=0.1)
    return Run(plan, wrap(model) if wrap is not None else model, sift, optimizer, rank, world)


def save(run: Run, file: Path) -> None:
    """Model and optimizer, whole, as one process would save them; all processes call it and the first one writes."""
    model: Any = run.model
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    weights = {name: whole(value) for name, value in plain.state_dict().items()}
    state = run.optimizer.state_dict()
    state = tree_map(lambda value: whole(value) if torch.is_tensor(value) else value, state)
    if run.rank == 0:
        torch.save({"model": weights, "optimizer": state}, file)


def load(run: Run, file: Path) -> None:
    """Into any number of processes: the optimizer's state whole in each, weights as the model holds them."""
    content = torch.load(file, weights_only=True)
    load_weights(run, content["model"])
    run.optimizer.load_state_dict(content["optimizer"])


@torch.no_grad()
def load_weights(run: Run, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into those that a process holds."""
    model: Any = run.model
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    for name, tensor in plain.state_dict().items():
        is_spread = hasattr(tensor, "full_tensor")
        local(tensor).copy_(local(part_of(weights[name], tensor)) if is_spread else weights[name])
