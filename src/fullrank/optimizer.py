"""The base of our optimizers: closure, loop, state made of tensors only, loading that keeps every dtype.

A subclass says which state a parameter has (``state_spec``) and how one parameter is stepped. The
spec is the only description of the state: it allocates it, predicts its bytes before training, and
checks a checkpoint before it is loaded.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.partition import Partition
from fullrank.saved_state import StateSpec, bytes_of, check_loadable, own_entries, paired, placed, without_own
from fullrank.sharding import any_part, is_connected, is_sharded, local, make_state, refuse_flattened, split_of

Seat = tuple[int, int]
"""Number of a group, and of a parameter in it."""


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


class MethodOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state is exactly what ``state_spec`` says, complete after the first step.

    Gradients are read and never written. A parameter without a gradient is left alone, state and all.
    Non-finite gradient entries reach the weights as they do in ``torch.optim.AdamW``: scale or clip
    before the step.
    """

    structural: Sequence[str] = ("method",)
    """Group options that decide what the state is; a loaded state must agree in them."""

    partition_states = False
    _partition: Partition | None = None
    _warned = False
    _has_stepped_ahead = False

    def __init__(self, params: Any, defaults: dict[str, Any], *, partition_states: bool = False) -> None:
        self.partition_states = partition_states
        # torch writes the defaults into the groups it is given: copies keep the caller's for another optimizer.
        groups = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
        super().__init__(groups, {"method": type(self).__name__, **defaults})

    @abstractmethod
    def state_spec(self, parameter: Tensor, group: dict[str, Any]) -> StateSpec:
        """Shape and dtype of every state tensor of one parameter."""

    @abstractmethod
    def step_parameters(self, only: Sequence[Seat] | None = None) -> None:
        """Step the parameters for which ``steps_here``, or those at some seats (``seated``); these have their state."""

    def state_layout(self, key: str, parameter: Tensor, group: dict[str, Any]) -> str:
        """How a state tensor of a sharded parameter is spread: ``like`` it, by ``rows``, or ``whole``."""
        return "like"

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
        try:
            for name, parameter, group in self.named(trainable=False):
                if group is self.param_groups[-1]:
                    self.refuse_layout(name, parameter, group)
        except (ConfigError, UnsupportedError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: Recomputes the loss with gradients enabled; its value is returned.

        Raises:
            UnsupportedError: For a sparse gradient, or a parameter that is spread in a way that cannot be stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_rehearsal():
            self.init_states()
            return loss
        self._prepare()
        if self._partition is not None:
            self._partition.check_weights()
        self.step_parameters()
        if self._partition is not None:
            self._partition.share_()
        was_ahead, self._has_stepped_ahead = self._has_stepped_ahead, False
        if not (self._warned or was_ahead) and not any(True for _ in self._given(None)):
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} stepped, and no parameter had a gradient. If the model was sharded, moved or "
                "wrapped since, make the optimizer afterwards: it holds parameters that the model has left.",
                stacklevel=2,
            )
        return loss

    @torch.no_grad()
    def step_ahead(self, seats: Sequence[Seat]) -> None:
        """Step the parameters at these seats before ``step``, as their gradients arrive; that then steps the rest."""
        self._prepare(seats)
        self.step_parameters(seats)
        self._has_stepped_ahead = True

    def seated(self, only: Sequence[Seat] | None) -> Iterator[tuple[int, dict[str, Any], list[tuple[int, Tensor]]]]:
        """Number of a group, the group, and which of its parameters this process steps, at these seats or anywhere."""
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            indices = range(len(params)) if only is None else [index for owner, index in only if owner == number]
            yield number, group, [(index, params[index]) for index in indices if self.steps_here(params[index])]

    def _given(self, only: Sequence[Seat] | None) -> Iterator[Tensor]:
        """The parameters that have a gradient, of all or of those at some seats."""
        groups = [group["params"] for group in self.param_groups]
        given = (groups[number][index] for number, index in only) if only is not None else chain.from_iterable(groups)
        return (parameter for parameter in given if parameter.grad is not None)

    def _is_rehearsal(self) -> bool:
        """Whether this is a first step with zeros for rates and gradients, which is to make the state and no more.

        ``torch.distributed.checkpoint`` takes it to learn what an optimizer's state is; a basis of it would be void.
        """
        has_states = any(self.state.values()) or (self._partition is not None and self._partition.has_states)
        if has_states or any(float(group["lr"]) for group in self.param_groups):
            return False
        given = {p: p.grad for p in self._given(None) if p.grad is not None}
        if not given or any(grad.layout != torch.strided for grad in given.values()):
            return False
        flags = [local(grad).any() for grad in given.values()]
        found = torch.stack([flag.to(flags[0].device) for flag in flags]).any()
        splits = [split for p in given if (split := split_of(p)) is not None and split.num > 1]
        for split in {split.group: split for split in splits}.values():
            found = found.new_tensor(any_part(found, split))
        return not found

    def steps_here(self, parameter: Tensor) -> bool:
        """Whether this process steps a parameter: it has a gradient, and no other process keeps its state."""
        return parameter.grad is not None and (self._partition is None or self._partition.is_mine(parameter))

    def init_states(self) -> None:
        """Make the state of every trainable parameter now, where the first step would make it.

        A checkpoint then has all its keys from the start. Sharded parameters do so at the first step by themselves:
        ``torch.distributed.checkpoint`` passes over keys that come later.
        """
        self._divide_states()
        if self._partition is not None:
            self._partition.changed()
        for name, parameter, group in self.named():
            if (self._partition is None or self._partition.is_mine(parameter)) and not self.state[parameter]:
                self._init_state(name, parameter, group)

    def _prepare(self, only: Sequence[Seat] | None = None) -> None:
        """Refuse what cannot be stepped, and make the state of parameters seen for the first time."""
        self._divide_states()
        fresh = set()
        for parameter in self._given(only):
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UnsupportedError(
                    f"{type(self).__name__} does not take sparse gradients, got one for a parameter of shape "
                    f"{tuple(parameter.shape)}. Build the embedding with sparse=False, or give that parameter "
                    "to torch.optim.SparseAdam."
                )
            if is_sharded(parameter) and not self.state[parameter]:
                self.init_states()
            if self.steps_here(parameter) and not self.state[parameter]:
                fresh.add(parameter)
        for name, parameter, group in self.named(trainable=False) if fresh else ():
            if parameter in fresh:
                self._init_state(name, parameter, group)

    def _init_state(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        self.refuse_layout(name, parameter, group)
        split = split_of(parameter)
        for key, (shape, dtype) in self.state_spec(parameter, group).items():
            if key == "step":
                self.state[parameter][key] = torch.zeros(shape, dtype=dtype)
            else:
                layout = self.state_layout(key, parameter, group)
                self.state[parameter][key] = make_state(shape, dtype, parameter, split, layout)

    def refuse_layout(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raise UnsupportedError for a parameter that an engine has flattened, or spread in a way that cannot work."""
        refuse_flattened(parameter, name=name, user=type(self).__name__)
        if split_of(parameter, name=name) is not None and self.partition_states:
            raise ConfigError(
                f"partition_states is for whole parameters under DDP, and {name} is sharded: its state is divided "
                "already. Leave partition_states out."
            )

    def _divide_states(self) -> None:
        """Once there are several processes, settle which of them keeps the state of which parameter."""
        if not self.partition_states or not is_connected():
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self._partition is None:
            self._partition = Partition()
        if len(self._partition.owners) < len(parameters):
            sizes = {parameter: bytes_of(spec) for parameter, spec in self._spec_of().items()}
            self._partition.include({p: size if p.requires_grad else 0 for p, size in sizes.items()})

    def consolidate_state_dict(self) -> None:
        """Bring a state that is partitioned over processes together in the first one, in host memory.

        All processes must call it. Until the next step ``state_dict()`` is then whole in the first process. Without
        ``partition_states``, or in one process, there is nothing to do.
        """
        self._divide_states()
        if self._partition is not None:
            self._partition.gather_(self.state, self._spec_of())

    def _spec_of(self) -> dict[Tensor, StateSpec]:
        return {parameter: self.state_spec(parameter, group) for _, parameter, group in self.named(trainable=False)}

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as of any torch optimizer.

        Raises:
            UnsupportedError: If other processes keep a part of it and ``consolidate_state_dict`` was not called.
        """
        if self._partition is None or not self._partition.has_states:
            return super().state_dict()
        with self._partition.whole_state(self.state):
            return super().state_dict()

    def named(self, *, trainable: bool = True) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name (or position), parameter and group of everything this optimizer trains, or of all it was given."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.requires_grad or not trainable:
                    yield name, parameter, group

    def planned_state_bytes(self) -> int:
        """Bytes of state once every trainable parameter has had a gradient; works on the meta device."""
        return sum(bytes_of(self.state_spec(parameter, group)) for _, parameter, group in self.named())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state bit for bit: torch's own method casts every tensor to the weight's dtype.

        Raises:
            CheckpointError: If the state was written by another optimizer, or for other shapes,
                ranks or dtypes than this optimizer's groups; nothing is changed then.
            UnsupportedError: If its options cannot work on how the parameters are spread; nothing is changed either.
        """
        check_loadable(self, state_dict)
        self._divide_states()
        kept = state_dict
        if self._partition is not None:
            self._partition.changed()
            others = {index for index, p, _ in paired(self, state_dict) if not self._partition.is_mine(p)}
            states = {i: without_own(state) if i in others else state for i, state in state_dict["state"].items()}
            kept = {**state_dict, "state": {index: state for index, state in states.items() if state}}
        super().load_state_dict(kept)
        for index, parameter, group in paired(self, kept):
            for key, value in own_entries(kept["state"][index]).items():
                self.state[parameter][key] = placed(self, key, value, parameter, group)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy in another process needs."""
        if self._partition is not None and self._partition.has_states:
            raise UnsupportedError(
                "an optimizer whose state is partitioned over processes cannot be pickled: each has a part. Save its "
                "state_dict(), after consolidate_state_dict() in all processes."
            )
        return {**super().__getstate__(), "partition_states": self.partition_states}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in this process, which keeps the same share of the states."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {"partition_states": self.partition_states, "_partition": self._partition}
        twin.__setstate__(copy.deepcopy({**super().__getstate__(), **own}, memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups that were saved by an older version the options added since."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key in self.defaults.keys() - {"differentiable"}:  # torch's own, which it adds here and no group has
                group.setdefault(key, self.defaults[key])


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
