"""What DDP and FSDP2 themselves send under any method, and what goes beside: partitioned states, restarts."""

from __future__ import annotations

from collections.abc import Sequence

from fullrank.communication.layout import Collective, Layout, Matrix, filled, padded
from fullrank.sharding import BUCKET


def gradient_traffic(
    layout: Layout,
    *,
    trained: int,
    whole: int = 0,
    root: int = 0,
    modules: int = 1,
    gathers: int = 2,
    weight_itemsize: int = 2,
    gradient_itemsize: int = 2,
) -> list[Collective]:
    """A forward and backward pass whose gradients are reduced.

    Of the micro-batches of a step, fsdp2 gathers and scatters in every one; ddp, and the copies of HSDP, sum in the
    last alone (``among`` all, copies).

    ddp: one all-reduce of the gradients, 2 x (P - 1) / P bytes sent for x bytes of them. SIFT's are its chosen
    entries and what trains densely (all of its matrices once, to choose), LoRA's the factors.

    fsdp2 over S processes a copy: the weights are gathered for the forward pass and again for the backward pass, and
    the gradients scattered: 3 x (S - 1) / S bytes sent for x bytes of weights where all train. What the root module
    holds itself is gathered once. SIFT's dense gradients are scattered all the same. With N > 1 copies (HSDP) each
    process then all-reduces its part of the gradients over the copies, 2 (x / S) (N - 1) / N.

    Args:
        layout: Of the processes.
        trained: Numbers of gradient.
        whole: fsdp2: numbers of all weights, frozen ones too.
        root: fsdp2: of these, numbers that belong to no module wrapped by itself.
        modules: fsdp2: modules wrapped by themselves, the root among them; ddp: buckets.
        gathers: fsdp2: 2, or 1 where weights stay whole after the forward pass (reshard_after_forward=False).
        weight_itemsize: Bytes of a gathered weight.
        gradient_itemsize: Bytes of a reduced gradient.
    """
    if layout.strategy == "ddp":
        return [Collective("all_reduce", trained, gradient_itemsize, layout.world, modules, "all")]
    gathered, calls = gathers * (whole - root) + root, gathers * (modules - 1) + 1
    return [
        Collective("all_gather", gathered, weight_itemsize, layout.shards, calls),
        Collective("reduce_scatter", trained, gradient_itemsize, layout.shards, modules),
        Collective("all_reduce", -(-trained // layout.shards), gradient_itemsize, layout.replicas, modules, "copies"),
    ]


def partition_traffic(
    layout: Layout, numels: Sequence[int], *, itemsize: int = 2, first: bool = False
) -> list[Collective]:
    """After a step of ddp with ``partition_states``, every trained weight, from its owner: x bytes passed on for x.

    Args:
        layout: Of the processes.
        numels: Entries of each trained parameter.
        itemsize: Bytes of a weight.
        first: Whether it is the first step, before which the weights' norms are compared.
    """
    if not layout.partition_states:
        return []
    calls = max(len(filled(numels, BUCKET)), min(len(numels), layout.world))
    compared = [Collective("all_reduce", 2 * len(numels), 8, layout.world, 1, "all")] if first else []
    return [*compared, Collective("broadcast", sum(numels), itemsize, layout.world, calls, "all")]


def sift_traffic(
    layout: Layout, *, chosen: int, weights: int, dense: int = 0, itemsize: int = 4, dense_itemsize: int = 2
) -> list[Collective]:
    """What SIFT sends of its sparse weights in an optimizer step, beside ``gradient_traffic`` of all others.

    ddp: one all-reduce of the chosen entries' gradients and of a flag for each weight, at the end of the backward pass
    that DDP synchronises. While it chooses, each dense gradient and a flag are all-reduced once, and the places are
    broadcast. fsdp2: nothing more than FSDP2, which scatters dense gradients; rows choose by themselves.

    Args:
        layout: Of the processes.
        chosen: Entries that train.
        weights: Weights that they are of.
        dense: Entries of those that choose in this step; 0 in all steps but the first of a choice.
        itemsize: Bytes of a value.
        dense_itemsize: Bytes of an entry of a weight.
    """
    if layout.strategy == "fsdp2":
        return []
    found = [Collective("all_reduce", chosen + weights, itemsize, layout.world, 1, "all")]
    if dense:
        found += [
            Collective("all_reduce", dense, dense_itemsize, layout.world, weights, "all"),
            Collective("all_reduce", weights, 4, layout.world, weights, "all"),
            Collective("broadcast", chosen + 2 * weights, 4, layout.world, 2, "all"),
        ]
    return found


def restart_traffic(matrices: Sequence[Matrix], layout: Layout, *, itemsize: int = 4) -> list[Collective]:
    """What a restart of LoRA's factors sends: under fsdp2 both are gathered, r (m + n) numbers a matrix.

    Also 2 numbers a matrix, what was merged and what rounding lost of it, are all-reduced in float64. Under ddp every
    process merges whole factors and draws the same new ones: nothing is sent. Counts of the moments' zeros come on top.

    Args:
        matrices: Weights with the rank of their factors.
        layout: Of the processes.
        itemsize: Bytes of a number of the factors.
    """
    if layout.shards == 1:
        return []
    factors = [
        padded(matrix.rows, layout.shards) * matrix.rank + padded(matrix.rank, layout.shards) * matrix.columns
        for matrix in matrices
    ]
    return [
        Collective("all_gather", sum(factors), itemsize, layout.shards, 2 * len(factors)),
        Collective("all_reduce", 2 * len(factors), 8, layout.shards, len(factors)),
    ]
