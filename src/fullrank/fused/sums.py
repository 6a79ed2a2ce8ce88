"""Several backward passes for one step: whose gradients can be summed in less memory than they take whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.optimizer import Seat
from fullrank.projected import SummedOptimizer, is_projected
from fullrank.sharding import own_bytes
from fullrank.sparse import is_values


class Sums:
    """What an optimizer sums of its parameters: projected gradients (GaLore), or whole ones.

    Args:
        optimizer: Any.
        seats: Where its parameters are; may change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seats: Mapping[Tensor, Seat]) -> None:
        self._optimizer = optimizer
        self._summed = optimizer if isinstance(optimizer, SummedOptimizer) else None
        self._seats = seats

    @property
    def are_small(self) -> bool:
        """Whether sums take less memory than whole gradients: GaLore's in the subspace, SIFT's of its entries."""
        return self._summed is not None or any(is_values(parameter) for parameter in self._seats)

    def refuse(self) -> None:
        """Raise UnsupportedError if the sum of gradients is needed whole, so that nothing would be freed."""
        if not self.are_small:
            raise UnsupportedError(
                f"{type(self._optimizer).__name__} needs the gradient of all micro-batches together, whole, which "
                "FusedBackward would have to keep. Use micro-batches as large as the batch (gradient checkpointing "
                "makes room), GaLore or SIFT, whose gradients are summed in small, or train without FusedBackward."
            )

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether gradients of this parameter are summed in a subspace."""
        return self._summed is not None and is_projected(parameter, self._group(parameter))

    def held(self, parameter: Tensor) -> Tensor | None:
        """The sum of projected gradients so far, or None."""
        return None if self._summed is None else self._summed.held(parameter)

    def hold(self, parameter: Tensor) -> None:
        """Add the projected gradient of a parameter to what is held of it, and free the gradient."""
        assert self._summed is not None
        self._summed.hold([self._seats[parameter]])
        parameter.grad = None

    def forget(self) -> None:
        """Drop all that is held."""
        if self._summed is not None:
            self._summed.forget()

    def needs_gradient(self, parameter: Tensor) -> bool:
        """Whether ``hold`` would make a basis from the gradient."""
        return (
            self._summed is not None
            and self.is_projected(parameter)
            and self._summed.needs_gradient(self._seats[parameter])
        )

    def is_whole(self, parameter: Tensor) -> bool:
        """Whether each process of a sharded parameter holds all of its sum: of a projection of both sides."""
        return self.held(parameter) is not None and self._group(parameter)["proj_type"] == "full"

    def nothing(self, parameter: Tensor) -> Tensor:
        """Zeros in the shape of what would be held."""
        assert self._summed is not None
        return self._summed.nothing_held(self._seats[parameter])

    def held_bytes(self, parameter: Tensor) -> int:
        """Bytes that are held of a parameter between micro-batches."""
        return own_bytes(self.nothing(parameter) if self.is_projected(parameter) else parameter)

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[self._seats[parameter][0]]
        return group
