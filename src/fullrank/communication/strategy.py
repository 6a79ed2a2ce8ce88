"""What DDP and FSDP2 themselves send under any method, and what goes beside: partitioned states, restarts."""

from __future__ import annotations

from collections.abc import Sequence

from fullrank.communication.layout import Collective, Layout, Matrix, padded


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
        return [Collective("all_reduce", trained, gradient_itemsize, layout.world, modules)]
    gathered, calls = gathers * (whole - root) + root, gathers * (modules - 1) + 1
    return [
        Collective("all_gather", gathered, weight_itemsize, layout.shards, calls),
        Collective("reduce_scatter", trained, gradient_itemsize, layout.shards, modules),
        Collective("all_reduce", -(-trained // layout.shards), gradient_itemsize, layout.replicas, modules),
    ]


def partition_traffic(layout: Layout, numels: Sequence[int], *, itemsize: int = 2) -> list[Collective]:
    """After a step of ddp with ``partition_states``, every trained weight, from its owner: x bytes passed on for x.

    Args:
        layout: Of the processes.
        numels: Entries of each trained parameter.
        itemsize: Bytes of a weight.
    """
    if not layout.partition_states:
        return []
    return [Collective("broadcast", sum(numels), itemsize, layout.world, min(len(numels), layout.world))]
