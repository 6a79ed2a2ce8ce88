"""What an optimizer step costs each of several processes: time, time of a refresh, bytes of state.

The same weights and gradients (shapes of a LLaMA, random numbers) are stepped by one process; by several that hold
them whole, as under DDP, with replicated states and with partitioned ones; and by several that hold shards, as under
FSDP2. No model runs: a step is the method's own work and what it sends, none of DDP's or FSDP2's own traffic.
Peers: torch's fused AdamW, whole and sharded, and AdamW in torch's ZeroRedundancyOptimizer (states partitioned).

All optimizers of a number of processes are stepped in turn, so that a change of clock or load meets all; medians over
rounds, of the slowest process. Each process has one CPU thread, or one GPU.

    python benchmarks/distributed.py --size 60M --layers 4 --worlds 1 2
    python benchmarks/distributed.py --size 1B --layers 4 --worlds 1 2 4 8 --device cuda
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_time import LLAMA, RESULTS, environment, make_tensors
from timing import Clock, round_robin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fullrank import ApolloAdamW, FiraAdamW, GaLoreAdamW

NEVER = 10**9
OURS = {"fira": FiraAdamW, "galore": GaLoreAdamW, "apollo": ApolloAdamW}
Made = tuple[torch.optim.Optimizer, list[nn.Parameter]]


def parameters_of(arguments: argparse.Namespace, device: torch.device, mesh: Any) -> tuple[list[Any], list[Any]]:
    """(matrices, plain) with gradients: whole, or cut along their rows over a mesh."""
    torch.manual_seed(0)
    both = make_tensors(arguments.size, arguments.layers, device, getattr(torch, arguments.dtype))
    if mesh is None:
        return both
    sharded: list[list[nn.Parameter]] = [[], []]
    for several, made in zip(both, sharded, strict=True):
        for whole in several:
            parameter = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])  # type: ignore[arg-type]
            made.append(parameter)
    return sharded[0], sharded[1]


def cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Made]]:
    """Every optimizer, by ``name, how its states are kept``."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    rank = LLAMA[arguments.size][0] // 4

    def ours(name: str, how: str, **options: Any) -> Callable[[], Made]:
        def make() -> Made:
            matrices, plain = parameters_of(arguments, device, mesh if how == "sharded" else None)
            groups = [{"params": plain}, {"params": matrices, "rank": rank, "update_proj_gap": NEVER, "alpha": 0.25}]
            optimizer = OURS[name](groups, lr=1e-6, partition_states=how == "partitioned", **options)
            return optimizer, [*plain, *matrices]

        return make

    def adamw(how: str) -> Callable[[], Made]:
        def make() -> Made:
            matrices, plain = parameters_of(arguments, device, mesh if how == "sharded" else None)
            everything = [*plain, *matrices]
            if how == "partitioned":
                zero = ZeroRedundancyOptimizer(everything, torch.optim.AdamW, lr=1e-6, fused=True)
                return zero, everything
            return torch.optim.AdamW(everything, lr=1e-6, fused=True), everything

        return make

    ways = ["whole"] if world == 1 else ["whole", "partitioned", "sharded"]
    made = {f"adamw, {how}": adamw(how) for how in ways}
    return made | {f"{name}, {how}": ours(name, how) for name in OURS for how in ways}


def held_bytes(optimizer: Any) -> int:
    """Bytes of state in this process."""
    inner = getattr(optimizer, "optim", optimizer)
    tensors = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of this number of processes; a case at a time lives with all others, so all are stepped in turn."""
    device = torch.device(arguments.device, int(os.environ["LOCAL_RANK"]) if arguments.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    optimizers = {name: make()[0] for name, make in cases(arguments, device).items()}
    clock = Clock(device)
    works = {name: optimizer.step for name, optimizer in optimizers.items()}
    first = round_robin(clock, works, 1)
    round_robin(clock, works, 2)
    times = round_robin(clock, works, arguments.rounds)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            if "update_proj_gap" in group:
                group["update_proj_gap"] = 1
    refreshing = round_robin(clock, works, arguments.refresh_rounds)
    rows = []
    for name, optimizer in optimizers.items():
        step, fresh = statistics.median(times[name]), statistics.median(refreshing[name])
        mine = torch.tensor([step, max(0.0, fresh - step), first[name][0], held_bytes(optimizer)], dtype=torch.float64)
        if device.type == "cuda":
            mine = mine.to(device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        method, how = name.split(", ")
        keys = ("step_s", "refresh_s", "first_step_s", "state_bytes")
        rows.append(
            {"processes": dist.get_world_size(), "method": method, "states": how}
            | dict(zip(keys, mine.tolist(), strict=True))
        )
    dist.barrier()
    dist.destroy_process_group()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a case: milliseconds, and megabytes of the process that holds most."""
    lines = [f"{'processes':>9} {'method':8} {'states':12} {'step ms':>9} {'refresh ms':>11} {'state MB':>9}"]
    for row in rows:
        lines.append(
            f"{row['processes']:9} {row['method']:8} {row['states']:12} {row['step_s'] * 1e3:9.1f} "
            f"{row['refresh_s'] * 1e3:11.1f} {row['state_bytes'] / 1e6:9.1f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--size", choices=list(LLAMA), default="60M")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--refresh-rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/distributed_<hardware>_<yyyymm>.json")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of one number of processes, under torchrun
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if arguments.rows is not None:
        rows = measure(arguments)
        if int(os.environ["RANK"]) == 0:
            arguments.rows.write_text(json.dumps(rows), encoding="utf-8")
        return
    known = environment(torch.device(arguments.device))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.worlds:
            found = Path(folder) / f"{world}.json"
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            own = [*sys.argv, "--rows", str(found)]
            subprocess.run([sys.executable, *torchrun, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows += json.loads(found.read_text(encoding="utf-8"))
    known["threads"] = 1
    hardware = (known["gpu"] or f"{known['cpu']} {os.cpu_count()} threads").lower().replace(" ", "-")
    output = arguments.output or RESULTS / f"distributed_{hardware}_{known['date'][:7].replace('-', '')}.json"
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "rows")}
    output.write_text(json.dumps({"environment": known, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
