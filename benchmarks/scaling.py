r"""A projection to many GPUs: an alpha-beta cost model of a step, and what a GPU holds. A model, no measurement.

    python benchmarks/scaling.py --output benchmarks/results/scaling_model.json --figures docs/figures

A collective takes alpha times its messages one after another, and its bytes over the bandwidth of the slowest link that
its ring passes: NVLink within a node, the node's network cards together between nodes. What is sent comes from
``fullrank.communication``, which the tests hold against what runs really send.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaling_machine import PROTOCOLS, SOURCES, Machine, total_seconds

from fullrank import communication as traffic
from fullrank.communication import Layout, Matrix

WORLDS = (8, 64, 1024)
BATCH_TOKENS = 4 * 1024 * 1024
"""Of an optimizer step over all GPUs, as LLaMA 7B to 65B (arXiv:2302.13971, Table 2: 4 M)."""
MICRO_TOKENS = 8192
"""Of one forward and backward pass on a GPU, at most."""
GAP = 200
"""Steps between refreshes, our default."""
STATE_ITEMSIZE, WEIGHT_ITEMSIZE = 4, 2
"""Bytes: all states in float32, weights and gradients in bfloat16."""


@dataclass(frozen=True)
class Network:
    """A LLaMA: its matrices, and how much else."""

    hidden: int
    intermediate: int
    layers: int
    key_values: int
    """Rows of the matrices of keys and values: fewer than ``hidden`` with grouped queries."""
    vocabulary: int = 32000

    def matrices(self, rank: int) -> list[Matrix]:
        """The seven of every layer."""
        h, i, kv = self.hidden, self.intermediate, self.key_values
        shapes = [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]
        return [Matrix(rows, columns, rank) for rows, columns in shapes] * self.layers

    @property
    def around(self) -> int:
        """Numbers outside the layers: embedding, head, the last norm. FSDP2's root holds them."""
        return (2 * self.vocabulary + 1) * self.hidden

    @property
    def plain(self) -> list[int]:
        """Numbers of each parameter that is not projected: embedding, head, norms."""
        return [self.vocabulary * self.hidden] * 2 + [self.hidden] * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        """All numbers."""
        return sum(self.plain) + sum(matrix.numel for matrix in self.matrices(1))


NETWORKS = {"7B": Network(4096, 11008, 32, 4096), "70B": Network(8192, 28672, 80, 1024)}


@dataclass(frozen=True)
class Case:
    """A method with its rank: GaLore's and APOLLO's are those of the 7B recipes, Fira's is GaLore's."""

    method: str
    rank: int = 0
    basis: str = "power"
    density: float = 0.0


CASES = {
    "full": Case("full"),
    "fira": Case("fira", rank=1024),
    "galore": Case("galore", rank=1024),
    "apollo": Case("apollo", rank=256, basis="random"),
    "lora": Case("lora", rank=128),
    "sift": Case("sift", density=0.05),
}
PROJECTED = ("fira", "galore", "apollo")


def layouts(world: int, machine: Machine) -> dict[str, Layout]:
    """The strategies that are compared."""
    return {
        "ddp": Layout(world),
        "ddp, partition_states": Layout(world, partition_states=True),
        "fsdp2": Layout(world, "fsdp2"),
        "fsdp2, shard_size 8": Layout(world, "fsdp2", shard_size=machine.gpus_per_node),
    }


def trained_numbers(case: Case, network: Network) -> int:
    """Numbers that have a gradient which is kept and reduced."""
    matrices = network.matrices(1)
    if case.method == "lora":
        return sum(case.rank * (matrix.m + matrix.n) for matrix in matrices)
    if case.method == "sift":
        return round(case.density * sum(matrix.numel for matrix in matrices))
    return network.parameters


def held_bytes(case: Case, network: Network, layout: Layout) -> dict[str, float]:
    """Bytes of weights, gradients and states of a GPU, without activations and what is gathered for a while."""
    shards, trained = layout.shards, trained_numbers(case, network)
    weights = network.parameters + (trained if case.method == "lora" else 0)
    states = 2 * trained / shards
    if case.method == "sift":
        states = 4 * trained / shards  # moments, values, places
    if case.method in PROJECTED or case.method == "full":
        matrices = network.matrices(max(case.rank, 1))
        states = traffic.state_numbers(case.method, matrices, layout, plain=network.plain)  # type: ignore[arg-type]
    return {
        "weights": WEIGHT_ITEMSIZE * weights / shards,
        "gradients": WEIGHT_ITEMSIZE * trained / shards,
        "states": STATE_ITEMSIZE * states,
    }


def own_work(case: Case, network: Network, layout: Layout, machine: Machine) -> tuple[float, float]:
    """Seconds of a projected method's own products in a step, and of a refresh (power iteration and QR)."""
    if case.method not in PROJECTED:
        return 0.0, 0.0
    matrices = network.matrices(case.rank)
    products = [2 * matrix.numel * matrix.rank for matrix in matrices]
    qrs = [4 * matrix.n * matrix.rank**2 - 4 * matrix.rank**3 // 3 for matrix in matrices]
    owners = layout.world if layout.partition_states else 1
    share = max(1 / owners, 1 / len(matrices))  # a matrix is not divided among owners
    rate = machine.peak_flops * machine.utilisation
    product = sum(products) / rate / layout.shards * share
    refresh = 2 * product + sum(qrs) / machine.qr_flops * share  # every process of FSDP2 makes the QR
    return product * (1 if case.method == "apollo" else 2), 0.0 if case.basis == "random" else refresh


def project(case: Case, network: Network, layout: Layout, machine: Machine) -> dict[str, float]:
    """One step: seconds of its parts, bytes sent by a GPU, bytes held."""
    micro_batches = max(1, math.ceil(BATCH_TOKENS / layout.world / MICRO_TOKENS))
    per_number = 4 if case.method == "lora" else 6  # frozen weights have no gradient of their own
    flops = per_number * network.parameters * BATCH_TOKENS / layout.world
    compute = flops / (machine.peak_flops * machine.utilisation)
    trained = trained_numbers(case, network)
    scattered = network.parameters if case.method == "sift" and layout.strategy == "fsdp2" else trained
    buckets = max(1, math.ceil(trained * WEIGHT_ITEMSIZE / 25e6))  # DDP's default of 25 MB
    engine = traffic.gradient_traffic(
        layout,
        trained=scattered,
        whole=network.parameters,
        root=network.around,
        modules=buckets if layout.strategy == "ddp" else network.layers + 1,
        weight_itemsize=WEIGHT_ITEMSIZE,
        gradient_itemsize=WEIGHT_ITEMSIZE,
    )
    # FSDP2 gathers and scatters in every micro-batch; DDP, and the copies of HSDP, sum in the last one.
    often = [one for one in engine if one.among == "shards"]
    seldom = [one for one in engine if one.among != "shards"]
    last = total_seconds(seldom, layout, machine)
    strategy = total_seconds(often, layout, machine) * micro_batches + last
    hidden = compute if often else machine.overlap * compute / micro_batches
    matrices = network.matrices(max(case.rank, 1))
    step, refresh = [], []
    if case.method in PROJECTED:
        step = traffic.step_traffic(case.method, matrices, layout, gradient_itemsize=WEIGHT_ITEMSIZE)  # type: ignore[arg-type]
        refresh = traffic.refresh_traffic(matrices, layout, basis=case.basis)  # type: ignore[arg-type]
        sizes = [matrix.numel for matrix in matrices] + network.plain
        step += traffic.partition_traffic(layout, sizes, itemsize=WEIGHT_ITEMSIZE)
    method = total_seconds(step, layout, machine)
    renew = total_seconds(refresh, layout, machine)
    work, renew_work = own_work(case, network, layout, machine)
    exposed = max(0.0, strategy - hidden)
    return {
        "compute_s": compute,
        "strategy_s": strategy,
        "strategy_exposed_s": exposed,
        "method_s": method,
        "refresh_s": renew / GAP,
        "work_s": work,
        "refresh_work_s": renew_work / GAP,
        "step_s": compute + exposed + method + work + (renew + renew_work) / GAP,
        "strategy_sent_gb": (traffic.sent_bytes(often) * micro_batches + traffic.sent_bytes(seldom)) / 1e9,
        "method_sent_gb": (traffic.sent_bytes(step) + traffic.sent_bytes(refresh) / GAP) / 1e9,
        **{f"{name}_gb": size / 1e9 for name, size in held_bytes(case, network, layout).items()},
        "micro_batches": micro_batches,
    }


def suits(case: Case, layout: Layout) -> bool:
    """Whether there is such a thing: only projected methods partition their states."""
    return case.method in PROJECTED or not layout.partition_states


def rows(machine: Machine) -> Iterator[dict[str, Any]]:
    """Every model, number of GPUs, strategy and method."""
    for model, network in NETWORKS.items():
        for world in WORLDS:
            for strategy, layout in layouts(world, machine).items():
                for name, case in CASES.items():
                    if suits(case, layout):
                        found = project(case, network, layout, machine)
                        yield {"model": model, "world": world, "strategy": strategy, "method": name, **found}


def communication(found: dict[str, float]) -> float:
    """Seconds of all that is sent in a step, hidden or not."""
    return found["strategy_s"] + found["method_s"] + found["refresh_s"]


def limits(machine: Machine) -> dict[str, dict[str, dict[str, dict[str, int | None]]]]:
    """Model -> strategy -> method -> the number of GPUs, in whole nodes, from which on it does not scale.

    ``all``: a step sends for longer than it computes. ``own``: what the method itself sends, beside weights and
    gradients, takes a tenth of that.
    """
    found: dict[str, dict[str, dict[str, dict[str, int | None]]]] = {}
    for model, network in NETWORKS.items():
        for strategy, layout in layouts(machine.gpus_per_node, machine).items():
            here = found.setdefault(model, {}).setdefault(strategy, {})
            for name, case in CASES.items():
                if suits(case, layout):

                    def at(world: int, case: Case = case) -> dict[str, float]:
                        return project(case, network, layouts(world, machine)[strategy], machine)  # noqa: B023

                    here[name] = {
                        "all": first_world(lambda row: communication(row) > row["compute_s"], at),
                        "own": first_world(lambda row: row["method_s"] + row["refresh_s"] > row["compute_s"] / 10, at),
                    }
    return found


def first_world(is_over: Callable[[dict[str, float]], bool], at: Callable[[int], dict[str, float]]) -> int | None:
    """The least number of whole nodes' GPUs, up to 16384, at which a projection is over a bound, by bisection."""
    low, high = 0, 2048
    if not is_over(at(8 * high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_over(at(8 * middle)) else (middle, high)
    return 8 * high


def main() -> None:
    """Write the results and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file")
    parser.add_argument("--figures", type=Path, required=True, help="folder of the figure")
    args = parser.parse_args()
    machine = Machine()
    results = {
        "benchmark": "scaling",
        "is": "a cost model, not a measurement",
        "assumptions": {
            "machine": asdict(machine),
            "protocols": {name: asdict(protocol) for name, protocol in PROTOCOLS.items()},
            "batch_tokens": BATCH_TOKENS,
            "micro_tokens": MICRO_TOKENS,
            "update_proj_gap": GAP,
            "state_itemsize": STATE_ITEMSIZE,
            "weight_itemsize": WEIGHT_ITEMSIZE,
            "networks": {name: asdict(one) | {"parameters": one.parameters} for name, one in NETWORKS.items()},
            "cases": {name: asdict(case) for name, case in CASES.items()},
        },
        "sources": SOURCES,
        "rows": [{key: rounded(value) for key, value in row.items()} for row in rows(machine)],
        "limits": limits(machine),
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    from scaling_figure import draw

    draw(args.figures / "scaling_model.png")


def rounded(value: Any) -> Any:
    """Five digits of a number that is not whole."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
