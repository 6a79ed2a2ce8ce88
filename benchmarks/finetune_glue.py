"""Every method on tasks of GLUE through ``fullrank finetune``: one encoder, one loop, the same examples.

    python benchmarks/finetune_glue.py --model all-MiniLM-L6-v2 --data glue --output result.json

``--data`` holds the tasks as GLUE distributes them. Learning rates were set beforehand, one a method, and not searched;
with several, each runs with the first seed and the best on the dev set with the others. A score is that of the dev
set at the best epoch: as the papers report it, and as such an optimistic one, alike for all. Every finished run is
kept in ``--work``, so an interrupted benchmark goes on where it was. Writes JSON with the environment and prints the
table.
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
    Variant("full", (1e-4,)),
    Variant("lora", (2e-3,), FACTORS),
    Variant("relora", (2e-3,), FACTORS | {"restart_every": 40, "restart_warmup_steps": 5}),
    Variant("sift", (2e-3,), {"target_modules": TARGETS, "density": 0.01, "exception": ["classifier", "pooler"]}),
    Variant("fira", (3e-4,), PROJECTED),
    Variant("galore", (1e-3,), PROJECTED),
]


def recipe(variant: Variant, task: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
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
            "num_train_epochs": args.epochs,
            "warmup_steps": 0.06,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
            "train_sampling_strategy": "group_by_length",
            "save_total_limit": 2,
            "disable_tqdm": True,
        },
        "seed": seed,
    }


def run(variant: Variant, task: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read the result of an earlier call."""
    import torch
    import transformers

    from fullrank.train.resolve import resolve
    from fullrank.train.run import finetune

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    name = f"{task}-{variant.method}-{lr:g}-{seed}-{args.examples}x{args.epochs}"
    kept = args.work / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    folder = args.work / "runs" / f"{name}-{time.time_ns()}"
    begin = time.perf_counter()
    content = recipe(variant, task, lr, seed, args) | {"output_dir": str(folder)}
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


def run_all(chosen: list[Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every rate with the first seed, then the other seeds at the best one; a cell of the table each."""
    cells = [(task, variant) for task in args.tasks for variant in chosen]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {
            (task, variant.method): [pool.submit(run, variant, task, lr, args.seeds[0], args) for lr in variant.rates]
            for task, variant in cells
        }
        grids = {key: [job.result() for job in submitted] for key, submitted in jobs.items()}
        best = {key: max(rows, key=score) for key, rows in grids.items()}
        again = {
            (task, v.method): [pool.submit(run, v, task, best[task, v.method]["lr"], n, args) for n in args.seeds[1:]]
            for task, v in cells
        }
        rows = {key: [best[key], *(job.result() for job in submitted)] for key, submitted in again.items()}
    return [
        summarise(found) | {"grid": {f"{row['lr']:g}": score(row) for row in grids[key]}} for key, found in rows.items()
    ]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell of the table: the seeds of one method on one task."""
    first = rows[0]
    scores = [score(row) for row in rows]
    same = ("task", "method", "lr", "metric", "steps", "parameters", "versions", "hardware")
    return {key: first[key] for key in same} | {
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
    print(f"| method | {' | '.join(tasks)} | mean | gradients + states | step of {tasks[0]} |")
    print("| --- " * (len(tasks) + 4) + "|")
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["task"]: line for line in lines if line["method"] == method}
        scores = [100 * own[task]["score"] for task in tasks]
        held = own[tasks[0]]["gradient_bytes"] + own[tasks[0]]["optimizer_state_bytes"]
        cells = [method, *(f"{value:.1f}" for value in scores)]
        cells += [f"{statistics.fmean(scores):.1f}", f"{held / 1e6:.2f} MB"]
        print(f"| {' | '.join(cells)} | {1e3 * own[tasks[0]]['step_time_median_s']:.0f} ms |")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an encoder with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "mrpc", "cola"])
    parser.add_argument("--methods", nargs="+", default=[variant.method for variant in VARIANTS])
    parser.add_argument("--examples", type=int, default=1600, help="training examples of a task at most")
    parser.add_argument("--epochs", type=int, default=2)
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
    lines = run_all(chosen, args)
    report = {
        "benchmark": "finetune_glue",
        "model": args.model.name,
        "settings": {
            "training_examples_at_most": args.examples,
            "epochs": args.epochs,
            "batch": 32,
            "schedule": "6% warm-up, then linear to 0",
            "max_length": {task: LENGTHS[task] for task in args.tasks},
            "rates": "one a method, set beforehand; of several the best on dev with the first seed",
            "score": "dev set, best epoch",
            "options": {variant.method: variant.options for variant in chosen},
        },
        "seeds": args.seeds,
        "versions": lines[0]["versions"],
        "hardware": lines[0]["hardware"] | {"runs_at_a_time": args.jobs},
        "date": time.strftime("%Y-%m-%d"),
        "results": [
            {key: value for key, value in line.items() if key not in ("versions", "hardware")} for line in lines
        ],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print_table(lines, args.tasks)


if __name__ == "__main__":
    main()
