"""What a comparison removes when it has ended, and what it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank.compare.config import CompareConfig
from fullrank.compare.run import clear, find_folder, refuse_without_scores
from fullrank.compare.search import Ended
from fullrank.compare.sweep import Sweep
from fullrank.compare.variants import Spec, make_variants
from fullrank.errors import ConfigError
from fullrank.report.comparison import compare_runs
from fullrank.report.runs import read_run
from tests.report.made import write_run


def left(tmp_path: Path, keep: Any, scores: dict[float, float | None]) -> dict[str, set[str]]:
    """What stays of the folders of runs at these rates; None: the run failed."""
    options = CompareConfig(methods=["fira"], lr_grid={"all": list(scores)}, keep_models=keep)
    sweep = Sweep(make_variants(options), [1], tmp_path, options, keep_open=0, greater_is_better=False)
    runs = []
    for lr, score in scores.items():
        spec = Spec("fira", lr, 1)
        outcome = {"outcome": "failed", "note": "ended by SIGKILL"} if score is None else None
        folder = write_run(tmp_path / "runs" / spec.name, lr=lr, perplexity=score, outcome=outcome)
        for name in ("model", "checkpoint-10"):
            (folder / name).mkdir()
        sweep.ended[spec] = Ended("failed" if score is None else "finished", score)
        runs.append(read_run(folder, label="fira"))
    clear(compare_runs(runs, title="clear"), sweep)
    return {
        path.name: {name for name in ("model", "checkpoint-10") if (path / name).is_dir()}
        for path in (tmp_path / "runs").iterdir()
    }


@pytest.mark.parametrize(
    ("keep", "best", "worse"), [("best", {"model"}, set()), ("all", {"model"}, {"model"}), ("none", set(), set())]
)
def test_checkpoints_go_and_the_models_that_are_wanted_stay(
    tmp_path: Path, keep: str, best: set[str], worse: set[str]
) -> None:
    found = left(tmp_path, keep, {0.1: 30.0, 0.2: 20.0})
    assert found == {"fira-lr0.1-seed1": worse, "fira-lr0.2-seed1": best}


@pytest.mark.parametrize("keep", ["best", "none"])
def test_a_failed_run_keeps_what_it_can_be_tried_again_from(tmp_path: Path, keep: str) -> None:
    found = left(tmp_path, keep, {0.1: 30.0, 0.2: None})
    assert found["fira-lr0.2-seed1"] == {"model", "checkpoint-10"}


def test_without_a_score_none_is_the_best_and_all_stay(tmp_path: Path) -> None:
    found = left(tmp_path, "best", {0.1: float("inf"), 0.2: float("inf")})
    assert all("model" in names for names in found.values())


def test_several_rates_need_validation_examples() -> None:
    """Instructions come without any unless asked for."""
    config = CompareConfig(config="finetune/alpaca-7b-lora", methods=["lora"])
    given = {"model.name": "llama-60m", "data.name": "examples.json"}
    with pytest.raises(ConfigError, match="no validation examples"):
        refuse_without_scores(make_variants(config, given | {"data.validation_size": 0}))
    refuse_without_scores(make_variants(config, given | {"data.validation_size": 10}))


def test_a_folder_with_runs_of_something_else_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        find_folder(CompareConfig(output_dir=str(tmp_path)))
    (tmp_path / "compare.yaml").write_text("")
    assert find_folder(CompareConfig(output_dir=str(tmp_path))) == tmp_path
