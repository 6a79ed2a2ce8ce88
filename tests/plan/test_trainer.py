"""A plan of a run's folder against the run itself: the same command, Trainer and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank import memory
from fullrank.plan import PlanOptions, plan
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import recipe, write_text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        ("fira", {}),
        ("lora", {"gradient_checkpointing": True}),
        ("full", {"bf16": True}),
        ("galore", {"total_batch_size": 16}),
    ],
    ids=str,
)
def test_the_peak_of_a_run(
    method: str, trainer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    content = recipe(write_text(tmp_path / "text.jsonl"), tmp_path, method, **trainer)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4}
    content["model"]["overrides"] |= shape
    content["data"]["sequence_length"] = 128
    content["trainer"] |= {
        "max_steps": 3,
        "save_strategy": "no",
        "eval_strategy": "no",
        "per_device_eval_batch_size": 1,
    }
    folder = tmp_path / "run"
    config = resolve(content | {"output_dir": str(folder)})
    with memory.tracked_peak() as tracked:
        assert pretrain(config) is not None
    found = plan(PlanOptions(config=str(folder), vocab_size=300)).rows[method].usage
    assert found.source == "traced"
    assert found.peak == pytest.approx(tracked.peak, rel=0.1)
