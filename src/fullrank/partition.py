"""Under DDP, each process keeps the optimizer's state of its share of the parameters: stage 1 of ZeRO.

A parameter has an owner, which refreshes its basis, steps it and sends the weight to the others. State and work fall
with the number of processes, and what is sent grows by the weights once a step (arXiv:1910.02054, section 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.saved_state import own_entries
from fullrank.sharding import all_reduce, broadcast, num_processes, process_number

State = dict[str, Any]


def divide_fairly(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """Who gets each of these things: the largest goes first, each to whoever has least, whose load grows by it."""
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


class Partition:
    """Who keeps the state of which parameter, among all processes of the default group."""

    def __init__(self) -> None:
        self.num = num_processes()
        self.me = process_number()
        self.owners: dict[Tensor, int] = {}
        self._loads = [0] * self.num
        self.has_states = False
        """Whether some process may keep a state."""
        self._is_checked = False
        self._gathered: dict[Tensor, State] | None = None

    def include(self, sizes: Mapping[Tensor, int]) -> None:
        """Give an owner to those of these parameters that have none, by bytes of state, in the same order everywhere.

        The largest go first, each to the process that has least.
        """
        fresh = [parameter for parameter in sizes if parameter not in self.owners]
        owners = divide_fairly([sizes[parameter] for parameter in fresh], self._loads)
        self.owners.update(zip(fresh, owners, strict=True))

    def is_mine(self, parameter: Tensor) -> bool:
        """Whether this process keeps its state."""
        return self.owners[parameter] == self.me

    def check_weights(self) -> None:
        """Before the first step: refuse processes that do not train one model, whose weights would be overwritten.

        Raises:
            UnsupportedError: In all processes.
        """
        if self._is_checked:
            return
        self._is_checked = True
        norms = [torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64) for parameter in self.owners]
        found = torch.stack([norm.to(norms[0].device) for norm in norms]).nan_to_num()
        largest, smallest = all_reduce([found.clone(), -found], kind="max")
        if not torch.equal(largest, -smallest):
            raise UnsupportedError(
                f"partition_states divides the states over all {self.num} processes, and these hold different weights. "
                "Wrap the model in DistributedDataParallel over all of them before the first step, or leave "
                "partition_states out."
            )

    def share_(self) -> None:
        """After a step: every process takes the stepped weights from their owners."""
        self.changed()
        for process in range(self.num):
            stepped = [p for p, owner in self.owners.items() if owner == process and p.grad is not None]
            broadcast([parameter.detach() for parameter in stepped], process)

    def gather_(self, state: Mapping[Tensor, State], specs: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Bring all states together in the first process, on the host, a parameter at a time.

        Args:
            state: This process's states.
            specs: Key -> shape and dtype of the state of each parameter.
        """
        self._gathered = {}
        for parameter, owner in self.owners.items():
            held = own_entries(state.get(parameter) or {}) if owner == self.me else {}
            known = torch.tensor([float(bool(held))], device=parameter.device)
            broadcast([known], owner)
            if not known.item() or owner == 0:
                continue
            tensors = {
                key: held[key].to(parameter.device)
                if held
                else torch.empty(shape, dtype=dtype, device=parameter.device)
                for key, (shape, dtype) in specs[parameter].items()
            }
            broadcast(list(tensors.values()), owner)
            if self.me == 0:
                self._gathered[parameter] = {key: tensor.cpu() for key, tensor in tensors.items()}

    def changed(self) -> None:
        """States were made, stepped or loaded: what was gathered is of another step."""
        self.has_states = True
        self._gathered = None

    @contextmanager
    def whole_state(self, state: MutableMapping[Tensor, State]) -> Iterator[None]:
        """For a time, the state of the first process with those that it has gathered.

        Raises:
            UnsupportedError: In another process, or if none were gathered since the last step.
        """
        if self._gathered is None or self.me != 0:
            raise UnsupportedError(
                f"the optimizer's state is partitioned over {self.num} processes. Call "
                "optimizer.consolidate_state_dict() in all of them, then state_dict() in the first. To load a whole "
                "state call optimizer.load_state_dict(state) in all. torch.distributed.checkpoint does neither."
            )
        before = {parameter: state.get(parameter) for parameter in self._gathered}
        for parameter, gathered in self._gathered.items():
            state[parameter] = {**gathered, **(before[parameter] or {})}
        try:
            yield
        finally:
            for parameter, own in before.items():
                if own is None:
                    del state[parameter]
                else:
                    state[parameter] = own
