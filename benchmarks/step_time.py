"""Time of one optimizer step: ours, the published packages, torch's fused AdamW, and the least possible.

Weights are plain tensors in the shapes of a LLaMA with fixed random gradients: no model, no data. All
optimizers of a scope live in one process and are stepped in turn, each round starting with the next
one, so that a change of clock or load meets all; medians are shown, quartiles and minima kept. Two
scopes: the projected matrices alone, and the whole model, where embedding, head and norms take plain
AdamW.

A step and a refresh are timed apart. A refresh is timed on the matrices of ``--refresh-layers`` layers
(a refreshing step minus a plain one) and scaled to all; amortised = step + refresh / gap. The bases of
the other timings come from one exact SVD a shape, reused: they are orthonormal, and nobody waits.

The bound is what any such method must do with torch's own products: two a matrix, R = G Q and W += R Q^T, and one
pass over weights and gradients, W += G; plain tensors take torch's fused AdamW. Where ours are below it, a product
is not torch's (``fullrank.ops.kernels``).

    python benchmarks/step_time.py --sizes 60M 130M --dtype float32 bfloat16 --compare-kernels
    python benchmarks/step_time.py --device cuda --sizes 1B 7B --layers 4 --rank 256 d/4 --compare-kernels
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from step_time_cases import CASES, KERNEL_CASES, Case, Groups, set_gap
from step_time_targets import bytes_moved, targets_of
from timing import Clock, one_svd_per_shape, round_robin
from torch import nn

import fullrank
from fullrank.train.report import cpu_name

LLAMA: dict[str, tuple[int, int, int, int]] = {
    "tiny": (32, 88, 2, 100),
    "60M": (512, 1376, 8, 32000),
    "130M": (768, 2048, 12, 32000),
    "350M": (1024, 2736, 24, 32000),
    "1B": (2048, 5461, 24, 32000),
    "7B": (4096, 11008, 32, 32000),
}
"""Hidden size, intermediate size, layers and vocabulary of the GaLore and Fira papers."""
NEVER = 10**9
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "fira", "galore-torch", "apollo-torch", "pytorch_optimizer", "transformers")


def make_tensors(
    size: str, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, plain): weights with fixed random gradients, those to project and all others."""
    hidden, inner, _, vocabulary = LLAMA[size]
    attention, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    generator = torch.Generator(device).manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2)]
        weight = nn.Parameter(made[0].mul_(0.02))
        weight.grad = made[1].mul_(1e-3)
        return weight

    matrices = [parameter(*s) for _ in range(layers) for s in (attention,) * 4 + (up, up, down)]
    plain = [parameter(vocabulary, hidden) for _ in range(2)] + [parameter(hidden) for _ in range(2 * layers + 1)]
    return matrices, plain


def bound_of(matrices: list[nn.Parameter], plain: list[nn.Parameter], rank: int) -> Callable[[], object]:
    """The least work of a step with a low-rank and a full-rank part (see the top of this file)."""
    prepared = []
    for weight in matrices:
        assert weight.grad is not None
        w, g = weight.detach(), weight.grad
        if w.shape[0] < w.shape[1]:
            w, g = w.t(), g.t()
        basis = torch.linalg.qr(torch.randn(w.shape[1], rank, device=w.device))[0].to(w.dtype)
        prepared.append((w, g, basis, torch.empty(w.shape[0], rank, device=w.device, dtype=w.dtype)))
    rest = torch.optim.AdamW(plain, lr=1e-6, fused=True) if plain else None

    def work() -> None:
        for w, g, basis, low in prepared:
            torch.mm(g, basis, out=low)
            w.addmm_(low, basis.t(), alpha=-1e-6)
            w.add_(g, alpha=-1e-6)
        if rest is not None:
            rest.step()

    return work


def groups_of(matrices: list[nn.Parameter], plain: list[nn.Parameter], rank: int, gap: int) -> Groups:
    """What every case builds its parameter groups from."""
    return Groups(matrices=matrices, plain=plain, rank=rank, gap=gap, alpha=0.25)


def step_times(cases: list[Case], groups: Groups, clock: Clock, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of steps without a refresh, for all cases and the bound."""
    works: dict[str, Callable[[], object]] = {"bound": bound_of(groups.matrices, groups.plain, groups.rank)}
    with one_svd_per_shape():
        for case in cases:
            works[case.name] = case.build(groups, case.bases[0] if case.bases else "").step
        round_robin(clock, works, warmup)
    return round_robin(clock, works, rounds)


def refresh_times(cases: list[Case], groups: Groups, clock: Clock, rounds: int) -> dict[tuple[str, str], float]:
    """Extra seconds of a refresh of all given matrices, by case and basis (medians)."""
    optimizers = {(c.name, basis): c.build(groups, basis) for c in cases for basis in c.bases}
    with one_svd_per_shape():
        for optimizer in optimizers.values():
            optimizer.step()
    plain = {str(key): optimizer.step for key, optimizer in optimizers.items()}
    without = round_robin(clock, plain, rounds + 1)
    for optimizer in optimizers.values():
        set_gap(optimizer, 1)
    refreshing = round_robin(clock, plain, rounds)
    return {
        key: max(0.0, statistics.median(refreshing[str(key)]) - statistics.median(without[str(key)][1:]))
        for key in optimizers
    }


def measure_size(
    size: str, dtype_name: str, rank_name: str, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """All rows of one model size, dtype and rank: both scopes, each case with each of its bases."""
    dtype = getattr(torch, dtype_name)
    hidden, _, all_layers, _ = LLAMA[size]
    clock, rank = Clock(device), hidden // 4 if rank_name == "d/4" else min(int(rank_name), hidden)
    layers = min(options.layers or all_layers, all_layers)
    matrices, plain = make_tensors(size, layers, device, dtype)
    wanted = [*CASES, *(KERNEL_CASES if options.compare_kernels else [])]
    wanted = [case for case in wanted if not options.cases or any(part in case.name for part in options.cases)]
    cases = [case for case in wanted if case.available() and (dtype.itemsize == 2 or not case.half_only)]
    sample = min(options.refresh_layers, layers)
    few = groups_of(matrices[: 7 * sample], [], rank, NEVER)
    refresh = refresh_times(cases, few, clock, options.refresh_rounds)
    free(device)
    rows = []
    for scope, others in (("matrices", []), ("model", plain)):
        times = step_times(cases, groups_of(matrices, others, rank, NEVER), clock, options.rounds)
        free(device)
        common = {"size": size, "dtype": dtype_name, "rank": rank, "scope": scope, "device": device.type}
        common |= {"layers_timed": layers, "layers": all_layers, "num_matrices": len(matrices)}
        common["bytes_moved"] = bytes_moved([tuple(m.shape) for m in matrices], rank, dtype.itemsize, sum_of(others))
        rows += rows_of(common, cases, times, refresh, layers / sample, options.gap)
    return rows


def sum_of(tensors: list[nn.Parameter]) -> int:
    """Numbers in all of them."""
    return sum(tensor.numel() for tensor in tensors)


def rows_of(
    common: dict[str, Any],
    cases: list[Case],
    times: dict[str, list[float]],
    refresh: dict[tuple[str, str], float],
    to_all_layers: float,
    gap: int,
) -> list[dict[str, Any]]:
    """The bound first, then one row a case and basis."""
    bound = statistics.median(times["bound"])
    rows: list[dict[str, Any]] = [
        common | {"case": "bound", "basis": "", "step_s": bound, "refresh_s": 0.0, "amortised_s": bound}
    ]
    rows[0]["step_s_min"] = min(times["bound"])
    for case in cases:
        step = statistics.median(times[case.name])
        for basis in case.bases or ("",):
            extra = refresh.get((case.name, basis), 0.0) * to_all_layers
            row: dict[str, Any] = {
                "case": case.name,
                "basis": basis,
                "peer": case.peer,
                "step_s": step,
                "refresh_s": extra,
            }
            quartiles = statistics.quantiles(times[case.name], n=4)[::2]
            spread = {"step_s_min": min(times[case.name]), "step_s_quartiles": quartiles}
            rows.append(common | row | {"amortised_s": step + extra / gap} | spread)
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Ratios of each row to the bound, to fused AdamW and to the authors' package.

    The package is taken with the same basis, or with its first where it lacks that one.
    """
    first = {row["case"]: row for row in reversed(rows)}
    exact = {(row["case"], row["basis"]): row for row in rows}
    for row in rows:
        name = row.get("peer") or ""
        peer = exact.get((name, row["basis"])) or first.get(name)
        row["step_over_bound"] = row["step_s"] / rows[0]["step_s"]
        row["amortised_over_bound"] = row["amortised_s"] / rows[0]["step_s"]
        row["refreshing_over_step"] = (row["step_s"] + row["refresh_s"]) / row["step_s"]
        for key, name in (("adamw", "torch AdamW fused"), ("adamw_float32", "torch AdamW fused, float32")):
            if name in first:
                row[f"amortised_over_{key}"] = row["amortised_s"] / first[name]["amortised_s"]
        row["authors_step_over_this"] = peer["step_s"] / row["step_s"] if peer else None
        row["authors_amortised_over_this"] = peer["amortised_s"] / row["amortised_s"] if peer else None


def free(device: torch.device) -> None:
    """Return the memory of optimizers that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as far as they are known."""
    versions = {"fullrank": fullrank.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: list[dict[str, Any]], gap: int) -> str:
    """All rows as one text table, times in milliseconds."""
    step, refresh, amortised = "step", "refresh", f"per step @{gap}"
    head = f"{'size':5} {'dtype':8} {'rank':>4} {'layers':6} {'scope':9} {'case':34} {'basis':7}"
    head += f" {step:>9} {refresh:>10} {amortised:>14} {'step/bound':>10} {'/AdamW':>7}"
    head += f" {'authors/this':>12} {amortised:>14}"
    lines = [head, "-" * len(head)]
    for row in rows:
        layers = f"{row['layers_timed']}/{row['layers']}"
        line = f"{row['size']:5} {row['dtype']:8} {row['rank']:4} {layers:6} {row['scope']:9}"
        line += f" {row['case']:34} {row['basis']:7}"
        line += f" {row['step_s'] * 1e3:9.2f} {row['refresh_s'] * 1e3:10.1f} {row['amortised_s'] * 1e3:14.2f}"
        line += f" {row['step_over_bound']:10.2f} {row.get('amortised_over_adamw', math.nan):7.2f}"
        if row["authors_step_over_this"] is not None:
            line += f" {row['authors_step_over_this']:12.2f} {row['authors_amortised_over_this']:14.2f}"
        lines.append(line)
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", choices=list(LLAMA), default=["60M", "130M"])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every optimizer")
    parser.add_argument("--refresh-rounds", type=int, default=3, help="timed refreshes of every optimizer")
    parser.add_argument("--refresh-layers", type=int, default=1, help="layers whose refresh is timed, then scaled")
    parser.add_argument("--layers", type=int, default=0, help="layers to time (0: all; at 7B memory allows few)")
    parser.add_argument("--gap", type=int, default=200, help="steps between refreshes, to amortise over")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], help="float32; on a GPU bfloat16")
    parser.add_argument("--rank", nargs="+", default=["d/4"], help="numbers, or d/4 for a quarter of the width")
    parser.add_argument("--cases", nargs="+", default=[], help="cases with one of these in their names (default: all)")
    parser.add_argument("--compare-kernels", action="store_true", help="ours without the kernels, too")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/step_time_<hardware>_<yyyymm>.json")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    options.dtype = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    known = environment(device)
    runs = itertools.product(options.sizes, options.dtype, options.rank)
    rows = [row for run in runs for row in measure_size(*run, options, device)]
    hardware = (known["gpu"] or f"{known['cpu']} {known['threads']} threads").lower().replace(" ", "-")
    output = options.output or RESULTS / f"step_time_{hardware}_{known['date'][:7].replace('-', '')}.json"
    settings = {k: v for k, v in vars(options).items() if k != "output"}
    settings["refresh"] = f"timed on {options.refresh_layers} layer(s), scaled to layers_timed"
    missing = [case.name for case in CASES if not case.available()]
    output.parent.mkdir(parents=True, exist_ok=True)
    targets = targets_of(rows)
    report = {"environment": known, "settings": settings, "missing": missing, "targets": targets, "rows": rows}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows, options.gap))
    for target in targets:
        verdict = "reached" if target["reached"] else "missed"
        print(f"{verdict:7} {target['found']:6.2f} ({target['wanted']})  {target['target']}: {target['of']}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
