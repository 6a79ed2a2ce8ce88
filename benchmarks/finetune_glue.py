"""Every method on tasks of GLUE through ``fullrank finetune``: one encoder, one loop, the same examples.

    python benchmarks/finetune_glue.py --model all-MiniLM-L6-v2 --data glue --output result.json

``--data`` holds the tasks as GLUE distributes them. Each method runs a small grid of learning rates with the first seed
on the first task, extended by up to two if the best lies at an end; its best rate is what every task and seed then
trains with. A score is that of the dev set at the best epoch, as the papers report it, and as such an optimistic one.
Every finished run is kept in ``--work``, so an interrupted benchmark goes on where it was. Writes JSON with the
environment and prints the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
PROJECTED = {"target_modules": TARGETS, "rank": 32, "update_proj_gap": 50, "alpha": 1.0}
FACTORS = {"target_modules": TARGETS, "rank": 8, "lora_alpha": 16.0}
KEPT = ("scores", "scores_before", "metric", "kept_step", "steps", "tokens", "gradient_bytes", "optimizer_state_bytes")
KEPT += ("adamw_state_bytes", "parameters", "step_time_median_s", "versions", "hardware")
LENGTHS = {"sst2": 64, "cola": 64, "mrpc": 96, "stsb": 96, "qqp": 96, "qnli": 128, "rte": 192, "mnli": 128}


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the learning rates to try, ascending."""

    method: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = [
    Variant("full", (1e-4, 2e-4, 4e-4)),
    Variant("lora", (2e-3, 4e-3, 8e-3), FACTORS),
    Variant("relora", (2e-3, 4e-3, 8e-3), FACTORS | {"restart_every": 40, "restart_warmup_steps": 5}),
    Variant("sift", (2e-3, 4e-3, 8e-3), {"target_modules": TARGETS, "density": 0.01, "exception": ["classifier"]}),
    Variant("fira", (1e-4, 2e-4, 4e-4), PROJECTED),
    Variant("galore", (2e-4, 4e-4, 8e-4), PROJECTED),
]


def recipe(variant: Variant, task: str, lr: float, seed: int, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    return {
        "model": {"name": str(args.model)},
        "data": {
            "task": task,
            "name": str(args.data),
            "sequence_length": LENGTHS[task],
            "max_examples": args.examples,
        },
        "method": {"name": variant.method, "lr": lr, **variant.options},
        "trainer": {
            "num_train_epochs": epochs,
            "warmup_steps": 0.06,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "train_sampling_strategy": "group_by_length",
            "save_total_limit": 2,
            "disable_tqdm": True,
        },
        "seed": seed,
    }


def run(variant: Variant, task: str, lr: float, seed: int, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read the result of an earlier call."""
    import torch
    import transformers

    from fullrank.train.resolve import resolve
    from fullrank.train.run import finetune

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    name = f"{task}-{variant.method}-{lr:g}-{seed}-{args.examples}x{epochs}"
    kept = args.work / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    folder = args.work / "runs" / f"{name}-{time.time_ns()}"
    begin = time.perf_counter()
    content = recipe(variant, task, lr, seed, epochs, args) | {"output_dir": str(folder)}
    result = finetune(resolve(content))
    assert result is not None
    row = {"task": task, "method": variant.method, "lr": lr, "seed": seed} | {key: result[key] for key in KEPT}
    row["wall_s"] = time.perf_counter() - begin
    shutil.rmtree(folder)
    kept.write_text(json.dumps(row))
    print(f"{score(row):7.4f}  {name}  {row['step_time_median_s']:.3f} s a step", flush=True)
    return row


def score(row: dict[str, Any]) -> float:
    """The task's own metric at the best epoch."""
    return float(row["scores"][row["metric"]])


def search(variant: Variant, rows: list[dict[str, Any]]) -> float | None:
    """A rate to try next if the best one lies at an end of what was tried, at most twice."""
    tried = sorted(row["lr"] for row in rows)
    best = max(rows, key=score)["lr"]
    if len(tried) >= len(variant.rates) + 2 or best not in (tried[0], tried[-1]):
        return None
    return best / 2 if best == tried[0] else best * 2


def run_all(chosen: list[Variant], args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The grid on the first task, then every task and seed at the best rates."""
    grids: dict[str, list[dict[str, Any]]] = {variant.method: [] for variant in chosen}
    first = args.tasks[0]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        todo = [(variant, lr) for variant in chosen for lr in variant.rates]
        while todo:
            jobs = [pool.submit(run, v, first, lr, args.seeds[0], args.search_epochs, args) for v, lr in todo]
            for job in jobs:
                row = job.result()
                grids[row["method"]].append(row)
            todo = [(v, lr) for v in chosen if (lr := search(v, grids[v.method])) is not None]
        rates = {v.method: max(grids[v.method], key=score)["lr"] for v in chosen}
        jobs = [
            pool.submit(run, v, task, rates[v.method], seed, args.epochs, args)
            for task in args.tasks
            for seed in args.seeds
            for v in chosen
        ]
        rows = [job.result() for job in jobs]
    tried = {name: {f"{row['lr']:g}": score(row) for row in found} for name, found in grids.items()}
    return tried, rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell of the table: the seeds of one method on one task."""
    first = rows[0]
    scores = [score(row) for row in rows]
    return {key: first[key] for key in ("task", "method", "lr", "metric", "steps", "parameters")} | {
        "score": statistics.fmean(scores),
        "score_by_seed": scores,
        "scores": [row["scores"] for row in rows],
        "score_before": [row["scores_before"].get(first["metric"]) for row in rows],
        "kept_step": [row["kept_step"] for row in rows],
        "gradient_bytes": first["gradient_bytes"],
        "optimizer_state_bytes": first["optimizer_state_bytes"],
        "step_time_median_s": statistics.median(row["step_time_median_s"] for row in rows),
        "wall_s": statistics.median(row["wall_s"] for row in rows),
    }


def print_table(lines: list[dict[str, Any]], tasks: list[str]) -> None:
    """Scores, memory and time by method."""
    print(f"| method | lr | {' | '.join(tasks)} | mean | gradients + states | step of {tasks[0]} |")
    print("| --- " * (len(tasks) + 5) + "|")
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["task"]: line for line in lines if line["method"] == method}
        scores = [100 * own[task]["score"] for task in tasks]
        held = own[tasks[0]]["gradient_bytes"] + own[tasks[0]]["optimizer_state_bytes"]
        cells = [method, f"{own[tasks[0]]['lr']:g}", *(f"{value:.1f}" for value in scores)]
        cells += [f"{statistics.fmean(scores):.1f}", f"{held / 1e6:.2f} MB"]
        print(f"| {' | '.join(cells)} | {1e3 * own[tasks[0]]['step_time_median_s']:.0f} ms |")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument(
        "--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "cola"], help="the first one is searched"
    )
    parser.add_argument("--methods", nargs="+", default=[variant.method for variant in VARIANTS])
    parser.add_argument("--examples", type=int, default=1600, help="training examples of a task at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--search_epochs", type=int, default=1, help="of the runs that find a rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune_glue"), help="folder of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    chosen = [variant for variant in VARIANTS if variant.method in args.methods]
    tried, rows = run_all(chosen, args)
    cells = [[r for r in rows if (r["task"], r["method"]) == (t, v.method)] for t in args.tasks for v in chosen]
    lines = [summarise(found) for found in cells]
    report = {
        "benchmark": "finetune_glue",
        "model": args.model.name,
        "settings": {
            "training_examples_at_most": args.examples,
            "epochs": args.epochs,
            "batch": 32,
            "schedule": "6% warm-up, then linear to 0",
            "max_length": {task: LENGTHS[task] for task in args.tasks},
            "rates": f"best of a grid on {args.tasks[0]}, {args.search_epochs} epochs, first seed",
            "score": "dev set, best epoch",
            "options": {variant.method: variant.options for variant in chosen},
        },
        "grid": tried,
        "seeds": args.seeds,
        "versions": rows[0]["versions"],
        "hardware": rows[0]["hardware"] | {"runs_at_a_time": args.jobs},
        "date": time.strftime("%Y-%m-%d"),
        "results": lines,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print_table(lines, args.tasks)


if __name__ == "__main__":
    main()
