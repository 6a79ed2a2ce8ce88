"""Where restarts fall and how the learning rate rises after them: functions of the optimizer-step number.

ReLoRA's jagged schedule (https://arxiv.org/abs/2307.05695, section 3, and the authors'
``cosine_restarts``): every R steps the rate drops to zero and rises in a few steps to where the
underlying schedule is by then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from fullrank.errors import ConfigError

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]
"""Multiplier of the learning rate after so many optimizer steps (0 for the first one)."""


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """A warm start of some steps, then cycles of equal length, each with a short warm-up.

    A step number counts the optimizer steps taken; the warm start's come first.
    """

    restart_every: int | None
    """Length of a cycle (optimizer steps), R; None: one cycle that never ends."""
    restart_warmup_steps: int = 0
    """Length of the warm-up after a restart and after the warm start (optimizer steps)."""
    warm_start_steps: int = 0
    """Length of the full-rank warm start (optimizer steps)."""
    warm_start_lr_ratio: float = 1.0
    """Learning rate in the warm start relative to that after it."""
    adjust_step: int = 0
    """Steps by which cycles and schedule are ahead, for a start from a checkpoint within a cycle.

    As in the authors' schedule, the cycle that would end in the first R steps goes on for R more."""

    def begins_after(self, step: int) -> bool:
        """Whether a restart falls after so many optimizer steps, before the next one."""
        inside, every = step - self.warm_start_steps, self.restart_every
        return every is not None and inside >= every and (inside + self.adjust_step) % every == 0

    def num_restarts(self, num_steps: int) -> int:
        """Restarts in a run of so many optimizer steps that another step follows."""
        last, every = num_steps - 1 - self.warm_start_steps, self.restart_every
        if every is None or last < every:
            return 0
        return (last + self.adjust_step) // every - (every - 1 + self.adjust_step) // every

    def problems(self) -> list[str]:
        """What is wrong with the lengths, one sentence each."""
        every, found = self.restart_every, []
        for key in ("warm_start_steps", "restart_warmup_steps", "adjust_step"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                found.append(f"{key} must be a whole number of optimizer steps, at least 0, got {value!r}.")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            found.append(f"restart_every must be a whole number of optimizer steps, at least 1, got {every!r}.")
        if found:
            return found
        if every is not None and self.restart_warmup_steps >= every:
            found.append(
                f"restart_warmup_steps must be below restart_every ({every}), got {self.restart_warmup_steps}: the "
                "rate would never come up. Shorten the one or lengthen the other."
            )
        if self.adjust_step and (every is None or self.adjust_step >= every or self.warm_start_steps):
            found.append(
                f"adjust_step must be below restart_every ({every}) and goes without warm_start_steps "
                f"({self.warm_start_steps}), got {self.adjust_step}: it is for starting from a checkpoint in mid-cycle."
            )
        return found

    def schedule(self, base: Schedule, warmup_steps: int, num_training_steps: int) -> Schedule:
        """The jagged form of a schedule: while it rises again, it aims at where ``base`` is at the end of the rise.

        Args:
            base: The schedule without restarts, over all steps.
            warmup_steps: Its own first warm-up, which ``adjust_step`` leaves alone (optimizer steps).
            num_training_steps: Optimizer steps of the run.

        Raises:
            ConfigError: If the lengths do not fit each other.
        """
        self._check_run(warmup_steps, num_training_steps)

        def multiplier(step: int) -> float:
            if step < self.warm_start_steps:
                return base(step) * self.warm_start_lr_ratio
            if step < warmup_steps and not self.warm_start_steps:
                return base(step)
            risen = self._risen(step)
            if risen is None:
                return base(step + self.adjust_step)
            aim = step + self.adjust_step - risen + self.restart_warmup_steps
            return risen / self.restart_warmup_steps * base(aim)

        return multiplier

    def _check_run(self, warmup_steps: int, num_training_steps: int) -> None:
        """Raise ConfigError if a run of this length cannot hold its parts; warn if it holds no restart."""
        first = self.warm_start_steps or (self.restart_every or num_training_steps) - self.adjust_step
        if not 0 <= warmup_steps <= first:
            raise ConfigError(
                f"warmup_steps must be at least 0 and at most {first}, the first step at which the rate falls to zero "
                f"(the end of the warm start, or restart_every - adjust_step), got {warmup_steps}. Shorten it, or "
                "lengthen the warm start or the cycles."
            )
        if self.warm_start_steps >= num_training_steps:
            raise ConfigError(
                f"warm_start_steps must be below the {num_training_steps} optimizer steps of the run, got "
                f"{self.warm_start_steps}: the factors would never train. Shorten it, or lengthen the run."
            )
        if self.restart_every is not None and not self.num_restarts(num_training_steps):
            logger.warning(
                "restart_every is %d, and the run has %d optimizer steps for it: no restart comes before its end, so "
                "this is LoRA. Lower restart_every",
                self.restart_every,
                num_training_steps - self.warm_start_steps,
            )

    def factor(self, step: int) -> float:
        """What multiplies the rate of a schedule that is known by its present value alone."""
        if step < self.warm_start_steps:
            return self.warm_start_lr_ratio
        risen = self._risen(step)
        return 1.0 if risen is None else risen / self.restart_warmup_steps

    def _risen(self, step: int) -> int | None:
        """Steps of the present rise that are done, or None outside of one."""
        inside, every = step - self.warm_start_steps, self.restart_every
        if inside < (every or math.inf):
            rises = self.warm_start_steps > 0 and inside < self.restart_warmup_steps
            return inside if rises else None
        done = (inside + self.adjust_step) % (every or 1)
        return done if done < self.restart_warmup_steps else None


def cosine(step: int, *, num_training_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.1) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr_ratio`` at ``num_training_steps``."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, num_training_steps - warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def jagged_cosine(
    step: int,
    *,
    num_training_steps: int,
    restart_every: int,
    restart_warmup_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    adjust_step: int = 0,
) -> float:
    """The authors' ``cosine_restarts``: its multiplier of the learning rate after so many optimizer steps."""
    cycles = Cycles(restart_every=restart_every, restart_warmup_steps=restart_warmup_steps, adjust_step=adjust_step)

    def base(n: int) -> float:
        return cosine(n, num_training_steps=num_training_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)

    return cycles.schedule(base, warmup_steps, num_training_steps)(step)


class Jagged(LRScheduler):
    """Any scheduler made jagged: it steps as it would alone, and its rates are scaled after each restart."""

    def __init__(self, scheduler: Any, cycles: Cycles) -> None:
        # Not LRScheduler's own: that would wrap optimizer.step again and set the rates itself.
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.cycles = cycles
        self.last_epoch = 0
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._scale()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler on its own rates, then scale them; arguments go to the scheduler."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.scheduler.step(*args, **kwargs)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.last_epoch += 1
        self._scale()

    def _scale(self) -> None:
        factor = self.cycles.factor(self.last_epoch)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """The rates in use, a group each."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, and the rates before scaling."""
        return {"scheduler": self.scheduler.state_dict(), "rates": list(self._rates), "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was saved."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._rates, self.last_epoch = list(state_dict["rates"]), state_dict["last_epoch"]
        self._scale()
