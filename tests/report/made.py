"""Folders of runs made by hand: the files that a run leaves, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MODEL = "llama-20m"
MB = 10**6


def write_run(
    folder: Path,
    method: str = "fira",
    *,
    lr: float = 0.01,
    seed: int = 1,
    perplexity: float | None = 30.0,
    scores: dict[str, float] | None = None,
    metric: str = "loss",
    task: str | None = None,
    outcome: dict[str, str] | None = None,
    steps: int = 20,
    older: bool = False,
    config: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """A run's folder; without a perplexity and without scores it has no result.

    Args:
        folder: Folder to make.
        method: Name of the method.
        lr: Its rate.
        seed: The run's seed.
        perplexity: Its score, as of pre-training.
        scores: Instead: all metrics of its validation.
        metric: The metric of its task.
        task: A fine-tuning task; None: pre-training.
        outcome: Content of outcome.json.
        steps: Training rows; step 0 and each tenth step are scored.
        older: As older versions wrote it: no train_time_s, no weight_bytes.
        config: Sections to merge into config.yaml.
        result: Entries of result.json.
    """
    folder.mkdir(parents=True)
    sections: dict[str, Any] = {
        "model": {"name": MODEL, "dtype": "float32", "overrides": {}},
        "data": {"name": "/some/where/text.jsonl", "tokenizer": "bpe", "vocab_size": 2048, "sequence_length": 128},
        "method": {"name": method, "lr": lr, "rank": 8},
        "trainer": {"max_steps": steps, "logging_steps": 1.0, "disable_tqdm": True},
    }
    if task is not None:
        sections["data"]["task"] = task
    for name, values in (config or {}).items():
        sections[name] |= values
    content = {**sections, "seed": seed, "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    write_rows(folder, steps=steps, older=older)
    if outcome is not None:
        (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    if perplexity is not None or scores is not None:
        found = scores if scores is not None else {"loss": 3.4, "perplexity": perplexity}
        made = {
            "method": method,
            "seed": seed,
            "steps": steps,
            "tokens": 1000 * steps,
            "metric": metric,
            "scores": found,
            "parameters": 4_000_000,
            "optimizer_state_bytes": 16 * MB,
            "gradient_bytes": 17 * MB,
            "peak_memory_bytes": (900 + seed) * MB,
            "step_time_median_s": 0.5,
            "sample": "/no/path but text",
            "folder": str(folder),
            "versions": {"torch": "2.13.0"},
            "hardware": {"device": "a CPU", "threads": 1, "processes": 1},
            **({} if older else {"weight_bytes": 17 * MB}),
        }
        (folder / "result.json").write_text(json.dumps(made | (result or {})), encoding="utf-8")
    return folder


def write_rows(folder: Path, *, steps: int, older: bool = False) -> None:
    """A metrics.jsonl whose loss falls from 8 to 4; a step takes half a second, the first a second more."""
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 8.0, "perplexity": 2981.0}]
    for step in range(1, steps + 1):
        took = 1.5 if step == 1 else 0.5
        row = {"step": step, "loss": 4 + 4 / step, "tokens": 1000 * step, "step_time_s": took}
        rows.append(row if older else row | {"train_time_s": 1.0 + 0.5 * step})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": 4.1 + 4 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
