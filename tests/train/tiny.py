"""A model and a text so small that a whole run takes a second or two, and what two runs are compared by."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fullrank.train.report import read_metrics

WORDS = ("low", "rank", "gradient", "basis", "weight", "moment", "scale", "step", "matrix", "norm", "tall", "wide")

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {"lr": 0.003},
    "galore": {"lr": 0.01, "rank": 4, "update_proj_gap": 7},
    "fira": {"lr": 0.01, "rank": 4, "update_proj_gap": 7},
    "apollo": {"lr": 0.01, "rank": 4, "update_proj_gap": 7},
    "relora": {"lr": 0.01, "rank": 4, "lora_alpha": 8, "restart_every": 6, "restart_warmup_steps": 2},
    "lora": {"lr": 0.01, "rank": 4, "lora_alpha": 8},
    "sift": {"lr": 0.01, "density": 0.3, "exception": ["embed_tokens", "lm_head"]},
}


def write_text(path: Path, *, documents: int = 300, seed: int = 0) -> Path:
    """A jsonl file of documents made of a few words."""
    draw = random.Random(seed)
    lines = [f'{{"text": "{" ".join(draw.choices(WORDS, k=draw.randint(5, 60)))}"}}' for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(text: Path, folder: Path, method: str = "fira", **trainer: Any) -> dict[str, Any]:
    """The configuration of a tiny run, as the content of a recipe."""
    return {
        "model": {
            "name": "llama-9m",
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
        "data": {"name": str(text), "vocab_size": 300, "sequence_length": 32, "validation_tokens": 1500},
        "method": {"name": method, **METHOD_OPTIONS[method]},
        "trainer": {
            "max_steps": 20,
            "warmup_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "eval_steps": 10,
            "save_steps": 5,
            "use_cpu": True,
            "disable_tqdm": True,
            **trainer,
        },
        "output_dir": str(folder),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run."""
    return load_file(folder / "model" / "model.safetensors")


MEASURED = ("step_time_s", "train_time_s", "memory_bytes")
"""What in a row of the metrics depends on the machine."""


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what depends on the machine."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal metrics and bit-equal weights."""
    assert trajectory(one) == trajectory(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
