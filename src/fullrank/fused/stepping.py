"""One step of one parameter, by whichever optimizer holds it, and the optimizers that cannot take one."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.optimizer import MethodOptimizer, Seat
from fullrank.sharding import refuse_flattened


def step_one(optimizer: torch.optim.Optimizer, seat: Seat) -> None:
    """Step the parameter at a seat with its group's present options; hooks of steps are not called.

    Raises:
        UnsupportedError: If the optimizer counts in its parameter groups, which then would count parameters.
    """
    if isinstance(optimizer, MethodOptimizer):
        optimizer.step_ahead([seat])
        return
    group = optimizer.param_groups[seat[0]]
    alone = {**group, "params": [group["params"][seat[1]]]}
    groups, optimizer.param_groups = optimizer.param_groups, [alone]
    try:
        with _without_hooks(optimizer):
            _bare_step(optimizer)
    finally:
        optimizer.param_groups = groups
    if changed := [key for key in alone if key != "params" and (key not in group or alone[key] is not group[key])]:
        raise UnsupportedError(
            f"{type(optimizer).__name__} keeps {', '.join(changed)} in its parameter groups and changes it in each "
            "step, so it cannot step one parameter at a time. Use torch.optim.AdamW, or train without FusedBackward."
        )


def _bare_step(optimizer: torch.optim.Optimizer) -> None:
    """The class's own step, without the hooks that torch puts around it and what schedulers put on the instance."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
    step(optimizer)


@contextmanager
def _without_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Without those that were put on the optimizer: a subclass's step may call that of its parent, which has them."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks


def refuse_optimizer(given: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedError for an optimizer that cannot step one parameter at a time, as its gradient arrives.

    Args:
        given: As it was given: accelerate's wrapper, or the optimizer itself.
        optimizer: The optimizer itself.
    """
    kind = type(optimizer).__name__
    if getattr(given, "scaler", None) is not None:
        raise UnsupportedError(
            "mixed precision with float16 scales gradients and may skip a step after it has seen all of them, and "
            "FusedBackward steps with the first. Train in bfloat16, which needs no scaler."
        )
    if getattr(optimizer, "partition_states", False):
        raise UnsupportedError(
            "partition_states lets one process step a parameter for all, and FusedBackward steps it in each as its "
            "gradient arrives. Leave one of them out."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedError(
            f"{kind} evaluates the loss within a step, so it has no step for one gradient. Train without FusedBackward."
        )
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            refuse_flattened(parameter, name=f"parameter {index} of a group", user="FusedBackward")


def name_of(optimizer: torch.optim.Optimizer, seat: Seat) -> str:
    """The name of the parameter at a seat, or where it is."""
    number, index = seat
    names = optimizer.param_groups[number].get("param_names")
    return str(names[index]) if names else f"parameter {index} of group {number}"


def refuse_sparse(grad: Tensor, name: str) -> None:
    """Raise UnsupportedError for a sparse gradient."""
    if grad.layout != torch.strided:
        raise UnsupportedError(
            f"FusedBackward does not take sparse gradients, got one for {name}. Build the embedding with sparse=False."
        )
