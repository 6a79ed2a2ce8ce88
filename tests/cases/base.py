"""What a case says: how to configure a method for the tiny model, and its optimizer classes with options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fullrank import divide_params
from tests.cases.tiny import TARGETS, TinyModel
from tests.problems import RANK

GAP = 3
"""Steps between two refreshes, so that a few steps see several."""


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer class with sample options."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    projected: bool = True
    """Whether it is one of ours, with groups that have a rank."""

    @property
    def id(self) -> str:
        """The class and its options, for pytest."""
        return "-".join([self.kind.__name__, *(f"{k}={v}" for k, v in self.options.items() if k != "lr")])

    def on(self, model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
        """The optimizer on the model's plain and projected groups."""
        if not self.projected:
            return self.kind(model.parameters(), **self.options | changes)
        groups = divide_params(model, TARGETS, rank=RANK)
        keys = {key: changes.pop(key) for key in ("rank", "proj_type", "alpha") if key in changes}
        groups[1] = {"params": groups[1]["params"], "param_names": groups[1]["param_names"], "rank": RANK, **keys}
        return self.kind(groups, **{"lr": 1e-2, "update_proj_gap": GAP} | self.options | changes)

    def of(self, parameters: list[nn.Parameter], **changes: Any) -> torch.optim.Optimizer:
        """The optimizer on bare parameters in one group."""
        rank = {"rank": RANK, "update_proj_gap": GAP} if self.projected else {}
        return self.kind(parameters, **{"lr": 1e-2} | rank | self.options | changes)


@dataclass(frozen=True)
class MethodCase:
    """One line of ``METHODS``, and the model that it trains in the tests."""

    name: str
    config: Callable[[], Any]
    """Makes a configuration that fits the tiny model."""
    optimizers: tuple[OptimizerCase, ...]
    decides_what_trains: bool = False
    """Whether it freezes and thaws parameters itself, whatever they were."""
    model: Callable[..., nn.Module] = TinyModel
    """Makes the tiny model that the method is built on: ``model(dtype, device="cpu")``, the same at every call."""
    moving: str = "attn_tall"
    """A parameter of it that a few steps change."""
    freezable: tuple[str, ...] = ("norm", "attn_wide")
    """Parameters of it to freeze before the method is built."""
