"""Invented runs, for tests of what a report shows: no training, any outcome."""

from __future__ import annotations

import math
import random
from typing import Any

from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.runs import Curve, Run

STEPS = 400
TOKENS_A_STEP = 1024
POINTS = 50
MEMORY = {"full": (16.9, 16.9, 33.7), "fira": (16.9, 16.9, 16.6), "lora": (21.8, 9.2, 18.4), "sift": (16.9, 0.8, 1.7)}
"""Weights, gradients and optimizer state of a method (MB)."""
BEST_LOSS = {"full": 5.44, "fira": 4.74, "lora": 5.71, "sift": 5.9, "apollo": 4.78, "relora": 5.2, "galore": 4.77}


def invented_run(
    label: str,
    *,
    method: str | None = None,
    lr: float = 0.01,
    seed: int = 1,
    outcome: str = "finished",
    note: str = "",
    loss: float | None = None,
    task: str | None = None,
    accuracy: float | None = None,
) -> Run:
    """A run whose curves fall to ``loss``; one with an accuracy is of a fine-tuning task."""
    method = method or label
    final = loss if loss is not None else BEST_LOSS.get(method, 5.0) + 0.4 * abs(math.log2(lr / 0.01))
    finished = outcome == "finished"
    result = _result(method, seed, final, task, accuracy) if finished else None
    return Run(
        label=label,
        method=method,
        lr=lr,
        seed=seed,
        outcome=outcome,
        note=note,
        config=_config(method, lr, seed, task),
        result=result,
        train=_curve(POINTS, final, seed, until=1.0 if finished else 0.4),
        validation=_curve(9, final, seed, until=1.0 if finished else 0.4),
    )


def _curve(count: int, final: float, seed: int, *, until: float) -> Curve:
    noise = random.Random(seed)
    places = [place / (count - 1) for place in range(count) if place / (count - 1) <= until]
    return Curve(
        step=[round(STEPS * place) for place in places],
        tokens=[round(STEPS * place) * TOKENS_A_STEP for place in places],
        time_s=[STEPS * place * 0.29 for place in places],
        loss=[final + (7.68 - final) * math.exp(-5 * place) + noise.uniform(-0.01, 0.01) for place in places],
    )


def _config(method: str, lr: float, seed: int, task: str | None) -> dict[str, Any]:
    own = {} if method == "full" else {"rank": 64, "target_modules": ["attn", "mlp"]}
    return {
        "model": {"name": "llama-20m", "pretrained": task is not None, "dtype": "float32", "overrides": {}},
        "data": {"name": "text.jsonl.gz", "task": task, "tokenizer": "bpe", "vocab_size": 2048, "sequence_length": 128},
        "method": {"name": method, "lr": lr, "betas": [0.9, 0.999], **own},
        "trainer": {"max_steps": STEPS, "per_device_train_batch_size": 8},
        "seed": seed,
        "output_dir": f"{method}-lr{lr}-seed{seed}",
    }


def _result(method: str, seed: int, loss: float, task: str | None, accuracy: float | None) -> dict[str, Any]:
    weights, gradients, state = (int(1e6 * part) for part in MEMORY.get(method, MEMORY["fira"]))
    scores = {"loss": loss, "perplexity": math.exp(loss)} if accuracy is None else {"loss": loss, "accuracy": accuracy}
    return {
        "method": method,
        "model": "llama-20m",
        "task": task or "pretrain",
        "seed": seed,
        "steps": STEPS,
        "tokens": STEPS * TOKENS_A_STEP,
        "metric": "loss" if accuracy is None else "accuracy",
        "scores": scores,
        "parameters": 4_212_992,
        "weight_bytes": weights,
        "gradient_bytes": gradients,
        "optimizer_state_bytes": state,
        "peak_memory_bytes": 900_000_000,
        "step_time_median_s": 0.29,
        "versions": {"python": "3.11.7", "fullrank": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "AMD EPYC", "threads": 1},
    }


def sweep(title: str = "llama-20m on text: seven methods and a variant") -> Comparison:
    """Seven methods and a variant over four rates, three seeds at the best, with runs that did not finish."""
    runs = []
    for label, method in [*((name, name) for name in BEST_LOSS), ("fira-svd", "fira")]:
        rates = (0.0025, 0.005, 0.01, 0.02) if label != "full" else (0.0025, 0.005, 0.01)
        shift = 0.03 if label == "fira-svd" else 0.0
        for lr in rates:
            ended = {("lora", 0.02): "diverged", ("galore", 0.02): "stopped", ("relora", 0.0025): "failed"}
            outcome = ended.get((label, lr), "finished")
            best = BEST_LOSS[method] + shift + 0.15 * abs(math.log2(lr / 0.01)) ** 1.5
            note = "" if outcome == "finished" else f"validation loss 7.1 at step {STEPS // 3}, 0.9 above the best"
            runs.append(invented_run(label, method=method, lr=lr, outcome=outcome, note=note, loss=best))
        for seed in (2, 3):
            noise = random.Random(f"{label}{seed}").uniform(-0.02, 0.02)
            runs.append(invented_run(label, method=method, lr=0.01, seed=seed, loss=BEST_LOSS[method] + shift + noise))
    return compare_runs(runs, title=title)
