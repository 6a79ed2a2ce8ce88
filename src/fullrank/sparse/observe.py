"""Tell whoever asks that an optimizer has stepped or loaded a state, whatever its class.

torch has process-wide hooks for steps and none for loading, so ``torch.optim.Optimizer.load_state_dict`` is
wrapped once, when the first observer comes. Observers are held weakly.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Observer(Protocol):
    """What is told."""

    def stepped(self, optimizer: Optimizer) -> None:
        """The optimizer has just stepped."""

    def own_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer is to load in place of a state: of this process, where it is of all."""

    def check_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """The optimizer is about to load a state; raise to refuse it, before anything changes."""

    def loaded(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """The optimizer has loaded a state, given here as it was saved."""


_observers: weakref.WeakSet[Any] = weakref.WeakSet()


def observe(observer: Observer) -> None:
    """Tell this observer of every step and load of every optimizer, as long as it lives."""
    _install()
    _observers.add(observer)


@functools.cache
def _install() -> None:
    def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for observer in list(_observers):
            observer.stepped(optimizer)

    register_optimizer_step_post_hook(stepped)
    original = Optimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
        observers = list(_observers)
        for observer in observers:
            state_dict = observer.own_state(self, state_dict)
        for observer in observers:
            observer.check_load(self, state_dict)
        original(self, state_dict)
        for observer in observers:
            observer.loaded(self, state_dict)

    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
