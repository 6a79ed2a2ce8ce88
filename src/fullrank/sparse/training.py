"""All sparse weights of a model together: from its gradients to their values, from an optimizer's steps to its weights.

Hooks only gather; weights change right after a step of whichever optimizer holds their values, so the next
forward pass sees them, and its state carries all that a resumed run needs.
"""

from __future__ import annotations

import copy
import json
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from fullrank.adapter import fingerprint
from fullrank.errors import CheckpointError, UnsupportedError
from fullrank.sharding import any_part, gradient_of, is_fully_sharded, is_sharded, local, num_processes
from fullrank.sparse.coded import is_coded, origins, seat_of
from fullrank.sparse.observe import observe
from fullrank.sparse.replicas import Replicas
from fullrank.sparse.saved import check, difference, keep_place_in, keep_with, own_part, refuse_foreign, restore
from fullrank.sparse.seat import Anchor, find_module, require_inputs_grad
from fullrank.sparse.weight import SparseWeight

logger = logging.getLogger(__name__)

GROUP = "sift"
"""Key of a parameter group under which a saved state says how it was made."""


class SparseTraining(ABC):
    """Trains chosen units of some weights, others densely, and freezes the rest; a method says which units.

    Args:
        model: The model; every parameter is in one of the three that follow.
        weights: What trains sparsely.
        dense: What trains densely, by name.
        frozen: What does not train, by name.
        settings: Numbers and words that a saved state has to agree in.
        reselect_every: Optimizer steps after which the choice is open again, or None.
        inputs_grad: Let the embeddings' output require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[SparseWeight],
        dense: dict[str, nn.Parameter],
        frozen: dict[str, nn.Parameter],
        *,
        settings: dict[str, Any],
        reselect_every: int | None,
        inputs_grad: bool,
    ) -> None:
        self.model = model
        self.weights = weights
        self.dense = dense
        self.frozen = frozen
        self.settings = settings
        self.base: dict[str, str] = {}
        """Fingerprint of the weights before training."""
        self._reselect_every = reselect_every
        self._by_values = {part.values: part for part in weights}
        self._warned = False
        self._overflown: SparseWeight | None = None
        """A weight whose gradient was not finite in the step at hand."""
        places = [find_module(model, part.name) for part in weights]
        self._trained = {p: p.requires_grad for p in (*dense.values(), *frozen.values())}
        for parameter in self._trained:
            parameter.requires_grad_(any(parameter is p for p in dense.values()))
        self._seats = [seat_of(part, *place, self._on_gradient) for part, place in zip(weights, places, strict=True)]
        whole = [part for part in weights if part.split is None]
        needs_anchor = whole and not dense and num_processes() > 1
        self._anchor = Anchor(places[0][0], weights[0].leaf) if needs_anchor else None
        anchor = None if self._anchor is None else self._anchor.parameter
        self._replicas = Replicas(model, whole, anchor, self._decide)
        self._handles = [
            # before that of FSDP2, which gathers what this one may still write
            model.register_forward_pre_hook(self._before_forward, prepend=len(whole) < len(weights)),
            model.register_forward_hook(self._after_forward),
        ]
        if inputs_grad:
            self._handles.append(require_inputs_grad(model))
        observe(self)

    @abstractmethod
    def choose_open(self) -> None:
        """Choose for every weight whose choice is open and that holds enough gradient; called after each one."""

    @abstractmethod
    def refuse_stuck(self) -> None:
        """Raise if an open choice can never be made; called after each step."""

    def model_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The plain model's parameters by name."""
        yield from ((part.name, part.weight) for part in self.weights)
        yield from self.dense.items()
        yield from self.frozen.items()

    # A gradient: gathered and freed; while a choice is open, held until it is made.

    def _on_gradient(self, part: SparseWeight, leaf: Tensor) -> None:
        grad = gradient_of(leaf) if leaf.grad is not None else None
        leaf.grad = None
        if grad is None:
            raise UnsupportedError(
                f"the gradient of {part.name} was not kept: a backward pass went through a graph from before its "
                f"{part.layout.granularity}s were chosen. Go back through each graph before the next forward pass."
            )
        if grad.layout != torch.strided:
            raise UnsupportedError(f"SIFT does not take sparse gradients, got one for {part.name}. Set sparse=False.")
        self._take_fingerprint()
        is_copied = self._replicas.holds(part)
        if not is_copied and (units := part.given_units()) is not None:
            part.choose(units)
        if not part.choosing:
            part.receive(grad)
        elif is_copied:
            self._replicas.offer(part, grad)
        else:
            self._decide(part, grad)

    def _decide(self, part: SparseWeight, grad: Tensor) -> None:
        """Hold a gradient that an open choice waits for, the same in all processes or each its part, and choose."""
        if self._overflown is not None and _has_overflown(self._overflown, self._overflown.values.grad):
            return  # this step will be skipped
        self._overflown = None
        if _has_overflown(part, grad):  # nothing to choose by: pass it on, as dense training would
            part.values.grad = torch.full_like(part.values, torch.nan)
            self._overflown = part
            for other in self.weights:
                other.let_go()
            return
        part.hold(grad)
        self.choose_open()

    def settle(self, chosen: dict[SparseWeight, Tensor]) -> None:
        """Train these units from now on, in all processes."""
        for part, units in self._replicas.same_for_all(chosen).items():
            part.settle(units)

    def _take_fingerprint(self) -> None:
        if not self.base:
            coded = origins(self.model)
            known = {*coded, *self.dense}
            self.base = fingerprint({name: p for name, p in self.model_parameters() if name not in known}) | coded

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._refuse_sharded_later()
            self._replicas.before_forward()
            if any(part.split is not None for part in self.weights):
                self._take_fingerprint()  # together: every process comes by here
        for seat in self._seats:
            part = seat.sparse
            seat.refuse_cast()
            if getattr(module, "_is_replica", False) and (part.layout.granularity != "entry" or is_coded(part)):
                what, rest = ("codes", "") if is_coded(part) else (f"{part.layout.granularity}s", ", or entries")
                raise UnsupportedError(
                    f"{what} do not train under nn.DataParallel, which the Trainer uses where it sees several GPUs. "
                    f"Set CUDA_VISIBLE_DEVICES to one{rest}."
                )
            if torch.is_grad_enabled():  # weights that an evaluation lends the model (EMA) are not taken over
                part.catch_up()
            if seat.is_sliced:
                part.given_units()  # no gradient hook is called that would notice an assignment
            if part.layout.granularity != "entry" and not part.choosing and not seat.is_sliced:
                seat.slice()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._replicas.after_forward(output)

    def _refuse_sharded_later(self) -> None:
        if not self.base and all(part.split is None for part in self.weights) and is_fully_sharded(self.model):
            raise UnsupportedError(
                "the model was sharded by fully_shard after SIFT was made, which trains the parameters of before. Call "
                'fully_shard first, then make SIFT with scope="row".'
            )

    # An optimizer, whichever it is: its steps reach the weights, its state holds ours.

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Write what an optimizer of ours has just stepped into the weights."""
        mine = [(group, self._by_values[p]) for group in optimizer.param_groups for p in group["params"]
                if p in self._by_values]  # fmt: skip
        if not mine:
            return
        for seat in self._seats:
            seat.refuse_replaced()
        self.refuse_stuck()
        if any(part.split is not None for part in self.weights):
            self._take_fingerprint()  # so that a state has all its keys after a first step of any kind
        self._warn_if_idle([part for _, part in mine])
        for group in optimizer.param_groups:
            names = self._names(group)
            base = json.dumps(self.base)  # text: torch.distributed.checkpoint wants the same keys before it is known
            group[GROUP] = {**self.settings, "base": base, "weights": names, "by_hand": [], "waiting": {}}
        for group, part in mine:
            state = optimizer.state[part.values]
            refuse_foreign(part, state)
            part.owner = weakref.ref(optimizer)
            part.end_step()
            if part.index is not None and (state or part.values.grad is not None):
                keep_with(part, state)
            elif part.index is None and state and part.layout.per_row:
                keep_place_in(part, state)
            if part.index is not None and self._is_due(part):
                self._reopen(part)
            if part.by_hand:
                group[GROUP]["by_hand"].append(part.name)
            if part.pending is not None:
                group[GROUP]["waiting"][part.name] = part.waiting()

    def check_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state that was saved under other settings or for other weights, before it is loaded."""
        now = [self._names(group) for group in optimizer.param_groups]
        if not any(now):
            return
        saved_groups = state_dict.get("param_groups", [])
        sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, optimizer.param_groups)]
        was = [(group.get(GROUP) or {}).get("weights", names) for group, names in zip(saved_groups, now, strict=False)]
        if sizes[0] != sizes[1] or was != now:
            raise CheckpointError(
                f"this state is for other weights or groups (of {sizes[0]} parameters, here {sizes[1]}): "
                f"{difference(was, now)}. Make SIFT with the targets and exceptions it was saved with, and "
                "the groups in that order."
            )
        for saved_group, saved, part in self._pair(optimizer, state_dict):
            settings = saved_group.get(GROUP) or self.settings
            for key, value in self.settings.items():
                if settings.get(key) != value:
                    raise CheckpointError(
                        f"this state was saved by a SIFT with {key} {settings.get(key)!r}, this one has {value!r}. "
                        "Make it with the settings it was saved with."
                    )
            if saved:
                check(part, saved)

    def own_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A saved state, spread as the parameters are where it is whole."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p in self._by_values for p in parameters) or not any(is_sharded(p) for p in parameters):
            return state_dict
        numbers = (number for group in state_dict.get("param_groups", ()) for number in group["params"])
        owners = dict(zip(numbers, parameters, strict=False))
        return {**state_dict, "state": {n: own_part(s, owners.get(n)) for n, s in state_dict.get("state", {}).items()}}

    def loaded(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Go on from a loaded state: its choice, its values bit for bit, its open choices."""
        for saved_group, saved, part in self._pair(optimizer, state_dict):
            part.owner = weakref.ref(optimizer)
            was = saved_group.get(GROUP) or {}
            self.base = dict(json.loads(was.get("base") or "{}"))
            if is_coded(part) and part.index is not None and not saved:
                part.let_go()
                continue  # what was learned is in the values alone: they stay, and train on
            if part.index is not None or part.pending is not None:
                part.reset()
            self._reopen(part)
            part.by_hand = part.name in was.get("by_hand", ())
            if saved:
                restore(part, saved)
                if part.index is not None:
                    keep_with(part, optimizer.state[part.values])
                    part.choosing = self._is_due(part)
                else:
                    keep_place_in(part, optimizer.state[part.values])
            if part.name in was.get("waiting", {}):
                part.wait_again(was["waiting"][part.name])

    def _pair(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], SparseWeight]]:
        """Saved group, saved state and weight, for each of our values in an optimizer."""
        for saved_group, group in zip(state_dict.get("param_groups", ()), optimizer.param_groups, strict=False):
            for index, parameter in zip(saved_group["params"], group["params"], strict=False):
                if parameter in self._by_values:
                    yield saved_group, state_dict["state"].get(index, {}), self._by_values[parameter]

    def _names(self, group: dict[str, Any]) -> list[str]:
        """Names of our weights in a parameter group, in its order."""
        return [self._by_values[p].name for p in group["params"] if p in self._by_values]

    def _is_due(self, part: SparseWeight) -> bool:
        """Whether it is time to choose again: a function of the step number, so a resume needs no more."""
        return bool(self._reselect_every) and not part.by_hand and part.steps % (self._reselect_every or 1) == 0

    def _reopen(self, part: SparseWeight) -> None:
        part.choosing = True
        self._seats[self.weights.index(part)].unslice()

    def _warn_if_idle(self, parts: list[SparseWeight]) -> None:
        if not self._warned and all(part.values.grad is None and part.pending is None for part in parts):
            self._warned = True
            logger.warning(
                "SIFT: the optimizer stepped and no sparse weight had a gradient. If the model is checkpointed with "
                "use_reentrant=True and its embeddings are frozen, pass gradient_checkpointing=True."
            )

    def detach(self, device: torch.device | str | None = None) -> None:
        """Leave the model as a plain one, with its trained weights; this SIFT is then done: steps have no effect.

        Args:
            device: Where layers come to lie whose weights were kept as codes; None: where these were.
        """
        if self._seats:
            self._replicas.leave()
        if self._anchor is not None:
            self._anchor.leave()
        for seat in self._seats:
            seat.leave(self.model, device)
        for handle in self._handles:
            handle.remove()
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)
        self._by_values, self._handles, self._trained, self._seats, self._anchor = {}, [], {}, [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that trains the copied model: hooks on tensors are not copied by torch."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for seat, original in zip(twin._seats, self.weights, strict=True):
            optimizer = original.owner() if original.owner is not None else None
            seat.sparse.after_copy(original, memo.get(id(optimizer)) or copy.deepcopy(optimizer, memo))
            seat.listen(twin._on_gradient)
        observe(twin)
        return twin


def _has_overflown(part: SparseWeight, grad: Tensor | None) -> bool:
    """Whether a gradient is not finite, in any process that holds a part of it."""
    return grad is not None and any_part(~local(grad).isfinite().all(), part.split)
