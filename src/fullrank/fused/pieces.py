"""What of a parameter the processes of DDP average: its gradient, or the sum of projected ones, which is small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.fused.sums import Sums


class Pieces:
    """One backward pass after the other, from gradients to steps.

    Args:
        sums: What is summed over micro-batches.
        is_accumulating: Whether the backward pass under way is that of a micro-batch before the last.
        step: Steps a parameter with its gradient, or with what is held of it.
    """

    def __init__(self, sums: Sums, is_accumulating: Callable[[], bool], step: Callable[[Tensor], None]) -> None:
        self._sums = sums
        self._is_accumulating = is_accumulating
        self._step = step
        self.is_unfinished = False
        """Whether the last backward pass was that of a micro-batch before the last."""
        self._has_accumulated = False
        """Whether one since the last step was."""

    def begin_pass(self, *, sends: bool) -> bool:
        """Note that a backward pass begins; whether it is that of a micro-batch before the last.

        Args:
            sends: Whether DDP averages at its end, as it does outside of ``no_sync``.
        """
        self.is_unfinished = not sends or self._is_accumulating()
        if self.is_unfinished:
            self._sums.refuse()
            self._has_accumulated = True
        return self.is_unfinished

    def end_step(self) -> None:
        """Note that the optimizer has stepped."""
        self.is_unfinished = self._has_accumulated = False

    def exists(self, parameter: Tensor) -> bool:
        """Whether there is a gradient of it, or a sum is held."""
        return parameter.grad is not None or self._sums.held(parameter) is not None

    def keep(self, parameter: Tensor) -> None:
        """Take the gradient of a micro-batch before the last: projected and freed, or as it is where it is plain."""
        self._sums.refuse()
        if self._sums.is_projected(parameter):
            self._sums.hold(parameter)

    def needs_average(self, parameter: Tensor) -> bool:
        """Whether a micro-batch before the last makes a basis from its gradient, which must be one in all processes."""
        return self._sums.needs_gradient(parameter)

    def _is_sum(self, parameter: Tensor) -> bool:
        """Whether it is a sum in the subspace that is averaged: the same answer in all processes."""
        return self._has_accumulated and self._sums.is_projected(parameter) and not self._sums.needs_gradient(parameter)

    def piece(self, parameter: Tensor) -> Tensor:
        """What the processes average of it; zeros where there is nothing."""
        if not self._is_sum(parameter):
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if parameter.grad is not None:
            self._sums.hold(parameter)
        held = self._sums.held(parameter)
        return self._sums.nothing(parameter) if held is None else held

    def averaged(self, parameter: Tensor, piece: Tensor) -> None:
        """Go on with the average: to the parameter's step, or to the sum that the next micro-batches add to."""
        if self._is_sum(parameter):
            if self._sums.held(parameter) is None:  # others had a gradient of it: make the basis that they made
                parameter.grad = torch.zeros_like(parameter)
                self._sums.hold(parameter)
            held = self._sums.held(parameter)
            assert held is not None
            held.copy_(piece)
        else:
            parameter.grad = piece
        if self.is_unfinished:
            self.keep(parameter)
        else:
            self._step(parameter)
