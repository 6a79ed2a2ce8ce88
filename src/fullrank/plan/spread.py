"""A process of several: what DDP adds, what partitioned states and FSDP2 take away. Formulas, on top of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fullrank.communication import Layout
from fullrank.errors import UnsupportedError
from fullrank.methods import METHODS
from fullrank.plan.formulas import trained_bytes
from fullrank.plan.network import Network
from fullrank.plan.timeline import Held
from fullrank.projected.training import WAVE
from fullrank.sharding import BUCKET
from fullrank.train.sharded import blocks_of

if TYPE_CHECKING:
    from fullrank.plan.step import Work
    from fullrank.plan.usage import Usage

AHEAD = 2
"""Layers whose weights FSDP2 has gathered at a time: the one at work, and the next."""


@dataclass(frozen=True)
class Spread:
    """How a run is spread over GPUs, one process each.

    Raises:
        ConfigError: For numbers that do not fit together.
    """

    gpus: int = 1
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    shard_size: int | None = None

    def __post_init__(self) -> None:
        Layout(self.gpus, self.strategy, self.shard_size)

    @property
    def shards(self) -> int:
        """Processes that hold one copy of the model together."""
        return Layout(self.gpus, self.strategy, self.shard_size).shards


def spread(usage: Usage, network: Network, work: Work, over: Spread) -> Usage:
    """What the process needs that needs most, from what one alone would."""
    if over.shards > 1:
        return _sharded(usage, network, work, over.shards)
    if over.gpus == 1:
        return usage
    found = usage
    if getattr(work.options, "partition_states", False):
        states = _largest_share(network, work, over.gpus)
        found = _moved(found, states=states - usage.states)
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
    sizes = [
        sum(_numel(shape) * dtype.itemsize for shape, dtype in optimizer.state_spec(parameter, group).values())
        for _, parameter, group in optimizer.named()
    ]
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


def _sharded(usage: Usage, network: Network, work: Work, shards: int) -> Usage:
    """FSDP2: weights, gradients and states are cut; layers are gathered as they are needed, all else for a pass."""
    if work.is_sparse and work.options.scope != "row":
        raise UnsupportedError(
            f"fsdp2 cuts weights into rows, and scope {work.options.scope} chooses over whole ones. Use row."
        )
    if getattr(work.options, "basis", None) == "svd":
        raise UnsupportedError("basis svd needs whole gradients, and fsdp2 cuts them. Set method.basis power.")
    if work.quantization is not None:
        raise UnsupportedError("fsdp2 cannot cut a base of codes (model.quantization). Use ddp, or a base in bfloat16.")
    blocks = blocks_of(network.whole)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    around = sum(_bytes(p) for p in network.whole.parameters() if p not in inside)
    layer = max((sum(map(_bytes, block.parameters())) for block in blocks), default=0)
    own = sum(-(-p.shape[0] // shards) * (p.numel() // max(1, p.shape[0])) * p.element_size()
              for p in network.whole.parameters() if p.ndim)  # fmt: skip
    factors = usage.weights - sum(map(_bytes, network.whole.parameters()))
    weights = own + -(-max(0, factors) // shards)
    trained = trained_bytes(network, work)
    share = trained / max(1, usage.weights)
    states, on_host = -(-usage.states // shards), -(-usage.states_on_host // shards)
    gathered = around + AHEAD * layer
    gradients = -(-trained // shards)
    whole_gradients = round(gathered * min(1.0, share))  # before they are scattered
    has_bases = hasattr(work.options, "update_proj_gap")
    sent = 2 * min(4 * BUCKET, usage.states)  # buffers in and out
    temporaries = min(4 * WAVE, usage.states) + sent if has_bases else usage.temporaries
    in_pass = Held(weights, gradients, states - on_host, usage.activations + gathered + whole_gradients, on_host)
    in_step = Held(weights, gradients, states - on_host, temporaries, on_host)
    held, where = max(((in_pass, ("steady", "backward")), (in_step, ("steady", "step"))), key=lambda one: one[0].total)
    return replace(
        usage,
        weights=weights,
        gradients=gradients,
        states=states,
        states_on_host=on_host,
        activations=in_pass.other,
        temporaries=temporaries,
        at_peak=held,
        where=where,
    )


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _numel(shape: Any) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
