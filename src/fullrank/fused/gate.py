"""The hooks of a model's forward pass: they keep nothing alive, and a copy of the model gets none that does anything.

What DDP was told to leave alone it leaves alone for as long as it lives. So where nobody averages those gradients any
more, after the end of a FusedBackward or in a copy of its model, they refuse the old wrapper, under which the
processes' weights would drift apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fullrank.errors import UnsupportedError
from fullrank.sharding import num_processes, wrapper_of
from fullrank.sparse import IGNORED


class Passes(Protocol):
    """Who wants to know of forward passes."""

    def before_forward(self, module: nn.Module) -> None:
        """One begins."""

    def after_forward(self, output: Any) -> None:
        """One has ended."""


class Gate:
    """Tells of a model's forward passes for as long as somebody listens.

    Args:
        names: The parameters that DDP is to leave alone.
        passes: Who listens; None in a copy.
    """

    def __init__(self, names: Sequence[str], passes: Passes | None = None) -> None:
        self.names = tuple(names)
        self._passes: Callable[[], Passes | None] = _nobody if passes is None else weakref.ref(passes)
        self._handles: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """In copies and files: one that nobody listens to."""
        return Gate, (self.names,)

    def open(self, model: nn.Module) -> None:
        """Put the hooks on, and let DDP leave the parameters alone where it wraps the model from now on."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(gate := getattr(hook, "__self__", None), Gate) and gate._passes() is None:
                gate._forget(model)
        setattr(model, IGNORED, [*getattr(model, IGNORED, ()), *self.names])
        self._handles = [model.register_forward_pre_hook(self.before), model.register_forward_hook(self.after)]

    def close(self, model: nn.Module) -> None:
        """Let DDP have the parameters again, where it wraps the model anew; of several processes refuse the old one."""
        self._passes = _nobody
        self._forget(model)
        for handle in self._handles[num_processes() > 1 :]:
            handle.remove()

    def before(self, module: nn.Module, args: Any) -> None:
        """Before a forward pass."""
        if not torch.is_grad_enabled():
            return
        if (passes := self._passes()) is not None:
            passes.before_forward(module)
        elif num_processes() > 1 and (wrapper := wrapper_of(module)) is not None:
            self._forget(module)
            if wrapper.parameters_to_ignore.intersection(self.names).difference(getattr(module, IGNORED)):
                raise UnsupportedError(
                    f"this DistributedDataParallel leaves {len(self.names)} parameters to a FusedBackward that has "
                    "ended, or that was another model's, so nobody averages their gradients. Wrap the model anew: "
                    "DistributedDataParallel(model)."
                )

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward pass."""
        if torch.is_grad_enabled() and (passes := self._passes()) is not None:
            passes.after_forward(output)

    def _forget(self, model: nn.Module) -> None:
        """Take the names back, once: later they may be there for another reason."""
        if not self._is_forgotten:
            self._is_forgotten = True
            setattr(model, IGNORED, [name for name in getattr(model, IGNORED, ()) if name not in self.names])

    _is_forgotten = False


def _nobody() -> None:
    return None
