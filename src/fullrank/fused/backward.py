"""The hooks: from a gradient that has just arrived to the step of its parameter.

At most one complete gradient is alive at a time (a few under DDP, a layer's shards under FSDP2), and the parts of one
that comes from several places (tied embeddings), where an ordinary loop keeps all of them until the step. States stay
in the optimizer, and options are read as a step is taken, so schedules, checkpoints and resumed runs are those of the
ordinary loop.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fullrank.errors import ConfigError, UnsupportedError
from fullrank.fused.alive import bytes_alive
from fullrank.fused.copies import Copies
from fullrank.fused.norms import Meter, Norm
from fullrank.fused.pieces import Pieces
from fullrank.fused.stepping import name_of, refuse_optimizer, refuse_sparse, step_one
from fullrank.fused.sums import Sums
from fullrank.optimizer import Seat, is_number
from fullrank.sharding import is_sharded, num_processes
from fullrank.sparse import is_values

logger = logging.getLogger(__name__)


class FusedBackward:
    """Steps every parameter of an optimizer as its gradient arrives, and frees the gradient.

    The loop stays as it is: ``loss.backward(); optimizer.step(); scheduler.step(); optimizer.zero_grad()``, where
    ``optimizer.step()`` steps what is left. So do the optimizer's groups, states and checkpoints. It lives as long as
    the optimizer does; ``detach`` ends it, and so does leaving it as a context.

    Make it before DistributedDataParallel wraps the model, and after ``fully_shard`` has sharded it.

    Args:
        optimizer: Any that steps each parameter by itself, ours or torch's.
        model: That it trains, unwrapped; needed in several processes, unless it is sharded.
        max_grad_norm: Largest norm of each parameter's gradient, each clipped by itself: the norm of all together is
            unknown while they arrive. None: no clipping.
        is_accumulating: Says whether the backward pass under way is that of a micro-batch before the last, for loops
            that know; see ``accumulating``.

    Raises:
        ConfigError: For a bound that is not above 0, an optimizer that has one of these already, or several processes
            without a model.
        UnsupportedError: For an optimizer or a wrapper that cannot work so; in a backward pass, for a second gradient
            of a parameter before ``optimizer.step()``, or a micro-batch whose gradients cannot be summed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        is_accumulating: Callable[[], bool] | None = None,
    ) -> None:
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.model = model
        _refuse(self.optimizer, model)
        refuse_optimizer(optimizer, self.optimizer)
        self._asks = is_accumulating
        self._is_inside = False
        self._stepped: set[Tensor] = set()
        """Parameters that were stepped since the optimizer's last step."""
        self._meter = Meter()
        self.max_grad_norm = max_grad_norm
        self._seats: dict[Tensor, Seat] = {}
        self._handles: dict[Tensor, Any] = {}
        self._sums = Sums(self.optimizer, self._seats)
        self._pieces = Pieces(self._sums, self._is_accumulating, self._step)
        self._attach()
        self._copies = self._find_copies()
        self._step_handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    # What is stepped so.

    def _attach(self) -> None:
        """Put hooks on the parameters that have none: groups may have been added to, or changed by a wrapper."""
        self._seats.clear()
        for number, group in enumerate(self.optimizer.param_groups):
            self._seats.update({parameter: (number, index) for index, parameter in enumerate(group["params"])})
        for parameter in self._seats:
            if parameter not in self._handles and parameter.is_floating_point() and not is_values(parameter):
                trains = parameter.requires_grad
                parameter.requires_grad_(True)  # a frozen tensor takes no hook, and it may train later
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(_weakly(self))
                parameter.requires_grad_(trains)
        for parameter in [parameter for parameter in self._handles if parameter not in self._seats]:
            self._handles.pop(parameter).remove()

    def _find_copies(self) -> Copies | None:
        """What DDP has to leave alone, if the model is not spread over the processes."""
        if any(is_sharded(parameter) for parameter in self._seats):
            return None
        if self.model is not None:
            return Copies(self.model, list(self._handles), self._pieces)
        if num_processes() > 1:
            self.detach()
            raise ConfigError(
                f"this process is one of {num_processes()}, whose gradients have to be averaged as they arrive. Give "
                "FusedBackward the model, before DistributedDataParallel wraps it."
            )
        return None

    def detach(self) -> None:
        """Take all hooks back, and drop sums of micro-batches: training goes on as an ordinary loop.

        Under DDP wrap the model anew: the old wrapper leaves the matrices alone, and its next forward pass is refused.
        """
        for handle in (*self._handles.values(), *getattr(self, "_step_handles", ())):
            handle.remove()
        if (copies := getattr(self, "_copies", None)) is not None:
            copies.leave()
        self._sums.forget()
        self._handles, self._step_handles, self._copies = {}, [], None

    def __enter__(self) -> Self:
        """Nothing: it acts from the start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take all hooks back."""
        self.detach()

    # A gradient has arrived.

    @torch.no_grad()
    def arrived(self, parameter: Tensor) -> None:
        """Take the gradient of a parameter that has just been accumulated: what the hooks call."""
        if not self._is_seated(parameter):
            self._attach()
            if parameter not in self._seats:
                return  # it was taken out of the optimizer
        if self._copies is not None and self._copies.is_ddps(parameter):
            return
        name = name_of(self.optimizer, self._seats[parameter])
        if parameter in self._stepped or (self._copies is not None and self._copies.has(parameter)):
            raise UnsupportedError(
                f"{name} got a second gradient before optimizer.step(), and was stepped with the first. Call "
                "optimizer.step() after each backward pass; say which are micro-batches by accumulating(), "
                "if the method can sum them; checkpoint a layer used twice with use_reentrant=False."
            )
        if parameter.grad is None:
            raise UnsupportedError(
                f"another hook has taken the gradient of {name} before it could be stepped. Leave one of the two out."
            )
        refuse_sparse(parameter.grad, name)
        if self._copies is not None and self._copies.takes(parameter):
            self._copies.offer(parameter)
        elif self._is_accumulating():
            self._pieces.keep(parameter)
        else:
            self._step(parameter)

    def _is_seated(self, parameter: Tensor) -> bool:
        """Whether a parameter is where it was in the optimizer's groups, which anybody may change."""
        groups, (number, index) = self.optimizer.param_groups, self._seats[parameter]
        return number < len(groups) and parameter is next(iter(groups[number]["params"][index : index + 1]), None)

    def _step(self, parameter: Tensor) -> None:
        """Step a parameter with its gradient, and with what is held of it, and free the gradient."""
        if parameter.grad is not None and self._sums.held(parameter) is not None:
            self._sums.hold(parameter)
        self._measure(parameter)
        step_one(self.optimizer, self._seats[parameter])
        # What the pass under way has yet to read of it is refused by autograd then; fused kernels do not say so.
        increment_version(parameter)
        parameter.grad = None
        self._stepped.add(parameter)

    def _measure(self, parameter: Tensor) -> None:
        tensor, norm = self._norm_of(parameter)
        self._meter.take(parameter, tensor, norm)

    def _norm_of(self, parameter: Tensor) -> tuple[Tensor, Norm]:
        held = self._sums.held(parameter)
        tensor = parameter.grad if held is None else held
        assert tensor is not None
        return tensor, Norm.of(tensor, parameter, is_cut=not self._sums.is_whole(parameter))

    # Several backward passes for one step.

    @property
    def can_accumulate(self) -> bool:
        """Whether gradients of micro-batches are summed in less memory than they take whole: GaLore's and SIFT's."""
        return self._sums.are_small

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the backward passes of all micro-batches but the last (or DDP's ``no_sync``, which says as much).

        The gradients of GaLore's matrices are projected, freed and summed in the subspace; a basis that is due is made
        from the first micro-batch. SIFT sums its entries. What trains beside them keeps its gradient. To drop a
        micro-batch call ``optimizer.zero_grad()``: the model's own does not reach the sums.

        Raises:
            UnsupportedError: If the method needs the whole gradient.
        """
        self._sums.refuse()
        before, self._is_inside = self._is_inside, True
        try:
            yield
        finally:
            self._is_inside = before

    def refuse_accumulation(self) -> None:
        """Raise UnsupportedError if the method needs the whole gradient of all micro-batches together."""
        self._sums.refuse()

    def _is_accumulating(self) -> bool:
        return self._is_inside or (self._asks is not None and self._asks())

    # The optimizer's step.

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._attach()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take_rest()
            return None

        def and_take_rest() -> Any:
            loss = closure()
            self._take_rest()
            return loss

        return args[:1], {**kwargs, "closure": and_take_rest}

    @torch.no_grad()
    def _take_rest(self) -> None:
        """Measure and clip what the optimizer itself is about to step."""
        if self._copies is not None and self._pieces.is_unfinished:
            raise UnsupportedError(
                "the last backward pass before optimizer.step() was said to be that of a micro-batch before the last, "
                "so its gradients were not averaged over the processes. Take the last one outside of accumulating() "
                "and of no_sync()."
            )
        for parameter in self._rest():
            if parameter in self._stepped:
                raise UnsupportedError(
                    f"{name_of(self.optimizer, self._seats[parameter])} was stepped as its gradient arrived, and has "
                    "one again: DistributedDataParallel, or code of the loop, has put it there. Give FusedBackward the "
                    "model before DistributedDataParallel wraps it."
                )
            self._measure(parameter)

    def _rest(self) -> list[Tensor]:
        """What the optimizer itself steps, or has just stepped."""
        return [parameter for parameter in self._seats if self._pieces.exists(parameter)]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.clear()
        self._pieces.end_step()
        self._meter.end_step()

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        """A loaded state is one between steps, whatever came before, such as half a backward pass."""
        self._stepped.clear()
        self._pieces.end_step()
        self._meter.end_step()

    # What a loop may want to know.

    @property
    def max_grad_norm(self) -> float | None:
        """Largest norm of each parameter's gradient; may be changed between steps."""
        return self._meter.bound

    @max_grad_norm.setter
    def max_grad_norm(self, bound: float | None) -> None:
        if bound is not None and not (is_number(bound) and 0.0 < float(bound) < math.inf):
            raise ConfigError(f"max_grad_norm must be a number above 0, got {bound!r}. None is no clipping.")
        self._meter.bound = bound
        if bound is not None:
            logger.info(
                "the gradient of each parameter is clipped by itself, to a norm of %g: that of all together is not "
                "known while they arrive",
                bound,
            )

    @property
    def grad_norm(self) -> Tensor:
        """The norm (0-d) of all gradients together, as they were before clipping, from the last ``backward`` on.

        Of gradients that were summed in a subspace it is the norm of the sum there. A collective if parameters are
        sharded.
        """
        rest = ((parameter, *self._norm_of(parameter)) for parameter in self._rest())
        return self._meter.total({p: norm for p, tensor, norm in rest if not self._meter.is_known(p, tensor)})

    def gradient_bytes(self, *, accumulates: bool = False) -> int:
        """Bytes of gradients that are alive at a time in this process, at most.

        The parts of a gradient that comes from several places of the model, as of tied embeddings, are counted where
        FusedBackward was given the model, unless that is sharded.

        Args:
            accumulates: Whether several backward passes go into a step.
        """
        return bytes_alive(self._handles.keys(), self._seats.keys(), self._sums, self.model, accumulates=accumulates)


def _weakly(fused: FusedBackward) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: autograd holds hooks where the garbage collector cannot see a cycle."""
    found = weakref.ref(fused)

    def hook(parameter: Tensor) -> None:
        if (alive := found()) is not None:
            alive.arrived(parameter)

    return hook


def _refuse(optimizer: Any, model: nn.Module | None) -> None:
    """Raise for what is no optimizer or model to work with."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"FusedBackward needs a torch optimizer, got {type(optimizer).__name__}.")
    if fused_on(optimizer) is not None:
        raise ConfigError(
            f"this {type(optimizer).__name__} has a FusedBackward already. Go on with that one, or call its detach()."
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            f"FusedBackward was given a model inside a {type(model).__name__}. Give it the plain model before "
            "DistributedDataParallel wraps it; DataParallel hands over all gradients at once, so use torchrun instead."
        )


def fused_on(optimizer: torch.optim.Optimizer) -> FusedBackward | None:
    """The FusedBackward of an optimizer, if it has one."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, FusedBackward)), None)
