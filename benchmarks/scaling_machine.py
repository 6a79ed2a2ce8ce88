"""Machines of scaling.py: eight GPUs to a node, the links between them, and how long a collective takes on those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fullrank.communication import Collective, Layout


@dataclass(frozen=True)
class Machine:
    """H100 SXM, eight to a node, a 400 Gb/s card for each."""

    gpus_per_node: int = 8
    nvlink: float = 450e9
    """Bytes a second of a GPU in one direction: half of 900 GB/s."""
    network: float = 50e9
    """Bytes a second of a GPU's card: 400 Gb/s."""
    peak_flops: float = 989.4e12
    """bfloat16, dense."""
    utilisation: float = 0.4
    """Share of the peak that training reaches, and that the methods' products are given too."""
    qr_flops: float = 1e12
    """Of a QR in float32. Our guess: there is no public figure."""
    overlap: float = 2 / 3
    """Share of a micro-batch's time, its backward pass, under which DDP's last all-reduce runs."""


SOURCES = {
    "H100: 989.4 TFLOPS bfloat16 dense, NVLink 900 GB/s": "https://glennklockwood.com/garden/processors/h100",
    "H100 data sheet": "https://www.nvidia.com/en-us/data-center/h100/",
    "a 400 Gb/s ConnectX-7 card for each GPU": "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html",
    "38 to 43% of the peak; 400 Gb/s between GPUs": "https://arxiv.org/abs/2407.21783",
    "bytes on the links of a ring": "https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md",
    "latencies, and bandwidths of protocols": "https://github.com/NVIDIA/nccl/blob/"
    "01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc",
}
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways to send, by its own table: seconds before, for each hop, and the share of the bandwidth."""

    base: float
    hop: float
    """Within a node."""
    network_hop: float
    share: float
    is_tree: bool = False
    """All-reduces only: hops grow with the logarithm of the nodes."""


PROTOCOLS = {
    "ring, simple": Protocol(8.4 * MICROSECOND, 3.4 * MICROSECOND, 9.6 * MICROSECOND, 1.0),
    "ring, LL128": Protocol(10.0 * MICROSECOND, 1.9 * MICROSECOND, 4.0 * MICROSECOND, 0.92),
    "ring, LL": Protocol(3.6 * MICROSECOND, 0.85 * MICROSECOND, 2.7 * MICROSECOND, 0.25),
    "tree, LL": Protocol(4.4 * MICROSECOND, 0.94 * MICROSECOND, 5.0 * MICROSECOND, 0.24, is_tree=True),
}


def seconds(one: Collective, layout: Layout, machine: Machine) -> float:
    """Time of these collectives, one after another.

    The shards of a copy are neighbours; the same part of every copy lies on every n-th GPU.
    """
    if one.processes == 1 or not one.numbers:
        return 0.0
    apart = layout.shards if one.among == "copies" else 1
    per_node = min(max(1, machine.gpus_per_node // apart), one.processes)
    nodes = math.ceil(one.processes / per_node)
    link = machine.nvlink if nodes == 1 else min(machine.nvlink, per_node * machine.network)
    rounds = 2 if one.kind == "all_reduce" else 1
    sent = one.sent_bytes / one.calls
    best = math.inf
    for protocol in PROTOCOLS.values():
        if protocol.is_tree and one.kind != "all_reduce":
            continue
        hops, network_hops = one.processes - nodes, nodes - 1
        if protocol.is_tree:
            hops, network_hops = per_node - 1, math.ceil(math.log2(nodes))
        latency = protocol.base + rounds * (hops * protocol.hop + network_hops * protocol.network_hop)
        best = min(best, latency + sent / (link * protocol.share))
    return best * one.calls


def total_seconds(several: Sequence[Collective], layout: Layout, machine: Machine) -> float:
    """Time of all of them, one after another."""
    return sum(seconds(one, layout, machine) for one in several)
