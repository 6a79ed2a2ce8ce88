"""The base of our optimizers: closure, loop, state made of tensors only, loading that keeps every dtype.

A subclass says which state a parameter has (``state_spec``) and how one parameter is stepped. The
spec is the only description of the state: it allocates it, predicts its bytes before training, and
checks a checkpoint before it is loaded.
"""

from __future__ import annotations

import difflib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import CheckpointError, ConfigError, UnsupportedError
from fullrank.sharding import refuse_sharded


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Options of every Adam-based method."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment per optimizer step."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (fraction of a weight per unit of learning rate)."""


StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""State key -> shape and dtype."""

GUEST = "sparse_"
"""State under keys that start so is not an optimizer's own: SIFT keeps what belongs to a parameter there."""


class MethodOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state is exactly what ``state_spec`` says, complete after the first step.

    Gradients are read and never written. A parameter without a gradient is left alone, state and all.
    Non-finite gradient entries reach the weights as they do in ``torch.optim.AdamW``: scale or clip
    before the step.
    """

    structural: Sequence[str] = ("method",)
    """Group options that decide what the state is; a loaded state must agree in them."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # torch writes the defaults into the groups it is given: copies keep the caller's for another optimizer.
        groups = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
        super().__init__(groups, {"method": type(self).__name__, **defaults})

    @abstractmethod
    def state_spec(self, parameter: Tensor, group: dict[str, Any]) -> StateSpec:
        """Shape and dtype of every state tensor of one parameter."""

    @abstractmethod
    def step_group(self, group: dict[str, Any], number: int) -> None:
        """Step the parameters of group ``number`` that have a gradient; these have their state."""

    def option_problems(self, group: dict[str, Any]) -> list[str]:
        """What is wrong with the options of a group, one sentence each."""
        return adam_problems(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose options are in order, or none at all.

        Raises:
            ConfigError: Lists every option of the wrong type or out of bounds.
        """
        super().add_param_group(param_group)
        for key in self.param_groups[-1].keys() - self.defaults.keys() - {"params", "param_names", "initial_lr"}:
            near = difflib.get_close_matches(key, self.defaults, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            warnings.warn(
                f"option {key!r} of a parameter group has no effect in {type(self).__name__}.{hint}", stacklevel=2
            )
        if problems := self.option_problems(self.param_groups[-1]):
            self.param_groups.pop()
            raise ConfigError(" ".join(problems))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: Recomputes the loss with gradients enabled; its value is returned.

        Raises:
            UnsupportedError: For a sparse gradient or a sharded parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._prepare(parameter, group)
        for number, group in enumerate(self.param_groups):
            self.step_group(group, number)
        return loss

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuse what cannot be stepped and make the state of a parameter seen for the first time."""
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise UnsupportedError(
                f"{type(self).__name__} does not take sparse gradients, got one for a parameter of shape "
                f"{tuple(parameter.shape)}. Build the embedding with sparse=False, or give that parameter "
                "to torch.optim.SparseAdam."
            )
        state = self.state[parameter]
        if not state:
            refuse_sharded(parameter, optimizer=type(self).__name__)
            for key, (shape, dtype) in self.state_spec(parameter, group).items():
                device = "cpu" if key == "step" else parameter.device
                state[key] = torch.zeros(shape, dtype=dtype, device=device)

    def named(self, *, trainable: bool = True) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name (or position), parameter and group of everything this optimizer trains, or of all it was given."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.requires_grad or not trainable:
                    yield name, parameter, group

    def planned_state_bytes(self) -> int:
        """Bytes of state once every trainable parameter has had a gradient; works on the meta device."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize
            for _, parameter, group in self.named()
            for shape, dtype in self.state_spec(parameter, group).values()
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state bit for bit: torch's own method casts every tensor to the weight's dtype.

        Raises:
            CheckpointError: If the state was written by another optimizer, or for other shapes,
                ranks or dtypes than this optimizer's groups; nothing is changed then.
        """
        self._check_loadable(state_dict)
        super().load_state_dict(state_dict)
        for saved, parameter, _ in self._pair(state_dict):
            for key, value in _own(saved).items():
                device = "cpu" if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups that were saved by an older version the options added since."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _pair(self, state_dict: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
        """Each saved state with the parameter and the group that it belongs to."""
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                if index in state_dict["state"]:
                    yield state_dict["state"][index], parameter, group

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        if not {"state", "param_groups"} <= state_dict.keys():
            raise CheckpointError(
                f"this is not an optimizer's state: it holds {sorted(map(str, state_dict))}, expected state and "
                "param_groups. Load what optimizer.state_dict() returned."
            )
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != sizes:
            raise CheckpointError(
                f"this state is for parameter groups of {saved_sizes} parameters, this {type(self).__name__} has "
                f"{sizes}. Build the model and the groups as they were when it was saved."
            )
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key in self.structural:
                if key not in saved_group or saved_group[key] != group[key]:
                    raise CheckpointError(
                        f"this state was saved with {key} {saved_group.get(key, 'not set')!r}, this optimizer has "
                        f"{group[key]!r}. Build the optimizer with the options it was saved with."
                    )
        for saved, parameter, group in self._pair(state_dict):
            saved, expected = _own(saved), self.state_spec(parameter, group)
            found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items() if torch.is_tensor(value)}
            if found != expected or len(found) != len(saved):
                raise CheckpointError(
                    f"this state does not belong to this {type(self).__name__}: for a parameter of shape "
                    f"{tuple(parameter.shape)} it holds {_show(found, saved)}, expected {_show(expected, expected)}. "
                    "Build the model and the optimizer as they were when it was saved."
                )


def is_number(value: Any) -> bool:
    """Whether an option is a number (a 0-d tensor passes, True does not)."""
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def adam_problems(group: dict[str, Any]) -> list[str]:
    """What is wrong with learning rate, betas, epsilon and weight decay, one sentence each."""
    problems = [
        f"{key} must be a number, at least 0, got {group[key]!r}."
        for key in ("lr", "eps", "weight_decay")
        if not (is_number(group[key]) and float(group[key]) >= 0.0)
    ]
    betas = group["betas"] if "betas" in group else (group["beta"],)
    count = 2 if "betas" in group else 1
    if (
        not isinstance(betas, tuple | list)
        or len(betas) != count
        or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas)
    ):
        noun = "betas must be two numbers" if count == 2 else "beta must be a number"
        problems.append(f"{noun}, at least 0 and below 1, got {betas!r}.")
    return problems


def _own(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(GUEST)}


def _show(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], everything: dict[str, Any]) -> str:
    parts = [f"{key} {list(shape)} {str(dtype).removeprefix('torch.')}" for key, (shape, dtype) in tensors.items()]
    parts += [f"{key} ({type(value).__name__})" for key, value in everything.items() if key not in tensors]
    return ", ".join(parts)
