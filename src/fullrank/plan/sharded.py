"""A process of FSDP2: what it keeps of weights, gradients and states, and what is whole for a while.

Formulas on top of the moments of one process: activations are those of its own sequences. Whole are the weights around
the layers (embeddings, norm, head), from the first forward pass on, and those of a few layers at a time; the gradients
of both until they are scattered, and once more as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fullrank.errors import UnsupportedError
from fullrank.ops.subspace import projects_rows
from fullrank.plan.formulas import factor_bytes, trained_bytes
from fullrank.plan.network import Network
from fullrank.plan.timeline import STEADY, STEP, Held, Moments
from fullrank.plan.tracker import GRADIENTS, OTHER
from fullrank.projected.training import WAVE
from fullrank.sharding import BUCKET, own_bytes
from fullrank.train.sharded import blocks_of

if TYPE_CHECKING:
    from fullrank.plan.step import Work
    from fullrank.plan.usage import Usage

AHEAD = 2
"""Layers that are gathered at a time: the one at work, and the next."""


def sharded(usage: Usage, moments: Moments | None, network: Network, work: Work, shards: int) -> Usage:
    """What one of so many processes needs.

    Raises:
        UnsupportedError: If a run would be refused: for a choice, a basis or a base that cannot be cut.
    """
    _refuse(work)
    around, layer = _sizes(network)
    factors, trained = factor_bytes(network, work), trained_bytes(network, work)
    plain = sum(
        -(-p.shape[0] // shards) * (own_bytes(p) // max(1, p.shape[0])) for p in network.whole.parameters() if p.ndim
    )
    weights = plain + -(-factors // shards)
    states, on_host = -(-usage.states // shards), -(-usage.states_on_host // shards)
    is_dense = not factors and not work.is_sparse
    around_grads = around if is_dense else min(around, max(0, trained - factors)) if factors else 0
    layer_grads = layer if not factors else factors // network.num_layers
    gradients, others = _moments_of(usage, moments, trained)
    outside = np.minimum(gradients, around_grads)
    kept = -(-(gradients - outside) // shards)
    whole = np.where(gradients > 0, 2 * outside + 2 * AHEAD * layer_grads, 0)
    other = others + around + AHEAD * layer + whole
    place = int((kept + other).argmax())
    held = Held(weights, int(kept[place]), states - on_host, int(other[place]), on_host)
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
        activations=int(other.max()),
        temporaries=temporaries,
        at_peak=stepping if is_step else held,
        where=(STEADY, STEP) if is_step else (STEADY, "backward"),
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


def _sizes(network: Network) -> tuple[int, int]:
    """Bytes of the weights around the layers, and of the largest layer."""
    blocks = blocks_of(network.whole)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    around = sum(own_bytes(p) for p in network.whole.parameters() if p not in inside)
    return around, max((sum(map(own_bytes, block.parameters())) for block in blocks), default=0)


def _moments_of(usage: Usage, moments: Moments | None, trained: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of gradients and of all else at each moment of the passes; by formula, at the ends of the backward pass."""
    if moments is None:
        return np.array([0, trained]), np.array([usage.activations, 0])
    rows = np.concatenate([found for region, found in moments.items() if region[0] == STEADY and STEP not in region])
    return rows[:, GRADIENTS], rows[:, OTHER]


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
