"""One weight of which only chosen units train: their values in full precision, their gradient, their record.

The values are entries of the weight itself, held once more in float32 (float64 for float64 weights) as a
parameter that any torch optimizer can step. The dense gradient is gathered into theirs and freed; after
a step they are written back into the weight.

Memory for K chosen entries of a weight in bfloat16: values 4 K, gradient 4 K, index 4 K (entries) bytes on
the device, and 2 K on the host, the entries as they were, from which a small file is written.

Where the weight is spread over processes by its rows, each process works on its own, and what is kept is spread alike.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fullrank import moments
from fullrank.errors import ConfigError
from fullrank.ops import sparse
from fullrank.ops.sparse import Layout
from fullrank.saved_state import GUEST
from fullrank.sharding import is_sharded, local, make_state, split_of, spread, whole
from fullrank.sparse.given import parse_units
from fullrank.sparse.saved import INDEX, keep_with
from fullrank.sparse.settings import values_shape


def is_values(parameter: Tensor) -> bool:
    """Whether a parameter holds the values of chosen entries: its gradients are gathered, and it acts on a step."""
    return hasattr(parameter, "train_num")


class SparseWeight:
    """A weight, the units of it that train, and their values.

    ``values`` (K) is the parameter to give to an optimizer. Its attribute ``idx`` is the set of chosen
    units, None before the first backward pass; what is assigned to it before that is the choice. Where each row has the
    same number of chosen entries, both are M x k, ``idx`` the columns of each row.

    Args:
        name: Of the weight.
        weight: A plain one, or a DTensor whose rows are spread over processes.
        layout: How the whole weight is divided into units.
        num_units: How many units train; of each row, where all rows have the same number.
        keep_base: Keep what the entries were before they trained, from which a small file is written.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, layout: Layout, num_units: int, *, keep_base: bool = True
    ) -> None:
        self.name = name
        self.weight = weight
        self.layout = layout
        self.num_units = num_units
        self.keep_base = keep_base
        self.split = split_of(weight, name=name)
        self.own_layout = dataclasses.replace(layout, shape=tuple(local(weight).shape))
        """How what this process holds of the weight is divided."""
        self.how = "rows" if self.split is not None and self.split.dim == 0 else "whole"
        shape = values_shape(layout, num_units)
        values: Any = nn.Parameter(make_state(shape, self.values_dtype, weight, self.split, self.how))
        values.idx, values.train_num = None, num_units * (layout.rows if layout.per_row else 1)
        self.values = values
        self.index: Tensor | None = None
        self.by_hand = False
        self.steps = 0
        """Optimizer steps so far."""
        self.owner: weakref.ref[torch.optim.Optimizer] | None = None
        self.pending: Tensor | None = None
        """Dense gradient of the batches of a choice that is under way."""
        self.num_pending = 0
        self.choosing = True
        self._pending_since = 0
        self._num_held = 1
        """Steps whose gradients the step at hand takes together, as their mean."""
        self.kept: Tensor | None = None
        """The index that is beside an optimizer's state."""
        self._written = local(self.values)._version
        """Version of the values that the weight holds."""
        self._seen = local(weight)._version
        """Version of the weight that the values were read from or written to."""
        self.touched: Tensor | None = None
        """Units that have ever trained, as the index is kept; by their numbers once they are no longer the index."""
        self.base: Tensor | None = None
        """What these were before they trained: on the host, or spread as the values are."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weight."""
        return self.weight.dtype

    @property
    def leaf(self) -> Tensor:
        """The tensor that the weight's gradient arrives at."""
        return self.weight

    def here(self) -> Tensor:
        """What this process holds of the weight."""
        return local(self.weight).detach()

    def receive(self, grad: Tensor) -> None:
        """Add the chosen part of a dense gradient (of what this process holds) to the values' gradient."""
        compact = self.as_values(sparse.take(grad.detach(), self._units(), self.own_layout).to(self.values.dtype))
        if self._num_held > 1:
            local(compact).div_(self._num_held)
        if self.values.grad is None:
            self.values.grad = compact
        else:
            local(self.values.grad).add_(local(compact))

    def hold(self, grad: Tensor) -> None:
        """Add a dense gradient to what an open choice will be made by."""
        if self.pending is None:
            self.pending, self._pending_since = grad.detach(), self.steps
        else:
            self.pending.add_(grad)
        self.num_pending += 1

    def let_go(self) -> None:
        """Forget the gradient held for an open choice."""
        self.pending, self.num_pending = None, 0

    def settle(self, units: Tensor) -> None:
        """Close an open choice with these units, and use what was held: its mean over the steps that waited for it."""
        held = self.pending
        assert held is not None
        self.choose(units)
        self._num_held = self.steps - self._pending_since + 1
        self.receive(held)

    def waiting(self) -> tuple[Tensor, int, int, int]:
        """What to save of a choice that is still open."""
        pending = self.pending
        assert pending is not None
        if self.split is not None:
            pending = spread(pending, self.layout.shape, self.split, "like")
        return pending, self.num_pending, self._pending_since, self.steps

    def wait_again(self, saved: tuple[Tensor, int, int, int]) -> None:
        """Go on with an open choice that was saved."""
        pending, self.num_pending, self._pending_since, self.steps = saved
        part = local(pending) if is_sharded(pending) else self.own_rows(pending)
        self.pending, self.choosing = part.to(self.weight.device, copy=True), True

    @torch.no_grad()
    def choose(self, units: Tensor) -> None:
        """Train these units from now on; values and moments of those that stay are kept.

        Args:
            units: Of what this process holds: sorted numbers, or the sorted columns of each row.
        """
        new = units.to(device=self.weight.device, dtype=self.layout.index_dtype)
        if self.split is not None and new.shape != (self.own_layout.rows, self.num_units):
            raise ConfigError(
                f"{self.name} is spread over processes, so {self.num_units} entries of each row train, got units of "
                f"shape {tuple(new.shape)}. Choose so many columns of each row."
            )
        old = None if self.index is None else self._units()
        self.num_units = new.shape[-1]
        numbers, size = sparse.flat_units(new, self.own_layout), self.layout.unit_numel
        values = sparse.take(self.here(), numbers, self.own_layout).to(self.values_dtype)
        if old is not None:
            stay = sparse.shared_units(old, numbers)
            values.view(-1, size)[stay[1]] = local(self.values).detach().view(-1, size)[stay[0]]
            for key, moment in self._moments().items():
                carried = sparse.carry(moment, stay, len(numbers), unit_numel=size)
                self._keep_moment(key, self.as_values(carried))
        kept = self.as_values(new)
        self._remember(kept, numbers)
        fits = values.numel() == local(self.values).numel() and values.dtype == self.values.dtype
        if self.split is None and (old is None or not fits):
            self.values.data = self.as_values(values)
        else:
            local(self.values).data.view(-1).copy_(values)
        self.values.grad = None
        self.index = self.values.idx = kept
        self.values.train_num = kept.numel()
        self.choosing, self.pending, self.num_pending = False, None, 0
        if INDEX in (state := self._state()):
            keep_with(self, state)  # index and moments change together, also for whoever saves before the next step

    def given_units(self) -> Tensor | None:
        """The units assigned to ``values.idx`` by hand, checked and sorted, or None.

        Raises:
            ConfigError: If they have the wrong shape, are out of bounds or repeated, or came too late.
        """
        if self.values.idx is self.index:
            return None
        if self.index is not None:
            raise ConfigError(
                f"idx of {self.name} was assigned after the first backward pass, when its entries were training "
                "already. Assign it before."
            )
        self.by_hand = True
        return self.own_rows(parse_units(self.values.idx, self.layout, name=self.name))

    @torch.no_grad()
    def end_step(self) -> None:
        """After an optimizer's step: write the values into the weight, in place."""
        self.steps += 1
        self._num_held = 1
        self.write_back()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Follow a weight that was edited; write values that have changed, as in the middle of an L-BFGS step."""
        if local(self.weight)._version != self._seen:
            self.read_again()
        if local(self.values)._version != self._written:
            self.write_back()

    def write_back(self) -> None:
        """Overwrite the chosen entries of the weight by the values."""
        self._written = local(self.values)._version
        if self.index is not None:
            sparse.put_(self.here(), self._units(), local(self.values).detach().view(-1), self.own_layout)
        self._seen = local(self.weight)._version

    @torch.no_grad()
    def read_again(self) -> None:
        """Take the values from a weight that was loaded, where they are not what they round to already."""
        self._seen = local(self.weight)._version
        if self.index is None:
            return
        found = sparse.take(self.here(), self._units(), self.own_layout)
        kept = local(self.values).data.view(-1)
        same = found == kept.to(found.dtype)
        kept.copy_(torch.where(same, kept, found.to(kept.dtype)))

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor]:
        """Every unit that has trained (host), and what training added to its entries (K, host, full precision).

        Both are of the whole weight; a collective, if that is spread over processes.
        """
        if self.index is None or self.touched is None or self.base is None:
            return torch.empty(0, dtype=self.layout.index_dtype), torch.empty(0, dtype=self.values.dtype)
        if self.split is not None:  # what has trained is what trains
            change = spread(
                local(self.values).detach() - local(self.base).to(self.values.dtype),
                self.values.shape,
                self.split,
                self.how,
            )
            return sparse.flat_units(whole(self.index), self.layout).cpu(), whole(change).view(-1).cpu()
        touched, size = self._touched_units(self.weight.device), self.layout.unit_numel
        now = sparse.take(self.here(), touched, self.layout).to(self.values.dtype)
        stay = sparse.shared_units(self._units(), touched)
        now.view(-1, size)[stay[1]] = self.values.detach().view(-1, size)[stay[0]]
        return touched.cpu(), now.cpu() - self.base.view(-1).to(now.dtype)

    def reset(self) -> None:
        """Forget the choice, and all that was trained by it, as before the first backward pass."""
        self.index = self.values.idx = self.touched = self.base = self.kept = None
        self.values.grad = self.pending = None
        self.num_pending = self.steps = 0
        self._num_held = 1
        self.choosing = True

    def after_copy(self, original: SparseWeight, optimizer: torch.optim.Optimizer | None) -> None:
        """Mend what a deep copy leaves out: attributes of a parameter, and the copied optimizer."""
        same = original.values.idx is original.index
        self.values.idx = self.index if same else copy.deepcopy(original.values.idx)
        self.values.train_num, self._written = original.values.train_num, local(self.values)._version
        self.owner = weakref.ref(optimizer) if optimizer is not None else None

    def _remember(self, new: Tensor, numbers: Tensor) -> None:
        """Note what the newly chosen entries are before they train, on the host; a spread weight's on the device."""
        if not self.keep_base:
            return
        if self.touched is None or self.base is None:
            base = self.as_values(sparse.take(self.here(), numbers, self.own_layout))
            self.touched, self.base = new, base if self.split is not None else base.cpu()
            return
        size, touched = self.layout.unit_numel, self._touched_units(numbers.device)
        first_time = torch.isin(numbers, touched, invert=True)
        fresh = numbers[first_time]
        if not len(fresh):
            return
        base = sparse.take(self.here(), fresh, self.layout).cpu()
        together, order = torch.cat((touched, fresh)).sort()
        self.touched = together.cpu()
        self.base = torch.cat((self.base.view(-1), base)).view(-1, size)[order.cpu()].view(-1)

    def _units(self) -> Tensor:
        """Sorted numbers of the chosen units of what this process holds."""
        return sparse.flat_units(local(self.index_here()), self.own_layout)

    def _touched_units(self, device: torch.device) -> Tensor:
        assert self.touched is not None
        touched = self.touched.to(device)
        return sparse.flat_units(touched, self.layout) if touched.ndim == 2 else touched

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a whole tensor."""
        return self.split.rows(tensor) if self.split is not None and self.split.dim == 0 else tensor

    def as_values(self, part: Tensor) -> Tensor:
        """Numbers of this process's chosen entries or units, in the shape of the values and spread as they are."""
        if not self.layout.per_row:
            return part
        part = part.view(self.own_layout.rows, self.num_units)
        if self.split is None:
            return part
        return spread(part, (self.layout.rows, self.num_units), self.split, self.how)

    def index_here(self) -> Tensor:
        """The index on the weight's device, wherever the model was moved to."""
        assert self.index is not None
        if self.index.device != self.weight.device:
            same = self.touched is self.index
            self.index = self.values.idx = self.index.to(self.weight.device)
            self.touched = self.index if same else self.touched
        return self.index

    @property
    def values_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def _state(self) -> dict[str, Any]:
        optimizer = self.owner() if self.owner is not None else None
        return optimizer.state[self.values] if optimizer is not None else {}

    def _moments(self) -> dict[str, Tensor]:
        """What this process holds of the optimizer's own tensors that have a number for each value."""
        own = {k: local(v) for k, v in self._state().items() if torch.is_tensor(v) and not k.startswith(GUEST)}
        shape = local(self.values).shape
        return {key: moments.read(own, key) for key, value in own.items() if value.shape == shape}

    def _keep_moment(self, key: str, values: Tensor) -> None:
        """Put a moment, of another size perhaps, into the optimizer's state, in the form that it has there."""
        state = self._state()
        if not moments.is_coded(state, key):
            state[key] = values
            return
        flat = state[key + moments.SCALE].ndim == 1
        codes = moments.coded(key, local(values), flat=flat)
        for name, found in codes.items():
            state[name] = found if self.split is None else spread(found, state[name].shape, self.split, self.how)
