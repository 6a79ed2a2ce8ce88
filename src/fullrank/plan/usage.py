"""What one setting needs: its bytes at the moment at which they are most, traced where that can be, else by formula."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fullrank.errors import ConfigError
from fullrank.methods import METHODS
from fullrank.plan import formulas
from fullrank.plan.network import Network
from fullrank.plan.spread import Spread, spread
from fullrank.plan.step import Work, quietly, trace_passes, trace_step
from fullrank.plan.timeline import FIRST, STEADY, STEP, Held, Moments, alike, extended, most, peak
from fullrank.plan.tracker import GRADIENTS, HOST, OTHER, STATES, WEIGHTS, Region, UntraceableError

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

MANY = (2, 3)
"""Sequences of the batches that stand for one with more; one alone is another matter: what is contiguous differs."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides what a process of a run needs."""

    network: Network
    work: Work
    batch_size: int = 1
    """Sequences of a batch of one process."""
    spread: Spread = field(default_factory=Spread)
    total: int | None = None
    """Sequences of a step over all processes, where that is asked for (``trainer.total_batch_size``)."""
    several: int = 1
    """Batches of a step in each process; what a run is told where it is not told the total."""

    @property
    def is_even(self) -> bool:
        """Whether whole batches of all processes make a step."""
        at_once = self.batch_size * self.spread.gpus
        return self.total is None or (self.total >= at_once and self.total % at_once == 0)

    def using(self, **options: Any) -> Setting:
        """The same with other options of the method."""
        return replace(self, work=replace(self.work, options=replace(self.work.options, **options)))


@dataclass(frozen=True)
class Usage:
    """Bytes that a process needs under one setting."""

    weights: int
    """Parameters and buffers, LoRA's factors among them."""
    gradients: int
    """The most that live at a time."""
    states: int
    """Optimizer states, exactly; SIFT's values and places among them."""
    states_on_host: int
    """Bytes of these that lie in the memory of the host."""
    activations: int
    """The most that forward and backward passes hold at a time beside weights, gradients and states."""
    kept: int
    """What a forward pass keeps for the backward pass, of these."""
    temporaries: int
    """The most that an optimizer step holds at a time beside them, a refresh of bases included."""
    at_peak: Held
    """What there is when most is."""
    where: Region
    """When that is: the pass, forward, backward or step, and the place in the model."""
    source: Literal["traced", "formula"] = "traced"
    """Where activations and temporaries come from."""
    why: str | None = None
    """Why they were not traced."""

    @property
    def peak(self) -> int:
        """The most bytes on the device at a time."""
        return self.at_peak.total


class Planner:
    """Finds out what settings need; what was traced once is kept."""

    def __init__(self) -> None:
        self._passes: dict[tuple[Any, ...], Moments | UntraceableError] = {}
        self._steps: dict[tuple[Any, ...], int | UntraceableError] = {}
        self._usages: dict[tuple[Any, ...], Usage] = {}

    def usage(self, setting: Setting) -> Usage:
        """What this setting needs.

        Raises:
            ConfigError: If method, options and network do not go together.
        """
        if not setting.is_even:
            raise ConfigError(
                f"{setting.total} sequences of a step cannot be divided by {setting.spread.gpus} processes with "
                f"{setting.batch_size} at a time. Change trainer.total_batch_size or the batch."
            )
        key = (setting.network.key, repr(setting.work), setting.batch_size, setting.spread)
        if key not in self._usages:
            self._usages[key] = self._find(setting)
        return self._usages[key]

    def _find(self, setting: Setting) -> Usage:
        work, network = setting.work, setting.network
        with quietly():
            states, on_host = state_bytes(network, work)
        try:
            moments = self._moments(setting)
            temporaries = 0 if work.steps_in_backward else self._temporaries(setting)
        except UntraceableError as error:
            logger.warning("activations are estimated by a formula: the step cannot be traced (%s)", error)
            found = replace(formulas.usage(setting, states, on_host), source="formula", why=str(error))
            return self._placed(found, setting, None)
        if not work.steps_in_backward:  # they were traced without an optimizer
            moments = {region: _with_states(rows, states - on_host, on_host) for region, rows in moments.items()}
        gradients = most(moments, GRADIENTS)
        weights = int(next(iter(moments.values()))[0, WEIGHTS])
        held, where = peak(moments)
        if where == (FIRST, STEP):  # which makes the states
            made = min(held.other, states - on_host - held.states)
            held = replace(held, states=held.states + made, other=held.other - made)
        stepping = Held(weights, gradients, states - on_host, temporaries, on_host)
        if not work.steps_in_backward and stepping.total > held.total:
            held, where = stepping, (STEADY, STEP)
        found = Usage(
            weights=weights,
            gradients=gradients,
            states=states,
            states_on_host=on_host,
            activations=most({r: rows for r, rows in moments.items() if r[0] == STEADY and STEP not in r}, OTHER),
            kept=int(moments[STEADY, "backward", "after"][0, OTHER]),
            temporaries=temporaries,
            at_peak=held,
            where=where,
        )
        return self._placed(found, setting, moments)

    def _placed(self, found: Usage, setting: Setting, moments: Moments | None) -> Usage:
        """On the GPUs that there are."""
        return spread(found, moments, setting.network, setting.work, setting.spread)

    def _moments(self, setting: Setting) -> Moments:
        """Every moment of the passes, for all layers and sequences of the setting."""
        network, batch = setting.network, setting.batch_size
        lengths = network.lengths
        if getattr(setting.work.options, "scope", None) == "model":
            lengths = (network.num_layers,)  # each layer is compared with as much as all together may train
        batches = MANY if batch > 1 else (1,)
        found = {(n, b): self._traced(setting, n, b) for n in lengths for b in batches}
        if len(lengths) > 1 and any(not alike(found[lengths[0], b], found[lengths[1], b]) for b in batches):
            lengths = (network.num_layers,)  # layers that seemed alike are not: trace all of them
            found = {(lengths[0], b): self._traced(setting, lengths[0], b) for b in batches}
        by_batch = [
            found[lengths[0], b]
            if len(lengths) == 1
            else extended(found[lengths[0], b], found[lengths[1], b], (lengths[0], lengths[1]), network.num_layers)
            for b in batches
        ]
        if len(batches) == 1:
            return by_batch[0]
        if not alike(by_batch[0], by_batch[1]):
            return self._traced(setting, network.num_layers, batch)
        return extended(by_batch[0], by_batch[1], MANY, batch)

    def _traced(self, setting: Setting, num_layers: int, batch_size: int) -> Moments:
        network, work = setting.network, setting.work

        def trace() -> Moments:
            return trace_passes(network, work, num_layers=num_layers, batch_size=batch_size)

        return _once(self._passes, (network.key, work.key, num_layers, batch_size), trace)

    def _temporaries(self, setting: Setting) -> int:
        """Of a step, affine in the layers where these are alike."""
        network, work = setting.network, setting.work
        lengths = network.lengths
        found = [
            _once(
                self._steps,
                (network.key, work.method, repr(work.options), n),
                partial(trace_step, network, work, num_layers=n),
            )
            for n in lengths
        ]
        if len(found) == 1:
            return found[0]
        share = network.num_layers - lengths[0]
        return max(found[0], found[0] + (found[1] - found[0]) * share // (lengths[1] - lengths[0]))


def state_bytes(network: Network, work: Work) -> tuple[int, int]:
    """Bytes of optimizer states as the method plans them, and how many of them are kept in the memory of the host."""
    method, options = METHODS[work.method], work.options
    total = method.state_bytes(network.whole, options)
    if not getattr(options, "keep_base", False):
        return total, 0
    return total, total - method.state_bytes(network.whole, replace(options, keep_base=False))


def _with_states(rows: NDArray[np.int64], states: int, on_host: int) -> NDArray[np.int64]:
    added = rows.copy()
    added[:, STATES] += states
    added[:, HOST] += on_host
    return added


def _once(
    kept: dict[tuple[Any, ...], Found | UntraceableError], key: tuple[Any, ...], find: Callable[[], Found]
) -> Found:
    """What was found under this key, or what can be found now; what cannot be traced stays so."""
    if key not in kept:
        try:
            kept[key] = find()
        except UntraceableError as error:
            kept[key] = error
    found = kept[key]
    if isinstance(found, UntraceableError):
        raise found
    return found
