"""The optimizers that ``step_time.py`` compares: how each is built from the same tensors.

A case is timed once without refreshes, where the way to find a basis makes no difference, and once for
each of its bases with them. ``peer`` names the package of the authors of the same method.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.ops.kernels import kernels

LR = 1e-6
"""So small that thousands of steps leave the weights what they were."""


@dataclass(frozen=True)
class Groups:
    """The tensors and settings that all cases share."""

    matrices: list[nn.Parameter]
    plain: list[nn.Parameter]
    rank: int
    gap: int
    alpha: float

    def with_keys(self, **keys: Any) -> list[dict[str, Any]]:
        """Parameter groups: the plain one, if there is any, and the projected one with these keys."""
        projected = {"params": self.matrices, "rank": self.rank, "update_proj_gap": self.gap, **keys}
        return [{"params": self.plain}, projected] if self.plain else [projected]


@dataclass(frozen=True)
class Case:
    """One optimizer: its name in the table, its module, how to build it, the bases it can refresh with."""

    name: str
    module: str
    make: Callable[[Any, Groups, str], torch.optim.Optimizer]
    bases: tuple[str, ...] = ()
    peer: str = ""
    half_only: bool = False
    """Differs from another case only where weights are in half precision."""

    def available(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.module) is not None

    def build(self, groups: Groups, basis: str) -> torch.optim.Optimizer:
        """A new optimizer on the shared tensors."""
        return self.make(importlib.import_module(self.module), groups, basis)


def ours(name: str, **options: Any) -> Callable[[Any, Groups, str], torch.optim.Optimizer]:
    """A class of fullrank with the groups of its authors."""

    def make(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
        keys = groups.with_keys(alpha=groups.alpha, proj_type="std")
        return getattr(module, name)(keys, lr=LR, basis=basis, **options)

    return make


class WithoutKernels:
    """A case of ours on torch's own routines alone, stepped as an optimizer is."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def step(self) -> None:
        with kernels(False):
            self.optimizer.step()


def without_kernels(name: str) -> Callable[[Any, Groups, str], Any]:
    """A class of fullrank with the kernels switched off."""
    return lambda module, groups, basis: WithoutKernels(ours(name)(module, groups, basis))


def adamw(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    return module.AdamW([*groups.matrices, *groups.plain], lr=LR, fused=True)


def adamw_float32(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    """On float32 copies of weights and gradients: its states are float32 too, which torch's kernel ties together."""
    copies = []
    for weight in [*groups.matrices, *groups.plain]:
        assert weight.grad is not None
        copies.append(nn.Parameter(weight.detach().float()))
        copies[-1].grad = weight.grad.float()
    return module.AdamW(copies, lr=LR, fused=True)


def fira(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    keys = groups.with_keys(alpha=groups.alpha, proj_type="std")
    return module.FiraAdamW(keys, lr=LR, no_deprecation_warning=True)


def galore(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    keys = groups.with_keys(scale=groups.alpha, proj_type="std")
    return module.GaLoreAdamW(keys, lr=LR, no_deprecation_warning=True)


def apollo(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    keys = groups.with_keys(scale=groups.alpha, proj_type="std", proj=basis, scale_type="channel")
    return module.APOLLOAdamW(keys, lr=LR)


def other_fira(module: Any, groups: Groups, basis: str) -> torch.optim.Optimizer:
    return module.Fira(groups.with_keys(scale=groups.alpha, projection_type="std"), lr=LR)


CASES = [
    Case("torch AdamW fused", "torch.optim", adamw),
    Case("torch AdamW fused, float32", "torch.optim", adamw_float32, half_only=True),
    Case("fullrank FiraAdamW", "fullrank", ours("FiraAdamW"), ("svd", "power", "random"), "fira FiraAdamW"),
    Case(
        "fullrank FiraAdamW, half state",
        "fullrank",
        ours("FiraAdamW", state_dtype=None),
        ("svd", "power"),
        "fira FiraAdamW",
        half_only=True,
    ),
    Case("fira FiraAdamW", "fira", fira, ("svd",)),
    Case("pytorch_optimizer Fira", "pytorch_optimizer", other_fira, ("svd",)),
    Case("fullrank GaLoreAdamW", "fullrank", ours("GaLoreAdamW"), ("svd", "power"), "galore-torch GaLoreAdamW"),
    Case("galore-torch GaLoreAdamW", "galore_torch", galore, ("svd",)),
    Case(
        "fullrank ApolloAdamW", "fullrank", ours("ApolloAdamW"), ("random", "svd", "power"), "apollo-torch APOLLOAdamW"
    ),
    Case("apollo-torch APOLLOAdamW", "apollo_torch", apollo, ("random", "svd")),
]

KERNEL_CASES = [
    Case(f"fullrank {name}, no kernels", "fullrank", without_kernels(name), bases)
    for name, bases in (("FiraAdamW", ("power",)), ("GaLoreAdamW", ("power",)), ("ApolloAdamW", ("random",)))
]
"""Ours without the kernels of ``ops.kernels``, for ``--compare-kernels``."""


def set_gap(optimizer: torch.optim.Optimizer, gap: int) -> None:
    """Refresh every ``gap`` steps from now on; the packages keep a copy of the group's key in each projector."""
    for group in optimizer.param_groups:
        if "update_proj_gap" in group:
            group["update_proj_gap"] = gap
    for state in optimizer.state.values():
        if "projector" in state:
            state["projector"].update_proj_gap = gap
