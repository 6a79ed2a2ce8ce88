"""One weight of which only chosen units train: their values in full precision, their gradient, their record.

The values are entries of the weight itself, held once more in float32 (float64 for float64 weights) as a
parameter that any torch optimizer can step. The dense gradient is gathered into theirs and freed; after
a step they are written back into the weight.

Memory for K chosen entries of a weight in bfloat16: values 4 K, gradient 4 K, index 4 K (entries) bytes on
the device, and 2 K on the host, the entries as they were, from which a small file is written.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import CheckpointError, ConfigError
from fullrank.ops import sparse
from fullrank.ops.sparse import Layout
from fullrank.optimizer import GUEST
from fullrank.sparse.given import parse_units

INDEX, VALUES, BASE, TOUCHED, STEPS = (GUEST + key for key in ("index", "values", "base", "touched", "steps"))
"""Keys of what is kept beside an optimizer's own state of the values, so that both are saved together."""


class SparseWeight:
    """A weight, the units of it that train, and their values.

    ``values`` (K) is the parameter to give to an optimizer. Its attribute ``idx`` is the set of chosen
    units, None before the first backward pass; what is assigned to it before that is the choice.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, layout: Layout, num_units: int, *, keep_base: bool = True
    ) -> None:
        self.name = name
        self.weight = weight
        self.layout = layout
        self.num_units = num_units
        self.keep_base = keep_base
        """Whether what the entries were before they trained is kept, from which a small file is written."""
        values: Any = nn.Parameter(weight.detach().new_zeros(num_units * layout.unit_numel, dtype=self.values_dtype))
        values.idx, values.train_num = None, num_units
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
        self._kept: Tensor | None = None
        self._written = self.values._version
        """Version of the values that the weight holds."""
        self._seen = weight._version
        """Version of the weight that the values were read from or written to."""
        self._touched: Tensor | None = None
        self._base: Tensor | None = None

    def receive(self, grad: Tensor) -> None:
        """Add the chosen part of a dense gradient (shape of the weight) to the values' gradient."""
        compact = sparse.take(grad.detach(), self._index_here(), self.layout).to(self.values.dtype)
        if self._num_held > 1:
            compact.div_(self._num_held)
        if self.values.grad is None:
            self.values.grad = compact
        else:
            self.values.grad.add_(compact)

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
        assert self.pending is not None
        return self.pending, self.num_pending, self._pending_since, self.steps

    def wait_again(self, saved: tuple[Tensor, int, int, int]) -> None:
        """Go on with an open choice that was saved."""
        pending, self.num_pending, self._pending_since, self.steps = saved
        self.pending, self.choosing = pending.to(self.weight.device, copy=True), True

    @torch.no_grad()
    def choose(self, units: Tensor) -> None:
        """Train these units (sorted) from now on; values and moments of those that stay are kept."""
        new = units.to(device=self.weight.device, dtype=self.layout.index_dtype)
        old, size = self.index, self.layout.unit_numel
        values = sparse.take(self.weight.detach(), new, self.layout).to(self.values_dtype)
        if old is not None:
            old = self._index_here()
            stay = sparse.shared_units(old, new)
            values.view(-1, size)[stay[1]] = self.values.detach().view(-1, size)[stay[0]]
            for key, moment in self._moments().items():
                self._state()[key] = sparse.carry(moment, stay, len(new), unit_numel=size)
        self._remember(new)
        if old is None or values.shape != self.values.shape or values.dtype != self.values.dtype:
            self.values.data = values
        else:
            self.values.data.copy_(values)
        self.values.grad = None
        self.index = self.values.idx = new
        self.num_units = self.values.train_num = len(new)
        self.choosing, self.pending, self.num_pending = False, None, 0
        if INDEX in (state := self._state()):
            self.keep_with(state)  # index and moments change together, also for whoever saves before the next step

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
        return parse_units(self.values.idx, self.layout, name=self.name)

    @torch.no_grad()
    def end_step(self) -> None:
        """After an optimizer's step: write the values into the weight, in place."""
        self.steps += 1
        self._num_held = 1
        self._write_back()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Follow a weight that was edited; write values that have changed, as in the middle of an L-BFGS step."""
        if self.weight._version != self._seen:
            self.read_again()
        if self.values._version != self._written:
            self._write_back()

    def _write_back(self) -> None:
        self._written = self.values._version
        if self.index is not None:
            sparse.put_(self.weight.detach(), self._index_here(), self.values.detach(), self.layout)
        self._seen = self.weight._version

    @torch.no_grad()
    def read_again(self) -> None:
        """Take the values from a weight that was loaded, where they are not what they round to already."""
        self._seen = self.weight._version
        if self.index is None:
            return
        found = sparse.take(self.weight.detach(), self._index_here(), self.layout)
        kept = self.values.detach()
        same = found == kept.to(found.dtype)
        self.values.data.copy_(torch.where(same, kept, found.to(kept.dtype)))

    @torch.no_grad()
    def delta(self) -> tuple[Tensor, Tensor]:
        """Every unit that has trained (host), and what training added to its entries (K, host, full precision)."""
        if self.index is None or self._touched is None or self._base is None:
            return torch.empty(0, dtype=self.layout.index_dtype), torch.empty(0, dtype=self.values.dtype)
        touched, size = self._touched.to(self.weight.device), self.layout.unit_numel
        now = sparse.take(self.weight.detach(), touched, self.layout).to(self.values.dtype)
        stay = sparse.shared_units(self._index_here(), touched)
        now.view(-1, size)[stay[1]] = self.values.detach().view(-1, size)[stay[0]]
        return touched.cpu(), now.cpu() - self._base.to(now.dtype)

    def keep_with(self, state: dict[str, Any]) -> None:
        """Put index, values and record beside an optimizer's own state of the values."""
        self._kept = self._index_here()
        state[INDEX], state[VALUES], state[STEPS] = self._kept, self.values.detach(), self.steps
        if self.keep_base:
            state[TOUCHED], state[BASE] = self._touched, self._base

    def refuse_foreign(self, state: dict[str, Any]) -> None:
        """Refuse a state that came to the optimizer without this SIFT knowing of it."""
        if INDEX in state and state[INDEX] is not self._kept:
            raise CheckpointError(
                f"the optimizer was given a saved state of {self.name} past torch.optim.Optimizer.load_state_dict, so "
                "its entries are not the ones that train. Load it through that method, after SIFT was made."
            )

    def check(self, saved: dict[str, Any]) -> None:
        """Refuse a saved state that is not of this weight.

        Raises:
            CheckpointError: If it holds no index, or one for another weight, granularity or density.
        """
        hint = "Build the model and SIFT as they were when it was saved."
        needed = {INDEX, VALUES, STEPS} | ({BASE, TOUCHED} if self.keep_base else set())
        if not needed <= saved.keys():
            raise CheckpointError(
                f"this optimizer state holds no index for {self.name}: it was not trained by SIFT. {hint}"
            )
        index, values = saved[INDEX], saved[VALUES]
        if index.is_floating_point() or values.numel() != index.numel() * self.layout.unit_numel:
            raise CheckpointError(
                f"this optimizer state has {values.numel()} values at {index.numel()} places for {self.name}, whose "
                f"units have {self.layout.unit_numel} entries. {hint}"
            )
        if not index.numel() or int(index.max()) >= self.layout.num_units or int(index.min()) < 0:
            raise CheckpointError(f"this optimizer state has places outside {self.name} {self.layout.shape}. {hint}")

    def reset(self) -> None:
        """Forget the choice, and all that was trained by it, as before the first backward pass."""
        self.index = self.values.idx = self._touched = self._base = self._kept = None
        self.values.grad = self.pending = None
        self.num_pending = self.steps = 0
        self._num_held = 1
        self.choosing = True

    def after_copy(self, original: SparseWeight, optimizer: torch.optim.Optimizer | None) -> None:
        """Mend what a deep copy leaves out: attributes of a parameter, and the copied optimizer."""
        same = original.values.idx is original.index
        self.values.idx = self.index if same else copy.deepcopy(original.values.idx)
        self.values.train_num, self._written = self.num_units, self.values._version
        self.owner = weakref.ref(optimizer) if optimizer is not None else None

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit."""
        device = self.weight.device
        self.index = saved[INDEX].to(device=device, dtype=self.layout.index_dtype, copy=True)
        if self.keep_base:
            same = torch.equal(saved[TOUCHED].cpu(), saved[INDEX].cpu())
            self._touched = self.index if same else saved[TOUCHED].to("cpu", copy=True)
            self._base = saved[BASE].to("cpu", copy=True)
        self.steps = int(saved[STEPS])
        self.values.data = saved[VALUES].to(device=device, dtype=self.values_dtype, copy=True)
        self.values.grad = None
        self.values.idx, self.num_units = self.index, len(self.index)
        self.values.train_num = self.num_units
        self.choosing, self.pending, self.num_pending = False, None, 0
        self._write_back()

    def _remember(self, new: Tensor) -> None:
        """Note what the newly chosen entries are before they train, on the host."""
        if not self.keep_base:
            return
        if self._touched is None or self._base is None:
            self._touched = new
            self._base = sparse.take(self.weight.detach(), new, self.layout).cpu()
            return
        size, touched = self.layout.unit_numel, self._touched.to(new.device)
        first_time = torch.isin(new, touched, invert=True)
        fresh = new[first_time]
        if not len(fresh):
            return
        base = sparse.take(self.weight.detach(), fresh, self.layout).cpu()
        together, order = torch.cat((touched, fresh)).sort()
        self._touched = together.cpu()
        self._base = torch.cat((self._base, base)).view(-1, size)[order.cpu()].view(-1)

    def _index_here(self) -> Tensor:
        """The index on the weight's device, wherever the model was moved to."""
        assert self.index is not None
        if self.index.device != self.weight.device:
            same = self._touched is self.index
            self.index = self.values.idx = self.index.to(self.weight.device)
            self._touched = self.index if same else self._touched
        return self.index

    @property
    def values_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _state(self) -> dict[str, Any]:
        optimizer = self.owner() if self.owner is not None else None
        return optimizer.state[self.values] if optimizer is not None else {}

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's own tensors that have a number for each value."""
        return {
            key: value
            for key, value in self._state().items()
            if torch.is_tensor(value) and not key.startswith(GUEST) and value.shape == self.values.shape
        }
