"""Whole copies of a model in several processes, under DistributedDataParallel: gradients averaged as they arrive.

DDP would send gradients in buckets after the hooks have seen them, and keep all of them, so it is told to leave the
parameters alone that are stepped early. What it does for others is done for them here: the first process's weights are
everyone's at the start, and each gradient is averaged before its step. Parameters below two dimensions, which are
small, stay with DDP and are stepped with the optimizer; so DDP always has something.

All processes send in one order, whatever the order in which gradients arrive in each: at first the last parameter goes
first, then as they arrived in the first process. A gradient waits for those before it; what a process has no gradient
of it adds zeros to at the end of its backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fullrank import sharding
from fullrank.errors import UnsupportedError
from fullrank.fused.gate import Gate
from fullrank.fused.pieces import Pieces
from fullrank.sparse import IGNORED, names_of

IN_FLIGHT = 2
"""Gradients that are being averaged while the backward pass goes on, at most."""


class Copies:
    """The parameters of a model that DDP leaves alone, and their gradients.

    Args:
        model: The one that DDP wraps, or no one.
        parameters: Of an optimizer, whole ones.
        pieces: What is averaged of each, and what becomes of it then.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], pieces: Pieces) -> None:
        self.model = model
        self.is_together = False
        """Whether the last forward pass in training was one of DDP."""
        self._is_apart = False
        """Whether the forward pass under way is one beside training, of which DDP does not know."""
        self._pieces = pieces
        own = set(model.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2 and parameter in own]
        kept = _smallest_for_ddp(model, matrices)
        self._order = [parameter for parameter in reversed(matrices) if parameter not in kept]
        """The parameters that are averaged here, in the order in which they are sent."""
        self._mine = set(self._order)
        self._gate = Gate(names_of(model, self._order), self)
        self._gate.open(model)
        self._wrapper: Any = None
        self._ddps: set[Tensor] = set()
        """Parameters that trained when this wrapper was first seen, and that it averages."""
        self._group: Any = None
        self._is_order_known = self._is_watched = self._accumulates = False
        self._idle: set[Tensor] = set()
        """Parameters that no process had a gradient of: they hold up the others no more."""
        self._asked: dict[Tensor, None] = {}
        """What the processes average in the pass under way."""
        self._waiting: deque[Tensor] = deque()
        """Of these, whose turn is still to come."""
        self._arrived: dict[Tensor, None] = {}
        """What this process has got a gradient of, in that order."""
        self._flying: deque[tuple[Tensor, Tensor, Callable[[], None]]] = deque()
        self._found: set[Tensor] = set()
        """What this process had something to send of."""
        self._late: dict[Tensor, Tensor] = {}
        """Averages of what it had nothing of."""

    def leave(self) -> None:
        """Let DDP have the parameters again, where it wraps the model anew."""
        self._gate.close(self.model)
        if self._group is not None:
            sharding.leave_group(self._group)

    def takes(self, parameter: Tensor) -> bool:
        """Whether the gradient of this parameter, which has just arrived, is averaged here, and not by DDP.

        Raises:
            UnsupportedError: If there are several processes and its forward pass was none of DDP.
        """
        if not self.is_together and sharding.num_processes() > 1:
            raise UnsupportedError(self._how_to())
        return self.is_together and parameter in self._mine

    def is_ddps(self, parameter: Tensor) -> bool:
        """Whether DDP averages its gradient, so that it is stepped with the optimizer."""
        return self.is_together and parameter not in self._mine

    def has(self, parameter: Tensor) -> bool:
        """Whether a gradient of it waits or is being averaged."""
        return parameter in self._arrived

    # A forward pass.

    def before_forward(self, module: nn.Module) -> None:
        """Find the processes, and start from the same weights."""
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "nn.DataParallel hands over all gradients at once, so nothing can be stepped early. Start one process "
                "for each GPU by torchrun, or let the program see one: CUDA_VISIBLE_DEVICES=0."
            )
        wrapper = sharding.wrapper_of(self.model)
        self._is_apart = wrapper is None and sharding.num_processes() > 1 and not self.model.training
        if self._is_apart:
            return  # it may come between a forward pass of DDP and its backward pass
        self.is_together = False
        if wrapper is None:
            if sharding.num_processes() > 1:
                raise UnsupportedError(self._how_to())
            return
        if not wrapper.parameters_to_ignore.issuperset(self._gate.names):
            raise UnsupportedError(self._how_to())
        if wrapper._join_config.enable:
            raise UnsupportedError(
                "join() lets a process that has no more inputs take part in what DistributedDataParallel sends, and "
                "FusedBackward sends the gradients. Give all processes as many batches, and leave join() out."
            )
        self.is_together = True
        self._sends = bool(wrapper.require_backward_grad_sync)
        self._end_pass()
        if wrapper is not self._wrapper:
            self._start_alike(wrapper)
        self._refuse_unknown(wrapper)

    def _how_to(self) -> str:
        return (
            f"this process is one of {sharding.num_processes()}, and the model given to FusedBackward is not one that "
            "DistributedDataParallel has wrapped afterwards. Give FusedBackward the plain model, wrap that very model "
            "then, and call the wrapper; or shard it with fully_shard first."
        )

    @torch.no_grad()
    def _start_alike(self, wrapper: Any) -> None:
        """Take over the first process's weights, as DDP does with the others."""
        if self._group is not None:
            sharding.leave_group(self._group)
        self._wrapper, self._is_order_known = wrapper, False
        self._ddps.clear()
        self._group = sharding.own_group(wrapper.process_group)  # its collectives may come between those of DDP
        weights = [parameter.detach() for parameter in self._order]
        sharding.broadcast(weights, sharding.first_process(self._group), self._group)

    def _refuse_unknown(self, wrapper: Any) -> None:
        """Raise if what trains now was frozen when DDP wrapped the model: it averages no gradients of it."""
        left = {name: p for name, p in self.model.named_parameters() if name not in wrapper.parameters_to_ignore}
        trained = {parameter: name for name, parameter in left.items() if parameter.requires_grad}
        if not self._ddps and len(trained) <= wrapper._get_ddp_logging_data()["num_parameter_tensors"]:
            self._ddps.update(trained)
        if unknown := [name for parameter, name in trained.items() if parameter not in self._ddps]:
            raise UnsupportedError(
                f"{', '.join(unknown[:3])}{' and others' * (len(unknown) > 3)} may have been frozen when "
                "DistributedDataParallel wrapped the model, which then averages no gradients of theirs. Wrap the model "
                "anew after parameters begin to train: DistributedDataParallel(model)."
            )

    def after_forward(self, output: Any) -> None:
        """Notice the backward pass that will start from these outputs."""
        if not self.is_together or self._is_apart:
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._begin_pass)

    # A backward pass.

    def _begin_pass(self, grad: Tensor) -> None:
        """Ask to be called at the end of the backward pass that is under way: of the outermost one."""
        if self._is_watched:
            return
        self._is_watched = True
        self._accumulates = self._pieces.begin_pass(sends=self._sends)
        trained = [parameter for parameter in self._order if parameter.requires_grad]
        if self._accumulates:
            trained = [parameter for parameter in trained if self._pieces.needs_average(parameter)]
        self._asked = dict.fromkeys(trained)
        self._waiting = deque(parameter for parameter in trained if parameter not in self._idle)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._finish)

    def _end_pass(self) -> None:
        self._is_watched = self._accumulates = False
        for held in (self._asked, self._waiting, self._arrived, self._flying, self._found, self._late):
            held.clear()

    def offer(self, parameter: Tensor) -> None:
        """Take this process's gradient of a parameter."""
        if not self._is_watched:
            raise UnsupportedError(
                f"a backward pass started from nothing that {type(self.model).__name__} returned to "
                "DistributedDataParallel, alone or in a tuple, list or dict. Call the wrapper, and return the loss, or "
                "what it is computed from."
            )
        self._arrived[parameter] = None
        if self._accumulates and parameter not in self._asked:
            self._pieces.keep(parameter)
            return
        while self._waiting and self._waiting[0] in self._arrived:
            self._start(self._waiting.popleft())

    @torch.no_grad()
    def _start(self, parameter: Tensor) -> None:
        """Begin to average one, and go on with the one that began longest ago."""
        if self._pieces.exists(parameter):
            self._found.add(parameter)
        piece = self._pieces.piece(parameter)
        self._flying.append((parameter, piece, sharding.start_mean(piece, self._group)))
        while len(self._flying) > IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        parameter, piece, wait = self._flying.popleft()
        wait()
        if parameter in self._found:
            self._pieces.averaged(parameter, piece)
        else:
            self._late[parameter] = piece

    @torch.no_grad()
    def _finish(self) -> None:
        """At the end of a backward pass: all that is left, first what this process has no gradient of."""
        while self._waiting:
            self._start(self._waiting.popleft())
        while self._flying:
            self._land()
        if self._asked:
            self._settle()
        if self._asked and not self._accumulates and not self._is_order_known:
            self._learn_order()
        self._end_pass()

    def _settle(self) -> None:
        """Step what others had a gradient of, and leave alone what nobody had."""
        flags = [parameter in self._found or self._pieces.exists(parameter) for parameter in self._asked]
        counted = torch.tensor(flags, dtype=torch.int32, device=self._order[0].device)
        (counted,) = sharding.all_reduce([counted], self._group, "max")
        if not self._late and not self._idle:
            return  # nobody waits for the answer
        for parameter, is_found in zip(self._asked, counted.tolist(), strict=True):
            if parameter in self._idle:
                if is_found:
                    self._idle.discard(parameter)
                    piece = self._pieces.piece(parameter)
                    sharding.start_mean(piece, self._group)()
                    self._pieces.averaged(parameter, piece)
            elif parameter in self._late:
                if is_found:
                    self._pieces.averaged(parameter, self._late[parameter])
                else:
                    self._idle.add(parameter)

    def _learn_order(self) -> None:
        """From now on send in the order in which gradients arrived in the first process."""
        self._is_order_known = True
        first = [*self._arrived, *(parameter for parameter in self._order if parameter not in self._arrived)]
        numbers = {parameter: number for number, parameter in enumerate(self._order)}
        places = torch.tensor([numbers[p] for p in first], dtype=torch.int32, device=self._order[0].device)
        sharding.broadcast([places], sharding.first_process(self._group), self._group)
        self._order = [self._order[place] for place in places.tolist()]


def _smallest_for_ddp(model: nn.Module, matrices: Sequence[Tensor]) -> set[Tensor]:
    """What to leave with DDP, which refuses a model without a parameter of its own: one that trains now, one later."""
    ignored = set(getattr(model, IGNORED, ()))
    others = {p for name, p in model.named_parameters() if name not in ignored} - set(matrices)
    now, later = ([p for p in matrices if p.requires_grad == trains] for trains in (True, False))
    if any(parameter.requires_grad for parameter in others):
        now = []
    return {min(several, key=torch.Tensor.numel) for several in (now, later) if several}
