"""Every method on commonsense questions: one language model, scored before and after by both protocols.

    python benchmarks/finetune_commonsense.py --model stories260K-hf --data commonsense --output result.json

``--data`` holds the folders of LLM-Adapters. Trains on the training files of ``--train``, scores on the test files of
``--tests``: by the harness's likelihood ranking, and by the authors' generate-and-parse. Learning rates were set
beforehand, one for methods that train weights and one for those that train factors or entries; with several, the best
by the loss on held-out training rows is what is scored, so the test files choose nothing. Every finished run is kept
in ``--work``. Writes JSON with the environment and prints the table.
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

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""What the authors' fine-tuning script trains."""
FOLDERS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
PROTOCOLS = ("ranking", "generate")
KEPT = ("eval_loss", "scores_before", "steps", "tokens", "gradient_bytes", "optimizer_state_bytes", "parameters")
KEPT += ("adamw_state_bytes", "step_time_median_s", "folder", "versions", "hardware")


@dataclass(frozen=True)
class Variant:
    """A method with its options, and the learning rates to try."""

    name: str
    method: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


def variants(rank: int) -> list[Variant]:
    """All methods; factors have the rank, a subspace of the weights too, one of the factors half of it."""
    factors = {"rank": rank, "lora_alpha": 2.0 * rank, "target_modules": TARGETS}
    inside = {"rank": rank, "target_modules": TARGETS, "update_proj_gap": 50, "alpha": 1.0}
    on_factors = inside | {"rank": rank // 2, "lora_rank": rank, "lora_alpha": 2.0 * rank}
    low, high = (1e-3,), (1e-2,)
    return [
        Variant("full", "full", low),
        Variant("lora", "lora", high, factors),
        Variant("relora", "relora", high, factors | {"restart_every": 60, "restart_warmup_steps": 10}),
        Variant("sift", "sift", high, {"density": 0.05, "target_modules": TARGETS}),
        Variant("fira", "fira", low, inside),
        Variant("galore", "galore", low, inside),
        Variant("fira on LoRA's factors", "fira", high, on_factors),
        Variant("galore on LoRA's factors", "galore", high, on_factors),
    ]


def recipe(variant: Variant, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    return {
        "model": {"name": str(args.model)},
        "data": {
            "name": str(args.work / "train.json"),
            "prompt_template": args.prompt_template,
            "sequence_length": args.sequence_length,
            "validation_size": 200,
            "max_examples": args.examples,
        },
        "method": {"name": variant.method, "lr": lr, **variant.options},
        "trainer": {
            "num_train_epochs": args.epochs,
            "warmup_steps": 0.06,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 32,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        "seed": args.seed,
    }


def train(variant: Variant, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train once, or read the result of an earlier call."""
    import torch
    import transformers

    from fullrank.train.resolve import resolve
    from fullrank.train.run import finetune

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    kept = args.work / f"{slug(variant.name)}-{lr:g}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    folder = args.work / "runs" / f"{slug(variant.name)}-{lr:g}"
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was interrupted
    result = finetune(resolve(recipe(variant, lr, args) | {"output_dir": str(folder)}, command="finetune"))
    assert result is not None
    row = {"variant": variant.name, "method": variant.method, "lr": lr} | {key: result[key] for key in KEPT}
    kept.write_text(json.dumps(row))
    print(f"{row['eval_loss']:8.4f}  {variant.name}, lr {lr:g}", flush=True)
    return row


def test(name: str, model: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Scores of a model on every test file, by protocol and task."""
    import torch

    from fullrank.evaluation.config import EvaluateConfig
    from fullrank.evaluation.run import evaluate

    torch.set_num_threads(args.threads)
    found: dict[str, dict[str, Any]] = {}
    for protocol in PROTOCOLS:
        config = EvaluateConfig(
            model=model,
            tasks=args.tests,
            data={"commonsense": str(args.data)},
            protocol=protocol,
            prompt_template=args.prompt_template,
            limit=args.limit,
            batch_size=args.eval_batch,
            output_dir=str(args.work / "eval" / f"{slug(name)}-{protocol}"),
        )
        found[protocol] = evaluate(config)["tasks"]
    print(f"scored {name}", flush=True)
    return found


def slug(name: str) -> str:
    """A name for files."""
    return name.replace(" ", "_").replace("'", "")


def prepare(args: argparse.Namespace) -> None:
    """The training rows in one file, in the order of the files."""
    rows = [row for name in args.train for row in json.loads((args.data / name / "train.json").read_text())]
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    (args.work / "train.json").write_text(json.dumps(rows))


def run_all(chosen: list[Variant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid, and the scores of the start and of each method's best."""
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        start = pool.submit(test, "start", str(args.model), args)
        jobs = [pool.submit(train, variant, lr, args) for variant in chosen for lr in variant.rates]
        rows = [job.result() for job in jobs]
        best = {
            variant.name: min((row for row in rows if row["variant"] == variant.name), key=lambda row: row["eval_loss"])
            for variant in chosen
        }
        scored = {name: pool.submit(test, name, row["folder"], args) for name, row in best.items()}
        lines = [{"variant": "before", "method": None, "tests": start.result()}]
        for name, row in best.items():
            grid = {f"{other['lr']:g}": other["eval_loss"] for other in rows if other["variant"] == name}
            lines.append(row | {"grid": grid, "tests": scored[name].result()})
    return lines


def score(line: dict[str, Any], protocol: str, task: str) -> float:
    """The headline score of a task, in percent."""
    outcome = line["tests"][protocol][task]
    return 100 * float(outcome["metrics"][outcome["metric"]])


def print_table(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Scores by protocol, memory and time."""
    columns = [f"{task}, {protocol}" for protocol in PROTOCOLS for task in args.tests]
    print(f"| method | lr | loss | {' | '.join(columns)} | gradients + states | step |")
    print("| --- " * (len(columns) + 5) + "|")
    for line in lines:
        scores = [f"{score(line, protocol, task):.1f}" for protocol in PROTOCOLS for task in args.tests]
        if line["method"] is None:
            print(f"| {line['variant']} | | | {' | '.join(scores)} | | |")
            continue
        held = line["gradient_bytes"] + line["optimizer_state_bytes"]
        head = [line["variant"], f"{line['lr']:g}", f"{line['eval_loss']:.3f}"]
        print(f"| {' | '.join([*head, *scores, f'{held / 1e6:.2f} MB'])} | {1e3 * line['step_time_median_s']:.0f} ms |")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a causal language model with its tokenizer"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with LLM-Adapters' folders")
    parser.add_argument("--train", nargs="+", default=["boolq", "ARC-Easy"], help="folders whose train.json is used")
    parser.add_argument("--tests", nargs="+", default=["boolq", "arc_easy"], help="tasks to score")
    parser.add_argument("--methods", nargs="+", help="names of variants; default: all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt_template", default="plain")
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--examples", type=int, default=1600, help="training rows at most")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="rows of each test file")
    parser.add_argument("--eval_batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune_commonsense"), help="folder of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    prepare(args)
    chosen = [variant for variant in variants(args.rank) if args.methods is None or variant.name in args.methods]
    lines = run_all(chosen, args)
    report = {
        "benchmark": "finetune_commonsense",
        "model": args.model.name,
        "settings": {
            "train": args.train,
            "training_rows_at_most": args.examples,
            "epochs": args.epochs,
            "batch": 16,
            "sequence_length": args.sequence_length,
            "prompt_template": args.prompt_template,
            "loss": "on the answer alone",
            "rates": "set beforehand; of several the best by the loss on 200 held-out training rows",
            "test_rows_at_most": args.limit,
            "options": {variant.name: variant.options for variant in chosen},
        },
        "seed": args.seed,
        "versions": lines[-1]["versions"],
        "hardware": lines[-1]["hardware"] | {"runs_at_a_time": args.jobs},
        "date": time.strftime("%Y-%m-%d"),
        "results": [{key: value for key, value in line.items() if key != "folder"} for line in lines],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1))
    print_table(lines, args)
    print(f"mean step {statistics.fmean(line['step_time_median_s'] for line in lines[1:]):.3f} s")


if __name__ == "__main__":
    main()
