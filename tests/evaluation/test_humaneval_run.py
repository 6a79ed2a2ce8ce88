"""HumanEval as a task among others: refused without leave, kept in eval.json, gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.run import evaluate
from fullrank.evaluation.table import table
from tests.evaluation.made import write_model

pytest.importorskip("lm_eval")

PROBLEMS = [
    {
        "task_id": f"Test/{number}",
        "prompt": f"def plus_{number}(x):\n",
        "entry_point": f"plus_{number}",
        "test": f"def check(f):\n    assert f(1) == {1 + number}\n",
    }
    for number in range(2)
]


@pytest.fixture
def asked(tmp_path: Path) -> EvaluateConfig:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return EvaluateConfig(
        model=str(write_model(tmp_path / "model")),
        tasks=["humaneval"],
        data={"humaneval": str(path)},
        output_dir=str(tmp_path / "out"),
        max_new_tokens=8,
        device="cpu",
        allow_code_execution=True,
    )


def test_every_program_is_kept(asked: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    result = evaluate(asked)
    entry = result["tasks"]["humaneval"]
    assert (entry["metric"], entry["protocol"], entry["num_examples"]) == ("pass@1", "execution", 2)
    assert entry["metrics"] == {"pass@1": 0.0}
    assert sum(entry["reasons"].values()) == 2
    rows = (Path(asked.output_dir) / "humaneval.jsonl").read_text().splitlines()
    assert len(rows) == 1 + 2
    model = {**result["model"], "base": "huggyllama/llama-7b", "method": "vanilla", "num_parameters": 6.74e9}
    assert "11.3 (SIFT" in table({**result, "model": model})
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)  # a call of it would fail
    assert evaluate(asked) == result


def test_what_is_refused_before_a_model_runs(asked: EvaluateConfig, tmp_path: Path) -> None:
    absent = replace(asked, model=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="allow_code_execution is false"):
        evaluate(replace(absent, allow_code_execution=False))
    with pytest.raises(ConfigError, match="num_samples is 2 at temperature 0"):
        evaluate(replace(absent, num_samples=2))
    with pytest.raises(ConfigError, match="no file to read"):
        evaluate(replace(absent, data={"humaneval": str(tmp_path / "absent.jsonl")}))
    with pytest.raises(ConfigError, match=r"max_new_tokens is 600 behind a prompt.*takes 512"):
        evaluate(replace(asked, max_new_tokens=600))
    assert not (tmp_path / "out").exists()
