"""A process of several: what DDP adds, and what partitioned states take away; formulas on top of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fullrank.communication import Layout
from fullrank.methods import METHODS
from fullrank.partition import divide_fairly
from fullrank.plan.formulas import trained_bytes
from fullrank.plan.network import Network
from fullrank.plan.sharded import sharded
from fullrank.plan.timeline import STEP, Moments
from fullrank.saved_state import bytes_of
from fullrank.sharding import BUCKET

if TYPE_CHECKING:
    from fullrank.plan.step import Work
    from fullrank.plan.usage import Usage


@dataclass(frozen=True)
class Spread:
    """How a run is spread over GPUs, one process each.

    Raises:
        ConfigError: For numbers that do not fit together.
    """

    gpus: int = 1
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    shard_size: int | None = None
    backend: Literal["nccl", "gloo"] = "nccl"
    """What sends: gloo, on CPUs, copies what it scatters."""

    def __post_init__(self) -> None:
        Layout(self.gpus, self.strategy, self.shard_size)

    @property
    def shards(self) -> int:
        """Processes that hold one copy of the model together."""
        return Layout(self.gpus, self.strategy, self.shard_size).shards


def spread(usage: Usage, moments: Moments | None, network: Network, work: Work, over: Spread) -> Usage:
    """What the process needs that needs most, from what one alone would and every moment of its step, where traced."""
    if over.shards > 1:
        return sharded(usage, moments, network, work, over.shards, copies=over.backend == "gloo")
    if over.gpus == 1:
        return usage
    found = usage
    if getattr(work.options, "partition_states", False):
        states = _largest_share(network, work, over.gpus)
        sent = min(BUCKET * 4, -(-usage.weights // over.gpus))  # weights on their way to the others, after the step
        found = _moved(found, states=states - usage.states, other=sent if STEP in usage.where else 0)
        found = replace(found, temporaries=found.temporaries + sent)
    if not work.fused_backward:  # which averages gradients by itself, as they come
        buckets = trained_bytes(network, work)
        found = _moved(replace(found, activations=found.activations + buckets), other=buckets)
    return found


def _moved(usage: Usage, *, states: int = 0, other: int = 0) -> Usage:
    """The same with so many bytes more or less all the time."""
    held = usage.at_peak
    held = replace(held, states=held.states + states, other=held.other + other)
    return replace(usage, states=usage.states + states, at_peak=held)


def _largest_share(network: Network, work: Work, gpus: int) -> int:
    """Bytes of state of the process that keeps most: parameters, the largest first, go to whoever has least."""
    from fullrank.plan.step import quietly

    with quietly():
        optimizer: Any = METHODS[work.method].build(network.whole, work.options).optimizer
    loads = [0] * gpus
    divide_fairly([bytes_of(optimizer.state_spec(p, group)) for _, p, group in optimizer.named()], loads)
    return max(loads)
