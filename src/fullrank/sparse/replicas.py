"""Whole copies of a model in several processes, under DistributedDataParallel; its sparse weights go another way.

DDP would send dense gradients, so it is told to leave the sparse weights and their values alone. What it
does for all others is done for them here: the weights of the first process are everyone's at the start, and at the end
of each backward pass that DDP synchronises, the values' gradients are averaged, x% of the bytes.

While a choice is open the dense gradients are averaged before it is made, each as soon as all before it were: the last
weight first, whatever the order in which a process comes by them, so that all processes send the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fullrank import sharding
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.sparse.coded import marks_of
from fullrank.sparse.weight import SparseWeight

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model: names that DDP leaves alone."""

Decide = Callable[[SparseWeight, Tensor], None]
"""Takes the averaged gradient of a weight whose choice is open."""


class Replicas:
    """The sparse weights of a model that several processes have copies of; in one process it does nothing.

    Args:
        model: The one that DDP wraps.
        weights: Its sparse weights, the same in all processes; none of them is spread.
        anchor: A parameter that DDP needs in the graph where it has nothing else to reduce, or None.
        decide: See there.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[SparseWeight], anchor: nn.Parameter | None, decide: Decide
    ) -> None:
        self.model = model
        self.weights = list(weights)
        self.anchor = anchor
        self.is_together = False
        """Whether the last forward pass with gradients was one of DDP."""
        self._decide = decide
        self._names = names_of(model, [tensor for part in weights for tensor in (part.weight, part.values)])
        self._ignored_before = getattr(model, IGNORED, None)
        setattr(model, IGNORED, [*(self._ignored_before or ()), *self._names])
        self._wrapper: Any = None
        self._group: Any = None
        """The processes again, for what is sent while DDP may be sending."""
        self._idle: set[SparseWeight] = set()
        """Weights that no process had a gradient of when their turn came: they hold up the others no more."""
        self._is_watched = False
        """Whether the end of the backward pass that is under way will be noticed."""
        self._order: list[SparseWeight] | None = None
        self._arrived: dict[SparseWeight, Tensor] = {}

    def holds(self, part: SparseWeight) -> bool:
        """Whether a weight's gradient is this process's own, and the others have theirs.

        Raises:
            UnsupportedError: If there are several processes and its forward pass was none of DDP.
        """
        if part.split is None and not self.is_together and sharding.num_processes() > 1:
            raise UnsupportedError(self._how_to())
        return self.is_together and part.split is None

    def leave(self) -> None:
        """Let DDP have the weights again."""
        if self._ignored_before is None:
            delattr(self.model, IGNORED)
        else:
            setattr(self.model, IGNORED, self._ignored_before)

    # A forward pass.

    def before_forward(self) -> None:
        """Find the processes at the first forward pass with gradients, and start from the same weights.

        Raises:
            UnsupportedError: If there are several processes and the model is not the one that DDP wraps.
            ConfigError: If choices or loaded states are not the same in all of them.
        """
        self.is_together = False
        if not self.weights or sharding.num_processes() == 1:
            return
        wrapper = sharding.wrapper_of(self.model) if sharding.is_connected() else None
        if wrapper is None or not wrapper.parameters_to_ignore.issuperset(self._names):
            if self.model.training:
                raise UnsupportedError(self._how_to())
            return
        self.is_together = True
        self._end_pass()
        if wrapper is not self._wrapper:
            self._wrapper = wrapper
            self._start_alike()
        if self._group is None and any(part.choosing for part in self.weights):
            self._group = sharding.own_group(wrapper.process_group)

    def _how_to(self) -> str:
        processes = sharding.num_processes()
        if not sharding.is_connected():
            return (
                f"this process is one of {processes}, and they are not connected, so each would choose entries of its "
                "own. Call torch.distributed.init_process_group and wrap the model in DistributedDataParallel, or "
                "start one process."
            )
        return (
            f"this process is one of {processes}, and SIFT's model is not the one that DistributedDataParallel wraps. "
            "Make SIFT on the plain model, wrap that very model afterwards and call the wrapper; or shard the model "
            'with fully_shard first and make SIFT with scope="row".'
        )

    @torch.no_grad()
    def _start_alike(self) -> None:
        """Take over the first process's weights; check the choices, and make those that were given by hand."""
        group = self._wrapper.process_group
        first = sharding.first_process(group)
        plain = [part for part in self.weights if part.leaf is part.weight]
        sharding.broadcast([part.weight.detach() for part in plain], first, group)
        given = {part: part.given_units() for part in self.weights}
        marks, own = marks_of(self.model), {part.name for part in self.weights}
        beside = [name for name in marks if name not in own]
        sums = torch.stack(
            [_checksum(part, given[part], marks.get(part.name, 0)) for part in self.weights]
            + [torch.tensor([0, 0, 0, marks[name]], device=self.weights[0].weight.device) for name in beside]
        )
        theirs = sums.clone()
        sharding.broadcast([theirs], first, group)
        differs = (sums != theirs).any(1).to(torch.int32)
        wrong = sharding.all_reduce([differs], group, "max")[0].tolist()
        if any(wrong):
            name = [*(part.name for part in self.weights), *beside][wrong.index(1)]
            raise ConfigError(
                f"the chosen entries of {name} are not the same in all processes ({sum(wrong)} such weights), or its "
                "codes, where it is kept as such. Assign the same idx in each of them, load the same optimizer state "
                "in each of them, and make codes of the same weights."
            )
        for part, units in given.items():
            if units is not None:
                part.choose(units)

    def after_forward(self, output: Any) -> Any:
        """Notice the backward pass that will start from these outputs; returns the output to use instead, or None."""
        if not self.is_together or not torch.is_grad_enabled():
            return None
        sends = bool(self._wrapper.require_backward_grad_sync)
        if self.anchor is not None:
            output = tree_map(partial(_tied, self.anchor), output)
        starts = [leaf for leaf in tree_leaves(output) if _has_gradient(leaf)]
        if not starts:
            raise UnsupportedError(
                f"a forward pass of {type(self.model).__name__} returned no tensor that requires a gradient, alone or "
                "in a tuple, list or dict, by which SIFT under DistributedDataParallel notices the backward pass. "
                "Return one."
            )
        for tensor in starts:
            tensor.register_hook(partial(self._begin_pass, sends))
        return output if self.anchor is not None else None

    # A backward pass.

    def _begin_pass(self, sends: bool, grad: Tensor) -> None:
        """Ask to be called at the end of the backward pass that is under way: of the outermost one."""
        if not self._is_watched:
            self._is_watched = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._finish, sends))

    def _end_pass(self) -> None:
        self._is_watched, self._order, self._arrived = False, None, {}

    def offer(self, part: SparseWeight, grad: Tensor) -> None:
        """Take this process's gradient of a weight whose choice is open."""
        if part.given_units() is not None:
            raise ConfigError(
                f"idx of {part.name} was assigned after training had begun in several processes. Assign it before the "
                "first forward pass."
            )
        if part in self._arrived:  # as from a layer that several reentrant checkpoints share
            self._arrived[part].add_(grad)
        else:
            self._arrived[part] = grad
        order = self._open_ones()
        while order and order[0] in self._arrived:
            self._average(order.pop(0))

    def _open_ones(self) -> list[SparseWeight]:
        """The weights whose turn is still to come in this pass, the same in all processes."""
        if self._order is None:
            self._order = [part for part in reversed(self.weights) if part.choosing and part not in self._idle]
        return self._order

    @torch.no_grad()
    def _average(self, part: SparseWeight) -> None:
        """Average one dense gradient and let it decide, if any process has one."""
        grad = self._arrived.pop(part, None)
        has_one = torch.tensor([grad is not None], dtype=torch.int32, device=part.weight.device)
        if not sharding.all_reduce([has_one], self._group, "max")[0].item():
            self._idle.add(part)
            return
        self._idle.discard(part)
        if grad is None:
            grad = torch.zeros_like(part.leaf)
        sharding.mean_([grad], self._group)
        self._decide(part, grad)

    def _finish(self, sends: bool) -> None:
        """At the end of a backward pass: the choices that are left, then the values' gradients."""
        for part in list(self._open_ones()):
            self._average(part)
        self._average_late()
        self._end_pass()
        if sends:
            self._average_values()
        if self._group is not None and not any(part.choosing for part in self.weights):
            sharding.leave_group(self._group)
            self._group = None

    def _average_late(self) -> None:
        """Gradients that came to idle weights, or after a weight's turn: one question for all whose choice is open."""
        late = [part for part in reversed(self.weights) if part.choosing]
        if late:
            flags = [part in self._arrived for part in late]
            asked = torch.tensor(flags, dtype=torch.int32, device=late[0].weight.device)
            for part, is_found in zip(late, sharding.all_reduce([asked], self._group, "max")[0].tolist(), strict=True):
                if is_found:
                    self._average(part)

    @torch.no_grad()
    def _average_values(self) -> None:
        """Average the gradients of all values at once; where no process has one, there is none afterwards either."""
        chosen = [part for part in self.weights if part.index is not None]
        if not chosen:
            return
        device = chosen[0].weight.device
        present = torch.tensor([float(part.values.grad is not None) for part in chosen], device=device)
        grads = [part.values.grad if part.values.grad is not None else torch.zeros_like(part.values) for part in chosen]
        sharding.mean_([*grads, present], self._wrapper.process_group)
        for part, grad, share in zip(chosen, grads, present.tolist(), strict=True):
            if share:
                part.values.grad = grad

    def same_for_all(self, chosen: dict[SparseWeight, Tensor]) -> dict[SparseWeight, Tensor]:
        """The first process's choice, whatever this one has chosen from the same gradients."""
        if not self.is_together or not chosen:
            return chosen
        first, device = sharding.first_process(self._wrapper.process_group), next(iter(chosen)).weight.device
        shapes = torch.tensor(
            [[len(units), units.shape[-1]] for units in chosen.values()], dtype=torch.int32, device=device
        )
        sharding.broadcast([shapes], first, self._group)
        agreed = {
            part: torch.empty(tuple(shape)[: units.ndim], dtype=part.layout.index_dtype, device=device)
            for (part, units), shape in zip(chosen.items(), shapes.tolist(), strict=True)
        }
        for part, units in chosen.items():
            if units.shape == agreed[part].shape:
                agreed[part].copy_(units)
        sharding.broadcast(list(agreed.values()), first, self._group)
        return agreed

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that finds its processes by itself."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_wrapper", "_group")}
        twin.__dict__.update(copy.deepcopy(kept, memo), _wrapper=None, _group=None)
        return twin


class _Tie(torch.autograd.Function):
    """Passes a tensor on; the anchor gets a gradient of zero when its own has come."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return tensor.view_as(tensor) if tensor.ndim else tensor.clone()  # a loss may be divided in place, no view may

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (anchor,) = ctx.saved_tensors
        return grad, torch.zeros_like(anchor)


def _tied(anchor: nn.Parameter, leaf: Any) -> Any:
    tie: Any = _Tie  # autograd functions carry no types
    return tie.apply(leaf, anchor) if _has_gradient(leaf) else leaf


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def names_of(model: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """All names of these parameters, as DDP spells them: with a dot before those of the model itself."""
    mine = {id(tensor) for tensor in tensors}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in mine]
    return names + [f".{name}" for name in names if "." not in name]


def _checksum(part: SparseWeight, given: Tensor | None, mark: int) -> Tensor:
    """Four numbers (int64) that tell one choice from another, a choice from none, and codes from others."""
    units, device = given if given is not None else part.index, part.weight.device
    numbers = torch.zeros(0, dtype=torch.int64) if units is None else units.flatten().long()
    numbers = numbers.to(device)
    places = torch.arange(1, len(numbers) + 1, device=device)
    sums = [places[-1:].sum(), numbers.sum(), (numbers * places).sum()]
    return torch.stack([*sums, torch.tensor(mark, device=device)])
