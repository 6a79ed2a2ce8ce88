"""ReLoRA: train LoRA factors, merge them into the weights every R steps, start again (arXiv:2307.05695).

Each cycle adds an update of rank r; after k restarts their sum can have rank (k + 1) r. A restart merges,
draws A anew, sets B to zero, resets the moments of the factors, and the learning rate rises again from zero.
It falls between two optimizer steps and leaves the model's function as it was.

Memory for an m x n matrix: as LoRA, gradients r (m + n), two moments 2 r (m + n) numbers.

Departures from the paper: none by default. From the authors' code: the factors train in the first cycle; reset
"zero" zeroes moments and step counter, "magnitude" and "random" drop the same entries of both moments; the
merge, the reset and the learning rate follow one step number, so they cannot drift apart; the merge comes before
the step with rate zero, not after it; sums are taken in float32 and rounded at random into bfloat16 weights;
all that is random follows from seed and step number, so ranks agree and a resumed run is the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fullrank.coded import is_quantized
from fullrank.errors import CheckpointError, ConfigError
from fullrank.factors import (
    RESETS,
    AdapterRequest,
    Cycles,
    FactorConfig,
    Jagged,
    LowRankPair,
    Merge,
    Reset,
    WarmStart,
    cosine,
    find_pairs,
    refuse_left_behind,
    refuse_mixed_types,
    reset_states,
)
from fullrank.factors.training import cycles_of, divide, factor_problems, make_optimizer, planned_state_bytes
from fullrank.methods.base import Built, Method
from fullrank.ops.seeded import seeded
from fullrank.sharding import local, reshard, split_of

logger = logging.getLogger(__name__)

ROUNDINGS = ("stochastic", "nearest")
IDLE = 100
"""Calls without an optimizer step that are no accumulation any more."""
NOTABLE_ERROR = 0.5
"""Share of an update that may be lost in a merge before it is worth a warning."""


@dataclass(frozen=True)
class Restart:
    """What one restart did."""

    step: int
    """Optimizer steps taken before it."""
    num_merged: int
    """Weights merged into."""
    merge: Merge
    """Size of the merged update over all weights, and what of it the weights' type could not hold."""
    reset: Reset
    """Entries of the factors' moments that are zero after it."""

    def __str__(self) -> str:
        return (
            f"restart after step {self.step}: {self.num_merged} weights merged (update {self.merge.update:.4g}, "
            f"rounding error {self.merge.relative_error:.1%}), {self.reset.percent:.1f}% of the factors' moments zero"
        )


class ReLoRA:
    """Restarts for LoRA factors in any training loop.

    Call ``step()`` after every ``optimizer.step()``, and step the scheduler that ``scheduler`` or ``jagged`` makes.
    Under FSDP2 make it after ``fully_shard``; a restart is a collective then, which all processes reach together.

    Args:
        model: A PEFT LoRA model, or a list of ``LowRankPair``; as it trains, so already sharded under FSDP2.
        optimizer: Trains the factors (and whatever else); with a warm start the weights too.
        restart_every: Length of a cycle (optimizer steps); None: never, which is LoRA.
        restart_warmup_steps: Steps in which the learning rate rises after a restart.
        reset: ``zero``: moments and step counter of the factors; ``magnitude``: all but the largest entries;
            ``random``: all but a few at random (both drop the same entries of both moments); ``keep``: nothing.
        reset_ratio: Share of entries that magnitude and random drop (the authors' runs: 0.7 to 0.99).
        adjust_step: Steps by which cycles and schedule are ahead, for a start from a checkpoint within a cycle.
        warm_start_steps: Optimizer steps of full-rank training first, in which the weights train and not their factors.
        warm_start_lr_ratio: Learning rate in these relative to the later one.
        merge_rounding: How a sum becomes a bfloat16 or float16 weight: ``stochastic`` keeps small updates on average.
        seed: Of the new factors, of random resets and of random rounding; use the same on every rank.
        adapter: Name of the PEFT adapter, if the model has several.
        warm_start_only: Further parameters that train in the warm start and freeze after it.

    Raises:
        ConfigError: For an option out of bounds, a model without factors, or an optimizer that does not train them.
        UnsupportedError: For adapters that are no plain product (DoRA), or parameters that are sharded in a way that
            cannot work.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[LowRankPair],
        optimizer: torch.optim.Optimizer,
        *,
        restart_every: int | None,
        restart_warmup_steps: int = 100,
        reset: str = "zero",
        reset_ratio: float = 0.9,
        adjust_step: int = 0,
        warm_start_steps: int = 0,
        warm_start_lr_ratio: float = 1.0,
        merge_rounding: str = "stochastic",
        seed: int = 0,
        adapter: str | None = None,
        warm_start_only: Sequence[Tensor] = (),
    ) -> None:
        self.cycles = Cycles(
            restart_every=restart_every,
            restart_warmup_steps=restart_warmup_steps,
            warm_start_steps=warm_start_steps,
            warm_start_lr_ratio=warm_start_lr_ratio,
            adjust_step=adjust_step,
        )
        self.reset = reset
        self.reset_ratio = reset_ratio
        self.merge_rounding = merge_rounding
        self.seed = seed
        if problems := [*self.cycles.problems(), *restart_problems(reset, reset_ratio, merge_rounding)]:
            raise ConfigError(" ".join(problems))
        found = find_pairs(model, adapter=adapter, training=True) if isinstance(model, nn.Module) else model
        self.pairs = list(found)
        if not self.pairs:
            raise ConfigError("there are no factors to restart: the list of pairs is empty. Give at least one.")
        self.optimizer = optimizer
        self.num_steps = 0
        """Optimizer steps taken."""
        self.last_restart: Restart | None = None
        self._check_optimizer()
        self._model = model if isinstance(model, nn.Module) else None
        self.warm_start = WarmStart(self.pairs, optimizer, warm_start_steps, others=warm_start_only, model=self._model)
        if self._model is not None:
            both = (p for pair in self.pairs for p in (pair.weight, *pair.parameters()))
            refuse_mixed_types(self._model, (*both, *warm_start_only) if warm_start_steps else ())
        self.at_step(0)
        self._has_stepped = False
        self._num_idle = 0
        # accelerate's wrapper does not step while it accumulates, nor a GradScaler where gradients overflow.
        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(self._on_step)

    def _check_optimizer(self) -> None:
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = [pair.name for pair in self.pairs if not held.issuperset(pair.parameters())]
        if missing:
            raise ConfigError(
                f"the optimizer does not hold the factors of {len(missing)} weights, first {missing[0]}. Make it from "
                "the parameters that require a gradient, after the adapter is added."
            )

    def scheduler(self, *, num_training_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.1) -> LambdaLR:
        """The jagged cosine of the paper over all optimizer steps, as a torch scheduler.

        Args:
            num_training_steps: Optimizer steps of the run, the warm start's included.
            warmup_steps: First warm-up (optimizer steps).
            min_lr_ratio: Where the cosine ends, as a share of the peak rate.

        Raises:
            ConfigError: If the lengths do not fit each other.
        """
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ConfigError(f"min_lr_ratio must be between 0 and 1, got {min_lr_ratio!r}.")

        def base(step: int) -> float:
            return cosine(
                step, num_training_steps=num_training_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio
            )

        return LambdaLR(self.optimizer, self.cycles.schedule(base, warmup_steps, num_training_steps))

    def jagged(self, scheduler: Any) -> Jagged:
        """Any other scheduler with this one's restarts: its rate, times the rise after each restart."""
        return Jagged(scheduler, self.cycles)

    def _on_step(self, *_: Any) -> None:
        self._has_stepped = True

    def step(self) -> Restart | None:
        """Count one optimizer step, and restart if a cycle ends here; returns what the restart did.

        A call without a step of the optimizer since the last one does nothing.
        """
        if not self._has_stepped:
            self._num_idle += 1
            if self._num_idle == max(IDLE, self.cycles.restart_every or 0):
                warnings.warn(
                    f"{type(self.optimizer).__name__} has not stepped between {self._num_idle} calls of ReLoRA.step(), "
                    "so nothing restarts. Give ReLoRA the optimizer that steps, and call it after optimizer.step().",
                    stacklevel=2,
                )
            return None
        self._has_stepped = False
        self._num_idle = 0
        return self.after_step(self.num_steps + 1)

    def after_step(self, step: int) -> Restart | None:
        """The same with the number of optimizer steps taken so far, for loops that count."""
        if self.num_steps == 0 or self.cycles.begins_after(step):
            refuse_left_behind(self.pairs)
        self.num_steps = step
        self.warm_start.after_step(step)
        return self.restart() if self.cycles.begins_after(step) else None

    def at_step(self, step: int) -> None:
        """Go on after so many optimizer steps: let train what trains then (weights, or their factors)."""
        self.num_steps = step
        self.warm_start.at_step(step)

    @torch.no_grad()
    def restart(self) -> Restart:
        """Merge all factors, start them again, reset their moments; the model's function stays.

        A collective if they are sharded; what it reports is the same in all processes.
        """
        if self._model is not None:
            reshard(self._model)  # what an evaluation has left gathered would not see the merge
        merged, reset = Merge(0.0, 0.0), Reset(0, 0)
        for number, pair in enumerate(self.pairs):
            drawn = seeded(self.seed, self.num_steps, number)
            split = split_of(pair.weight)
            part = (split.part,) if split is not None and split.is_cut else ()  # of HSDP's copies the same
            rounding = seeded(self.seed, self.num_steps, number, *part, device=local(pair.weight).device)
            merged += pair.merge_(generator=rounding, stochastic=self.merge_rounding == "stochastic")
            pair.reinit_(drawn)
            reset += reset_states(
                self.optimizer, pair.parameters(), how=self.reset, ratio=self.reset_ratio, generator=drawn
            )
        self.last_restart = Restart(self.num_steps, len(self.pairs), merged, reset)
        self._report(self.last_restart)
        return self.last_restart

    def _report(self, restart: Restart) -> None:
        """Log a restart; warn of one that did not do what it is for."""
        logger.info("%s", restart)
        if not restart.reset.num_zero and self.reset != "keep":
            warnings.warn(
                f"the restart after step {restart.step} found no optimizer state of the factors to reset. Is the "
                f"{type(self.optimizer).__name__} given to ReLoRA the optimizer that steps, and does it have moments?",
                stacklevel=4,
            )
        is_lost = self.merge_rounding == "nearest" or any(is_quantized(pair.weight) for pair in self.pairs)
        if is_lost and restart.merge.relative_error > NOTABLE_ERROR:
            warnings.warn(
                f"{restart.merge.relative_error:.0%} of the update merged after step {restart.step} is lost to the "
                "weights' type, whose grid is coarser than that. Use longer cycles (restart_every) or a finer base.",
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of steps: everything else follows from it."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was saved; the model's and the optimizer's are loaded apart."""
        if set(state_dict) != {"num_steps"}:
            raise CheckpointError(
                f"this is not the state of a ReLoRA: it holds {sorted(map(str, state_dict))}, expected num_steps. Load "
                "what relora.state_dict() returned."
            )
        self.at_step(int(state_dict["num_steps"]))


def restart_problems(reset: str, reset_ratio: float, merge_rounding: str) -> list[str]:
    """What is wrong with the options of a restart, one sentence each."""
    problems = []
    for key, value, known in (("reset", reset, RESETS), ("merge_rounding", merge_rounding, ROUNDINGS)):
        if value not in known:
            problems.append(f"{key} must be one of {', '.join(known)}, got {value!r}.")
    if not isinstance(reset_ratio, int | float) or not 0.0 < reset_ratio <= 1.0:
        problems.append(f"reset_ratio must be above 0 and at most 1, got {reset_ratio!r}. 0.9 drops 90%.")
    return problems


@dataclass(frozen=True, kw_only=True)
class ReloraConfig(FactorConfig):
    """Options of ReLoRA."""

    restart_every: int = 1000
    """Length of a cycle (optimizer steps), counted from the end of the warm start."""
    reset: Literal["zero", "magnitude", "random", "keep"] = "zero"
    """The factors' moments: zeroed with their step counter; all but the largest or a random few dropped; or kept."""
    reset_ratio: float = 0.9
    """Share of the moments' entries that magnitude and random drop."""
    adjust_step: int = 0
    """Steps by which cycles and schedule are ahead, for a start from a checkpoint within a cycle."""
    merge_rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How a sum becomes a bfloat16 weight: at random in the mean, or to the nearest number."""


def adapters(config: ReloraConfig) -> AdapterRequest:
    """Factors beside every target matrix."""
    checked_cycles(config)
    return AdapterRequest.of(config, keeps_base=False)


def checked_cycles(config: ReloraConfig) -> Cycles:
    """Warm start and restarts under these options, once all of them are in order."""
    cycles = cycles_of(config, restart_every=config.restart_every, adjust_step=config.adjust_step)
    problems = factor_problems(config, cycles)
    problems += restart_problems(config.reset, config.reset_ratio, config.merge_rounding)
    if problems:
        raise ConfigError(" ".join(problems))
    return cycles


def build(model: nn.Module, config: ReloraConfig) -> Built:
    """AdamW on the factors and what trains beside them, with restarts; the model must have its LoRA layers."""
    cycles = checked_cycles(config)
    parts = divide(model, config)
    relora = ReLoRA(
        model,
        make_optimizer(parts, config),
        **dataclasses.asdict(cycles),
        reset=config.reset,
        reset_ratio=config.reset_ratio,
        merge_rounding=config.merge_rounding,
        seed=config.seed,
        warm_start_only=parts.frozen,
    )
    return Built(
        relora.optimizer,
        after_step=relora.after_step,
        at_step=relora.at_step,
        switches=(config.warm_start_steps,) if config.warm_start_steps else (),
        schedule=cycles.schedule,
    )


METHOD = Method("relora", "2307.05695", ReloraConfig, build, planned_state_bytes, adapters, finetune_lr=2e-4)
