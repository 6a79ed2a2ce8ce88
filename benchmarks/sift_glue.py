"""Accuracy of SIFT on GLUE beside full fine-tuning and LoRA: one encoder, one loop, the same batches.

    python benchmarks/sift_glue.py --model all-MiniLM-L6-v2 --data glue --output result.json

``--data`` holds SST-2 and MRPC as GLUE distributes them, each with train.tsv and dev.tsv. Each variant runs a
small grid of learning rates with the first seed on the first task, for ``--search_epochs``; its best rate is what
every seed then trains with in full, and what the other tasks use (``--search all``: a grid on each task). If the
best rate lies at an end of the grid, the grid is extended by up to two. A score is the accuracy on dev after the
last step, never the best on the way. Every finished run is kept in ``--work``, so an interrupted benchmark goes on
where it was. Writes JSON with the environment and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from glue import TASKS, Data
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup
from transformers.utils import logging

from fullrank import SIFT
from fullrank.train.report import hardware, versions

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
LAYERS = "encoder.layer"
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.06, 0.01, 1.0


@dataclass(frozen=True)
class Variant:
    """What trains, and the learning rates to try, ascending."""

    name: str
    rates: tuple[float, ...]
    selection: str | None = None
    """SIFT's choice of entries; None where the variant is not SIFT."""


VARIANTS = [
    Variant("full", (5e-5, 1e-4, 2e-4)),
    Variant("sift, gradient", (1e-3, 2e-3, 4e-3), "gradient"),
    Variant("sift, random", (1e-3, 2e-3, 4e-3), "random"),
    Variant("lora", (1e-3, 2e-3, 4e-3)),
]


def sift_count(model: nn.Module, density: float) -> int:
    """Entries that SIFT trains at this density."""
    weights = [p for name, p in model.named_parameters() if is_target(name)]
    return sum(min(int(density * p.numel()) + 1, p.numel()) for p in weights)


def is_target(name: str) -> bool:
    """Whether this parameter is the matrix of one of the six linears of a layer."""
    return LAYERS in name and any(name.endswith(f"{target}.weight") for target in TARGETS)


def lora_config(model: nn.Module, head: list[str], density: float) -> LoraConfig:
    """LoRA on the same matrices, of the lowest rank that trains no less than SIFT does."""
    matrices = [module for name, module in model.named_modules() if is_target(f"{name}.weight")]
    of_rank_1 = sum(module.in_features + module.out_features for module in matrices)
    rank = math.ceil(sift_count(model, density) / of_rank_1)
    modules = rf".*{LAYERS}.*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, modules_to_save=head, task_type="SEQ_CLS")


def prepare(
    model: nn.Module, variant: Variant, seed: int, args: argparse.Namespace
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Set up what trains: the model to call, and what to give to the optimizer.

    The classifier trains densely in every variant; the pooler in full fine-tuning only, if not asked for.
    """
    head = ["classifier", "pooler"] if args.pooler else ["classifier"]
    if variant.selection:
        names = [name for name, _ in model.named_parameters() if is_target(name)]
        sift = SIFT(model, args.density, names, head, selection=variant.selection, seed=seed)
        return model, list(sift.parameters_in_optimizer())
    if variant.name == "lora":
        model = get_peft_model(model, lora_config(model, head, args.density))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def held_bytes(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes after a step: of the gradients, of Adam's moments, and of what else lies in the optimizer's state.

    That is SIFT's index, its values and the first values of its entries (in host memory, for the adapter). A
    storage counts once.
    """
    sizes = {"gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None), "moments": 0, "other": 0}
    seen = set()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                sizes["moments" if key.startswith("exp_avg") else "other"] += value.nbytes
    return sizes


def train(
    model: nn.Module, parameters: list[nn.Parameter], data: Data, lr: float, seed: int, epochs: int
) -> dict[str, Any]:
    """The loop of every variant."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    total = data.num_steps(epochs)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(WARMUP * total), total)
    generator = torch.Generator().manual_seed(seed)
    times, cpu_times, losses, held = [], [], [], {}
    for _ in range(epochs):
        model.train()
        for inputs, labels in data.epoch(generator):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            times.append(time.perf_counter() - begin)
            cpu_times.append(time.process_time() - cpu_begin)  # unlike the wall, blind to what else the machine does
            losses.append(loss.item())
            if len(losses) == 2:
                held = held_bytes(parameters, optimizer)
            scheduler.step()
            optimizer.zero_grad()
    last = losses[-max(1, total // 10) :]
    return {
        "loss": statistics.fmean(last),
        "steps": total,
        "bytes": held,
        "step_s": statistics.median(times),
        "step_cpu_s": statistics.median(cpu_times),
    }


def run(variant: Variant, data: Data, lr: float, seed: int, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read the result of an earlier call."""
    how = f"{args.density:g}{'-pooler' if args.pooler else ''}-{len(data.train)}x{epochs}"
    name = f"{data.task.name}-{variant.name.replace(', ', '+')}-{how}-{lr:g}-{seed}"
    kept = args.work / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    begin = time.perf_counter()
    torch.manual_seed(seed)  # the classifier's first values, the same for every variant
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32, num_labels=2)
    model, parameters = prepare(model, variant, seed, args)
    torch.manual_seed(seed)  # dropout
    row = {"task": data.task.name, "variant": variant.name, "lr": lr, "seed": seed}
    row["trainable"] = sum(p.numel() for p in parameters)
    row |= train(model, parameters, data, lr, seed, epochs)
    found = data.predict(model)
    row["accuracy"] = 100 * float(accuracy_score(data.dev_labels, found))
    row["f1"] = 100 * float(f1_score(data.dev_labels, found))
    row["wall_s"] = time.perf_counter() - begin
    kept.write_text(json.dumps(row))
    print(f"{row['accuracy']:6.2f}  {name}  loss {row['loss']:.3f}  {row['step_s']:.3f} s a step", flush=True)
    return row


def grid(variant: Variant, data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every rate with the first seed, shortly; up to two more if the best one lies at an end."""
    rates = args.rates.get(variant.name, variant.rates)
    rows = [run(variant, data, lr, args.seeds[0], args.search_epochs, args) for lr in rates]
    for _ in range(args.extend):
        tried = sorted(row["lr"] for row in rows)
        best = best_of(rows)["lr"]
        if best not in (tried[0], tried[-1]):
            break
        further = best / 2 if best == tried[0] else best * 2
        rows.append(run(variant, data, further, args.seeds[0], args.search_epochs, args))
    return rows


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the highest accuracy; of equals the one with the lower training loss."""
    return max(rows, key=lambda row: (row["accuracy"], -row["loss"]))


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: the seeds of one variant on one task at one rate."""
    line = {key: rows[0][key] for key in ("task", "variant", "lr", "trainable", "steps", "bytes")}
    for key in ("accuracy", "f1") if rows[0]["task"] == "MRPC" else ("accuracy",):
        values = [row[key] for row in rows]
        line[key], line[f"{key}_by_seed"] = statistics.fmean(values), values
        line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    for key in ("step_s", "step_cpu_s"):
        line[key] = statistics.median(row[key] for row in rows)
    line["loss_by_seed"] = [row["loss"] for row in rows]
    return line


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs; the grid first, then the further seeds, task by task."""
    chosen = [variant for variant in VARIANTS if variant.name in args.variants]
    rates: dict[str, float] = {}
    lines = []
    for place, name in enumerate(args.tasks):
        data = Data(next(task for task in TASKS if task.name == name), args.data, args.model, args.examples)
        tried: dict[str, dict[str, float]] = {}
        for variant in chosen if place == 0 or args.search == "all" else ():
            rows = grid(variant, data, args)
            rates[variant.name] = best_of(rows)["lr"]
            tried[variant.name] = {f"{row['lr']:g}": row["accuracy"] for row in sorted(rows, key=lambda row: row["lr"])}
        found: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
        for seed in args.seeds:
            for variant in chosen:
                found[variant.name].append(run(variant, data, rates[variant.name], seed, args.epochs[place], args))
        lines += [summarise(rows) | {"grid": tried.get(name)} for name, rows in found.items()]
    return lines


def print_table(lines: list[dict[str, Any]]) -> None:
    """The results as markdown."""
    columns = ["task", "variant", "lr", "accuracy (mean ± std)", "each seed", "F1", "trainable"]
    columns += ["gradients + states", "CPU time of a step"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for line in lines:
        spread = "" if line["accuracy_std"] is None else f" ± {line['accuracy_std']:.1f}"
        cells = [
            line["task"],
            line["variant"],
            f"{line['lr']:g}",
            f"{line['accuracy']:.1f}{spread}",
            " ".join(f"{value:.1f}" for value in line["accuracy_by_seed"]),
            f"{line['f1']:.1f}" if "f1" in line else "",
            f"{line['trainable']:,}",
            f"{sum(line['bytes'].values()) / 1e6:.2f} MB",
            f"{1e3 * line['step_cpu_s']:.0f} ms",
        ]
        print(f"| {' | '.join(cells)} |")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    where = "each task" if args.search == "all" else f"{args.tasks[0]}; the other tasks use the same"
    return {
        "targets": TARGETS,
        "density": args.density,
        "trained_densely": "classifier and pooler" if args.pooler else "classifier",
        "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, {WARMUP:.0%} warm-up, then linear to 0",
        "max_grad_norm": MAX_GRAD_NORM,
        "training_examples_at_most": args.examples,
        "epochs": dict(zip(args.tasks, args.epochs, strict=True)),
        "batch": {task.name: task.batch for task in TASKS},
        "max_length": {task.name: task.max_length for task in TASKS},
        "rates": f"chosen on dev with the first seed and {args.search_epochs} epochs on {where}",
        "score": "dev after the last step",
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS], help="the first one is searched")
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    parser.add_argument(
        "--rates", type=json.loads, default={}, help="grids to use instead, as JSON: {variant: [rates]}"
    )
    parser.add_argument("--density", type=float, default=0.01, help="share of the entries that SIFT trains")
    parser.add_argument("--examples", type=int, default=8000, help="training examples of a task at most, 0: all")
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 3], help="of each task")
    parser.add_argument("--search_epochs", type=int, default=1, help="of the runs that find a rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--search", choices=("first", "all"), default="first", help="tasks with a grid of their own")
    parser.add_argument("--extend", type=int, default=2, help="rates by which a grid may be extended")
    parser.add_argument("--pooler", action="store_true", help="train the pooler densely as well, in every variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/sift_glue"), help="folder of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    if len(args.epochs) != len(args.tasks):
        parser.error("--epochs needs one number for each task")
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    lines = benchmark(args)
    report = {
        "benchmark": "sift_glue",
        "model": args.model.name,
        "settings": settings(args),
        "seeds": args.seeds,
        "versions": versions() | {"peft": version("peft")},
        "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
        "results": lines,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print_table(lines)


if __name__ == "__main__":
    main()
