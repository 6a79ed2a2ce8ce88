"""Variants of a method trained at a grid of learning rates: one model, one loop, the same tokens, kept runs.

Each variant runs its learning rates with the first seed, and the best one again with every further seed. If
the best lies at an end of the grid, the grid is extended by one. Every finished run is kept in ``--work``, so an
interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HIDDEN = 256


@dataclass(frozen=True)
class Variant:
    """A method with options, and the learning rates to try, ascending."""

    name: str
    method: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    """Data type of the weights."""


def configuration(variant: Variant, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of one run."""
    return {
        "model": {
            "name": "llama-9m",
            "dtype": variant.dtype,
            "overrides": {
                "hidden_size": HIDDEN,
                "intermediate_size": 688,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        },
        "data": {
            "name": str(args.data),
            "validation": str(args.validation),
            "vocab_size": 2048,
            "sequence_length": 128,
            "validation_tokens": 32_768,
        },
        "method": {"name": variant.method, "lr": lr, **variant.options},
        "trainer": {
            "max_steps": args.steps,
            "warmup_steps": args.steps // 10,
            "per_device_train_batch_size": args.batch,
            "per_device_eval_batch_size": 32,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 10,
            "disable_tqdm": True,
            "max_grad_norm": 0.0 if args.no_clip else 1.0,
        },
        "seed": seed,
    }


def run(variant: Variant, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read the result of an earlier call."""
    import torch

    from fullrank import TrainingError
    from fullrank.train.resolve import resolve
    from fullrank.train.run import pretrain

    torch.set_num_threads(args.threads)
    name = f"{variant.name.replace(', ', '+').replace(' ', '_').replace('/', 'over')}-{lr:g}-{seed}"
    kept = args.work / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    folder = args.work / "runs" / f"{name}-{time.time_ns()}"
    row: dict[str, Any] = {"variant": variant.name, "lr": lr, "seed": seed, "perplexity": math.inf}
    try:
        recipe = configuration(variant, lr, seed, args) | {"output_dir": str(folder)}
        result = pretrain(resolve(recipe))
        assert result is not None
        keys = (
            "perplexity",
            "eval_loss",
            "tokens",
            "optimizer_state_bytes",
            "adamw_state_bytes",
            "parameters",
            "folder",
        )
        row |= {key: result[key] for key in keys} | {"versions": result["versions"], "hardware": result["hardware"]}
    except TrainingError as error:
        row["error"] = str(error).split(". ", maxsplit=1)[0]
    kept.write_text(json.dumps(row))
    print(f"{row['perplexity']:10.2f}  {variant.name}, lr {lr:g}, seed {seed}", flush=True)
    return row


def search(variant: Variant, rows: list[dict[str, Any]]) -> float | None:
    """A rate to try next if the best one lies at an end of what was tried, else None (tried at most twice over).

    A variant with a single rate is neither searched nor repeated with another seed.
    """
    tried = sorted(row["lr"] for row in rows)
    best = min(rows, key=lambda row: row["perplexity"])["lr"]
    if len(variant.rates) == 1 or len(tried) >= len(variant.rates) + 2 or best not in (tried[0], tried[-1]):
        return None
    return best / 2 if best == tried[0] else best * 2


def summarise(variant: Variant, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: the best rate, its seeds, and every rate of the first seed."""
    best = best_row(rows)
    grid = {f"{row['lr']:g}": row["perplexity"] for row in rows if row["seed"] == best["seed"]}
    seeds = [row["perplexity"] for row in rows if row["lr"] == best["lr"]]
    return {
        "variant": variant.name,
        "method": variant.method,
        "options": variant.options,
        "dtype": variant.dtype,
        "lr": best["lr"],
        "perplexity": statistics.fmean(seeds),
        "perplexity_by_seed": seeds,
        "grid": dict(sorted(grid.items(), key=lambda item: float(item[0]))),
        "optimizer_state_bytes": best.get("optimizer_state_bytes"),
        "adamw_state_bytes": best.get("adamw_state_bytes"),
    }


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, work: str) -> None:
    """What every such benchmark can be told."""
    parser.add_argument("--data", type=Path, required=True, help="training text, as data.name")
    parser.add_argument("--validation", type=Path, required=True, help="validation text, as data.validation")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 128 tokens per step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--no_clip", action="store_true", help="no gradient clipping, as the authors' scripts")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")


def run_all(chosen: Sequence[Variant], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every run of every variant, by the variant's name."""
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        todo = [(variant, lr, args.seeds[0]) for variant in chosen for lr in variant.rates]
        while todo:
            for row in list(pool.map(run, *zip(*todo, strict=True), [args] * len(todo))):
                rows[row["variant"]].append(row)
            todo = [(v, lr, args.seeds[0]) for v in chosen if (lr := search(v, rows[v.name])) is not None]
        best = {v.name: best_row(rows[v.name])["lr"] for v in chosen}
        again = [(v, best[v.name], seed) for seed in args.seeds[1:] for v in chosen if len(v.rates) > 1]
        for row in pool.map(run, *zip(*again, strict=True), [args] * len(again)) if again else []:
            rows[row["variant"]].append(row)
    return rows


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the first seed with the lowest perplexity."""
    first = min(row["seed"] for row in rows)
    return min((row for row in rows if row["seed"] == first), key=lambda row: row["perplexity"])


def write_report(
    name: str, table: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]], args: argparse.Namespace, **more: Any
) -> None:
    """The results with their environment as JSON, and the table in print."""
    sample = next(row for found in rows.values() for row in found if "versions" in row)
    report = {
        "benchmark": name,
        "model": {"parameters": sample["parameters"], "hidden_size": HIDDEN, "layers": 4, "vocabulary": 2048},
        "data": f"{args.data.name}, {sample['tokens']} tokens a run, {args.steps} steps",
        "clipping": None if args.no_clip else 1.0,
        "seeds": args.seeds,
        "versions": sample["versions"],
        "hardware": sample["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "results": table,
        **more,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print("| variant | best lr | perplexity (mean of seeds) | each seed | optimizer state, share of AdamW |")
    print("| --- | --- | --- | --- | --- |")
    for line in sorted(table, key=lambda line: line["perplexity"]):
        seeds = " ".join(f"{value:.1f}" for value in line["perplexity_by_seed"])
        share = (line["optimizer_state_bytes"] or 0) / (line["adamw_state_bytes"] or 1)
        print(f"| {line['variant']} | {line['lr']:g} | {line['perplexity']:.1f} | {seeds} | {share:.0%} |")
