"""A process of FSDP2: what it keeps of weights, gradients and states, and what is whole for a while.

Formulas on top of the moments of one process, whose activations are those of its own sequences. As torch does it: what
lies around the layers (embeddings, norm, head) is gathered first and whole to the end of the backward pass; a layer
for its time, and another is on its way. What is gathered lies twice for a while, in the buffer of all processes and as
weights. Gradients are whole until all of a layer, or of what is around them, are there; then they are copied into a
buffer that is scattered, which stays until the next one is filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fullrank.errors import UnsupportedError
from fullrank.ops.subspace import projects_rows
from fullrank.plan.formulas import factor_bytes, trained_bytes
from fullrank.plan.network import Network
from fullrank.plan.timeline import STEADY, STEP, Held, Moments
from fullrank.plan.tracker import GRADIENTS, OTHER, Region
from fullrank.projected.training import WAVE
from fullrank.sharding import BUCKET, own_bytes
from fullrank.train.sharded import blocks_of

if TYPE_CHECKING:
    from fullrank.plan.step import Work
    from fullrank.plan.usage import Usage


def sharded(usage: Usage, moments: Moments | None, network: Network, work: Work, shards: int, *, copies: bool) -> Usage:
    """What one of so many processes needs.

    Args:
        usage: Of one process alone.
        moments: Of its passes; None: they could not be traced.
        network: Of the run.
        work: Of the run.
        shards: Processes that hold one copy of the model together.
        copies: Whether what is scattered is copied once more, as gloo does; NCCL does not.

    Raises:
        UnsupportedError: If a run would be refused: for a choice, a basis or a base that cannot be cut.
    """
    _refuse(work)
    trained = trained_bytes(network, work)
    weights = -(-usage.weights // shards)
    states, on_host = -(-usage.states // shards), -(-usage.states_on_host // shards)
    passes = _Passes(_parts(network, work), network.num_layers, shards, work.accumulates, copies)
    found = _traced(moments) or _estimated(usage)
    lived = list(passes.moments(found, fused=work.fused_backward))
    other, kept, where = max(lived, key=lambda one: one[0] + one[1])
    held = Held(weights, kept, states - on_host, other, on_host)
    temporaries = usage.temporaries
    if hasattr(work.options, "update_proj_gap"):
        wave = _wave(network, work, shards)
        temporaries = -(-usage.temporaries // shards) + min(4 * WAVE, wave) + 2 * min(4 * BUCKET, wave)
    stepping = Held(weights, -(-trained // shards), states - on_host, temporaries, on_host)
    is_step = stepping.total > held.total
    return replace(
        usage,
        weights=weights,
        gradients=-(-trained // shards),
        states=states,
        states_on_host=on_host,
        activations=max(one[0] for one in lived),
        temporaries=temporaries,
        at_peak=stepping if is_step else held,
        where=(STEADY, STEP) if is_step else (STEADY, where),
    )


@dataclass(frozen=True)
class _Parts:
    """Bytes of what is gathered, and scattered, at once."""

    around: int
    """Weights around the layers."""
    layer: int
    """Weights of a layer, the largest."""
    around_grads: int
    """Gradients around the layers."""
    late_grads: int
    """Those of them that come after those of the layers: of embeddings that are not the head."""
    layer_grads: int
    kept_grads: int
    """Of a layer's what stays until the step."""
    last: int
    """The largest gradient around the layers, one of which is freed late."""


@dataclass(frozen=True)
class _Passes:
    """A forward and a backward pass of one process of FSDP2."""

    parts: _Parts
    num_layers: int
    shards: int
    accumulates: bool
    copies: bool

    def moments(self, found: dict[str, _Rows], *, fused: bool) -> Iterator[tuple[int, int, str]]:
        """What lives beside weights and states, what of gradients is kept, and the direction, at each moment."""
        yield from self._forward(found)
        yield from self._backward(found, fused)

    def _forward(self, found: dict[str, _Rows]) -> Iterator[tuple[int, int, str]]:
        around, layer = self.parts.around, self.parts.layer
        kept = self.num_layers * self._cut(self.parts.kept_grads) if self.accumulates else 0
        for place, entering, within in (
            ("forward before", 2 * around, 2 * around),
            ("forward first", 2 * (around + layer), around + 2 * layer),
            ("forward last", around + 3 * layer, around + 2 * layer),
            ("forward behind last", around + layer, around + layer),
        ):
            if (rows := found.get(place)) is not None:
                yield int(rows.others[0]) + entering, kept, "forward"
                yield int(rows.others.max()) + within, kept, "forward"

    def _backward(self, found: dict[str, _Rows], fused: bool) -> Iterator[tuple[int, int, str]]:
        parts, num = self.parts, self.num_layers
        around, layer, scattered = parts.around, parts.layer, parts.layer_grads
        own = 0 if fused else self._cut(parts.kept_grads)
        early = parts.around_grads - parts.late_grads
        end = num * own  # kept in the end, and from the beginning on where gradients are accumulated
        if (rows := found.get("backward after")) is not None:
            coming = np.minimum(np.maximum.accumulate(rows.gradients), early)
            yield int((rows.others + coming).max()) + around + layer, end if self.accumulates else 0, "backward"
        for number, rows in _layers(found, num):
            kept = end if self.accumulates else (num - 1 - number) * own
            before = scattered if number < num - 1 else 0  # the buffer of the layer before
            ahead = layer if number else 0  # the next layer's, on its way
            coming = np.full_like(rows.others, scattered)
            if not (fused or self.accumulates):
                coming = np.minimum(rows.gradients - rows.gradients[0], scattered)
            yield int((rows.others + coming).max()) + around + layer + ahead + early + before, kept, "backward"
            yield int(rows.after) + around + ahead + early + self._scatter(scattered), kept, "backward"
        if (rows := found.get("backward before")) is not None:
            yield int(rows.others.max()) + around + scattered + parts.around_grads, end, "backward"
        yield found["backward end"].after + self._scatter(parts.around_grads), end, "backward"

    def _scatter(self, grads: int) -> int:
        """The most while gradients are scattered: beside the buffer they, or what is left and one of them."""
        largest = min(grads, self.parts.last)
        return max(2 * grads, grads + self._cut(grads) + largest + (grads if self.copies else 0))

    def _cut(self, size: int) -> int:
        return -(-size // self.shards)


@dataclass(frozen=True)
class _Rows:
    """The moments of one process in a stretch of its passes."""

    others: NDArray[np.int64]
    """All but weights, gradients and states."""
    gradients: NDArray[np.int64]
    after: int
    """Of all else, what is left right behind it."""


def _layers(found: dict[str, _Rows], num: int) -> Iterator[tuple[int, _Rows]]:
    """Layers by number, and their moments in a backward pass: what lives is affine in the number between two ends."""
    if (first := found.get("backward first")) is None:
        return
    yield 0, first
    if (last := found.get("backward last")) is None:
        return
    share = (int(last.others[0]) - int(first.others[0])) // (num - 1)
    """Bytes that the forward pass has left for one layer."""
    last = replace(last, after=int(last.others[0]) - share)
    yield num - 1, last
    if num > 2:
        yield 1, replace(first, others=first.others + share, after=int(first.others[0]))
        yield num - 2, replace(last, others=last.others - share, after=last.after - share)


def _traced(moments: Moments | None) -> dict[str, _Rows] | None:
    """Direction and place -> the moments there."""
    if moments is None:
        return None
    found = {region: rows for region, rows in moments.items() if region[0] == STEADY and STEP not in region}
    order: list[Region] = [
        *((STEADY, "forward", place) for place in ("before", "first", "last", "behind last")),
        *((STEADY, "backward", place) for place in ("after", "last", "first", "before", "end")),
    ]
    there = [region for region in order if region in found]
    behind = dict(pairwise(there))
    return {
        " ".join(region[1:]): _Rows(
            found[region][:, OTHER], found[region][:, GRADIENTS], int(found[behind.get(region, region)][0, OTHER])
        )
        for region in there
    }


def _estimated(usage: Usage) -> dict[str, _Rows]:
    """The same by formula: activations at both ends of the backward pass."""
    none = np.zeros(1, dtype=np.int64)
    full = _Rows(none + usage.activations, none, 0)
    return {"backward after": full, "backward first": _Rows(none, none, 0), "backward end": _Rows(none, none, 0)}


def _parts(network: Network, work: Work) -> _Parts:
    """Bytes of what is around the layers, and of a layer."""
    model, num = network.whole, network.num_layers
    blocks = blocks_of(model)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    outside = {parameter for parameter in model.parameters() if parameter not in inside}
    factors, trained = factor_bytes(network, work), trained_bytes(network, work)
    around = sum(map(own_bytes, outside))
    layer = max((sum(map(own_bytes, block.parameters())) for block in blocks), default=0)
    around_grads = min(around, max(0, trained - factors)) if factors else around
    if work.is_sparse:
        around_grads = 0
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    is_late = head is None or head.weight is not embeddings.weight
    late = min(around_grads, own_bytes(embeddings.weight)) if is_late else 0
    layer_grads = factors // num if factors else layer
    return _Parts(
        around=around,
        layer=layer + factors // num,
        around_grads=around_grads,
        late_grads=late,
        layer_grads=layer_grads,
        kept_grads=trained // num if work.is_sparse else layer_grads,
        last=max(map(own_bytes, outside), default=0),
    )


def _refuse(work: Work) -> None:
    if work.is_sparse and work.options.scope != "row":
        raise UnsupportedError(
            f"fsdp2 cuts weights into rows, and scope {work.options.scope} chooses over whole ones. Use row."
        )
    if getattr(work.options, "basis", None) == "svd":
        raise UnsupportedError("basis svd needs whole gradients, and fsdp2 cuts them. Set method.basis power.")
    if work.quantization is not None:
        raise UnsupportedError("fsdp2 cannot cut a base of codes (model.quantization). Use ddp, or a base in bfloat16.")


def _wave(network: Network, work: Work, shards: int) -> int:
    """Bytes of the low-rank gradients and joined bases of all matrices."""
    total, options = 0, work.options
    for name, weight in network.whole.named_parameters():
        if weight.ndim < 2 or not any(pattern in name for pattern in options.target_modules):
            continue
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        if projects_rows((rows, columns), options.proj_type):
            rows, columns = columns, rows
        total += (-(-rows // shards) + columns) * options.rank * 4
    return total
