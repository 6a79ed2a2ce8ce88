"""Parametrisations over the cases, and the few things that every test of a method does."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import ALL, OURS
from tests.problems import SHAPES, make_weight

ONE_PER_CLASS = list({case.kind: case for case in reversed(OURS)}.values())[::-1]
"""The first case of each of our classes: its default options."""

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

every = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
ours = pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
each_class = pytest.mark.parametrize("case", ONE_PER_CLASS, ids=lambda case: case.kind.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def saved_and_read(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as a file gives it back, read without trusting the file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def parameter(shape: str = "tall", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A bare weight of a named shape."""
    return nn.Parameter(make_weight(SHAPES[shape], seed=seed, dtype=dtype))


def feed(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """Step through gradients of one weight; the weight after each step."""
    seen = []
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype, copy=True)
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


def moves(weights: list[Tensor], start: Tensor) -> list[Tensor]:
    """What each step changed."""
    return [after - before for before, after in itertools.pairwise([start, *weights])]
