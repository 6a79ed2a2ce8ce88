"""Comparing runs: the best rate, seeds, the baseline, and what a reader is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import ConfigError
from fullrank.report.comparison import Comparison, Row, compare_runs
from fullrank.report.runs import Run, read_run
from tests.report.made import MB, write_run


class Runs:
    """Makes runs in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Run] = []

    def add(self, label: str, lr: float, perplexity: float | None, *, seed: int = 1, **options: Any) -> None:
        method = options.pop("method", label)
        folder = self.folder / f"{len(self.made)}"
        run = write_run(folder, method, lr=lr, seed=seed, perplexity=perplexity, **options)
        self.made.append(read_run(run, label=label))

    def compare(self) -> Comparison:
        return compare_runs(self.made, title="a title")

    def row(self, label: str) -> Row:
        return next(row for row in self.compare().rows if row.label == label)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_the_best_rate_counts(runs: Runs) -> None:
    for lr, perplexity in ((0.01, 31.0), (0.02, 35.0), (0.005, 33.0)):
        runs.add("fira", lr, perplexity)
    runs.add("full", 0.001, 40.0)
    comparison = runs.compare()
    assert [row.label for row in comparison.rows] == ["fira", "full"]
    fira, full = comparison.rows
    assert (fira.lr, fira.score, fira.scores, fira.at_edge) == (0.01, 31.0, {1: 31.0}, False)
    assert fira.grid == {"0.005": 33.0, "0.01": 31.0, "0.02": 35.0}
    assert list(fira.grid) == ["0.005", "0.01", "0.02"]
    assert (comparison.baseline, full.relative, fira.relative) == ("full", 1.0, 31 / 40)
    assert (comparison.metric, comparison.greater_is_better) == ("perplexity", False)
    assert (full.at_edge, full.grid) == (False, {"0.001": 40.0})


def test_costs_of_the_best_runs(runs: Runs) -> None:
    runs.add("fira", 0.01, 31.0)
    runs.add("fira", 0.01, 32.0, seed=2)
    row = runs.row("fira")
    assert (row.weight_bytes, row.gradient_bytes, row.optimizer_state_bytes) == (17 * MB, 17 * MB, 16 * MB)
    assert row.model_memory_bytes == 50 * MB
    assert row.peak_memory_bytes == 901.5 * MB
    assert (row.step_time_s, row.tokens_per_s) == (0.5, 2000.0)


def test_older_results_have_no_weights(runs: Runs) -> None:
    runs.add("fira", 0.01, 31.0, older=True)
    row = runs.row("fira")
    assert row.weight_bytes is None
    assert row.model_memory_bytes is None


@pytest.mark.parametrize(("best", "edge"), [(0.005, True), (0.01, False), (0.02, True)])
def test_edges(runs: Runs, best: float, edge: bool) -> None:
    for lr in (0.005, 0.01, 0.02):
        runs.add("fira", lr, 30.0 if lr == best else 35.0)
    comparison = runs.compare()
    assert comparison.rows[0].at_edge is edge
    assert any("at an edge" in note and f"fira ({best:g})" in note for note in comparison.notes) is edge


@pytest.mark.parametrize(
    ("outcome", "edge"), [("diverged", False), ("stopped", False), ("failed", True), ("unfinished", True)]
)
def test_a_rate_that_came_to_a_verdict_bounds_the_best(runs: Runs, outcome: str, edge: bool) -> None:
    runs.add("fira", 0.005, 35.0)
    runs.add("fira", 0.01, 30.0)
    early = None if outcome == "unfinished" else {"outcome": outcome, "note": "why"}
    runs.add("fira", 0.02, None, outcome=early)
    row = runs.row("fira")
    assert row.at_edge is edge
    assert row.grid["0.02"] == outcome


def test_the_first_seed_chooses_and_further_ones_are_averaged(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, seed=1)
    runs.add("fira", 0.02, 31.0, seed=1)
    runs.add("fira", 0.01, 34.0, seed=2)
    runs.add("fira", 0.01, None, seed=3, outcome={"outcome": "diverged", "note": "loss nan"})
    row = runs.row("fira")
    assert (row.lr, row.scores, row.score) == (0.01, {1: 30.0, 2: 34.0}, 32.0)
    assert row.grid == {"0.01": 30.0, "0.02": 31.0}
    assert any("diverged at 0.01 (seed 3): loss nan" in note for note in runs.compare().notes)


def test_seeds_come_in_any_order(runs: Runs) -> None:
    runs.add("fira", 0.02, 31.0, seed=7)
    runs.add("fira", 0.01, 34.0, seed=9)
    runs.add("fira", 0.01, 30.0, seed=7)
    assert runs.row("fira").scores == {7: 30.0, 9: 34.0}


def test_a_label_without_a_score_stands_last_and_in_words(runs: Runs) -> None:
    runs.add("relora", 0.01, None, outcome={"outcome": "diverged", "note": "step 3 has loss nan"})
    runs.add("full", 0.001, 40.0)
    comparison = runs.compare()
    assert [row.label for row in comparison.rows] == ["full", "relora"]
    row = comparison.rows[1]
    assert (row.lr, row.score, row.relative, row.scores, row.grid) == (None, None, None, {}, {"0.01": "diverged"})
    assert (row.optimizer_state_bytes, row.step_time_s) == (None, None)
    assert "relora diverged at 0.01 (seed 1): step 3 has loss nan." in comparison.notes
    assert "relora has no score at any rate." in comparison.notes


def test_runs_without_validation_still_tell_their_cost(runs: Runs) -> None:
    runs.add("fira", 0.01, None, scores={})
    row = runs.row("fira")
    assert (row.lr, row.score, row.grid) == (0.01, None, {"0.01": "no score"})
    assert row.optimizer_state_bytes == 16 * MB
    assert any("fira has no score at 0.01" in note for note in runs.compare().notes)


def test_the_baseline_without_full_is_the_first_with_a_score(runs: Runs) -> None:
    runs.add("lora", 0.01, None)
    runs.add("galore", 0.01, 40.0)
    runs.add("fira", 0.01, 30.0)
    comparison = runs.compare()
    assert comparison.baseline == "galore"
    assert comparison.rows[0].relative == 0.75


def test_a_variant_of_full_is_the_baseline(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0)
    runs.add("adamw", 0.01, 40.0, method="full")
    assert runs.compare().baseline == "adamw"


def test_a_baseline_that_failed_is_replaced_and_told(runs: Runs) -> None:
    runs.add("full", 0.01, None, outcome={"outcome": "failed", "note": ""})
    runs.add("fira", 0.01, 30.0)
    comparison = runs.compare()
    assert comparison.baseline == "fira"
    assert "full has no score, so the relative scores are to fira." in comparison.notes


def test_of_a_task_more_is_better(runs: Runs) -> None:
    for lr, accuracy in ((0.01, 0.8), (0.02, 0.9)):
        runs.add("sift", lr, None, scores={"loss": 0.3, "accuracy": accuracy}, metric="accuracy", task="sst2")
    runs.add("full", 0.01, None, scores={"loss": 0.3, "accuracy": 0.6}, metric="accuracy", task="sst2")
    comparison = runs.compare()
    assert (comparison.metric, comparison.greater_is_better) == ("accuracy", True)
    assert [(row.label, row.lr, row.relative) for row in comparison.rows] == [
        ("sift", 0.02, pytest.approx(1.5)),
        ("full", 0.01, 1.0),
    ]


def test_a_score_is_not_relative_to_nothing(runs: Runs) -> None:
    for label, score in (("full", 0.0), ("sift", 0.4)):
        runs.add(label, 0.01, None, scores={"matthews_correlation": score}, metric="matthews_correlation", task="cola")
    assert [row.relative for row in runs.compare().rows] == [None, None]


def test_what_cannot_be_compared_is_refused(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="no run was given"):
        runs.compare()
    runs.add("fira", 0.01, 30.0)
    runs.add("fira", 0.01, 30.0)
    with pytest.raises(ConfigError, match=r"two runs are called 'fira' with learning rate 0\.01 and seed 1"):
        runs.compare()


def test_different_tasks_are_refused(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0)
    runs.add("sift", 0.01, None, scores={"accuracy": 0.5}, metric="accuracy", task="sst2")
    with pytest.raises(ConfigError, match="different tasks: pretrain, sst2"):
        runs.compare()


def test_different_metrics_are_refused(runs: Runs) -> None:
    runs.add("full", 0.01, None, scores={"accuracy": 0.5}, metric="accuracy", task="mrpc")
    runs.add("sift", 0.01, None, scores={"f1": 0.5}, metric="f1", task="mrpc")
    with pytest.raises(ConfigError, match="different metrics: accuracy, f1"):
        runs.compare()


def test_equal_settings_need_no_note(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, config={"trainer": {"disable_tqdm": False, "save_steps": 7, "eval_steps": 5}})
    runs.add("full", 0.01, 31.0, config={"trainer": {"logging_steps": 5, "report_to": "none", "eval_steps": 10}})
    assert not [note for note in runs.compare().notes if "differ in" in note]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"data": {"sequence_length": 256}}}, "data.sequence_length: 256 (fira); 128 (full)"),
        ({"config": {"data": {"name": "/other/more.jsonl"}}}, "data.name: more.jsonl (fira); text.jsonl (full)"),
        ({"config": {"model": {"dtype": "bfloat16"}}}, "model.dtype: bfloat16 (fira); float32 (full)"),
        (
            {"config": {"model": {"overrides": {"hidden_size": 32}}}},
            "model.overrides.hidden_size: 32 (fira); not set (full)",
        ),
        ({"config": {"trainer": {"max_grad_norm": 0.5}}}, "trainer.max_grad_norm: 0.5 (fira); not set (full)"),
        (
            {"config": {"trainer": {"load_best_model_at_end": True}}},
            "trainer.load_best_model_at_end: true (fira); not set (full)",
        ),
        ({"result": {"hardware": {"device": "H100"}}}, "hardware: device: H100 (fira); a CPU (full)"),
        ({"result": {"versions": {"torch": "2.7.0"}}}, "versions: torch: 2.7.0 (fira); 2.13.0 (full)"),
    ],
)
def test_differences_are_named(runs: Runs, changes: dict[str, Any], words: str) -> None:
    runs.add("fira", 0.01, 30.0, **changes)
    runs.add("full", 0.01, 31.0)
    assert f"The runs differ in {words}." in runs.compare().notes


def test_unequal_tokens_are_told_first(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, steps=30)
    runs.add("full", 0.01, 31.0, steps=20)
    notes = runs.compare().notes
    assert notes[0] == "The best runs differ in the number of tokens they trained on: 30,000 (fira); 20,000 (full)."
    assert any("trainer.max_steps: 30 (fira); 20 (full)" in note for note in notes)


def test_a_run_that_is_not_the_best_is_named_by_its_rate(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0)
    runs.add("fira", 0.02, 31.0, result={"versions": {"torch": "2.7.0"}})
    notes = runs.compare().notes
    assert "The runs differ in versions: torch: 2.13.0 (fira at 0.01, seed 1); 2.7.0 (fira at 0.02, seed 1)." in notes


def test_options_of_one_label_that_differ_are_told(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, config={"method": {"rank": 8}})
    runs.add("fira", 0.02, 31.0, config={"method": {"rank": 16}})
    runs.add("galore", 0.02, 31.0, config={"method": {"rank": 32}})
    notes = [note for note in runs.compare().notes if "more than rate and seed" in note]
    assert notes == ["The runs of fira differ in more than rate and seed: method.rank: 8, 16."]


def test_few_seeds_and_few_rates_are_told(runs: Runs) -> None:
    for seed in (1, 2):
        runs.add("full", 0.01, 31.0, seed=seed)
    runs.add("fira", 0.01, 30.0)
    notes = runs.compare().notes
    assert "One seed for fira: differences of a few percent may be noise." in notes
    assert any(note.startswith("One learning rate only") and "full" in note for note in notes)
    runs.add("fira", 0.01, 30.5, seed=2)
    assert not [note for note in runs.compare().notes if "noise" in note]


def test_the_state_of_a_warm_start_is_told(runs: Runs) -> None:
    runs.add("relora", 0.01, 30.0, result={"optimizer_state_peak_bytes": 34 * MB})
    runs.add("fira", 0.01, 30.0, result={"optimizer_state_peak_bytes": 16 * MB})
    notes = [note for note in runs.compare().notes if "warm start" in note]
    assert notes == ["Optimizer state is that at the end of training; in the warm start: relora 34.0 MB."]


def test_as_json_and_back(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, seed=1)
    runs.add("fira", 0.01, 31.0, seed=2)
    runs.add("full", 0.01, float("inf"))
    runs.add("lora", 0.01, None)
    comparison = runs.compare()
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    again = Comparison.from_dict(json.loads(text))
    assert again.rows == comparison.rows
    assert again.notes == comparison.notes
    assert again.to_dict() == comparison.to_dict()
    assert compare_runs(again.runs, title=again.title).rows == comparison.rows


@pytest.mark.parametrize("change", ["format", "rows", "runs", "curve", "outcome", "lr", "config"])
def test_a_damaged_compare_json_is_refused(runs: Runs, change: str) -> None:
    runs.add("fira", 0.01, 30.0)
    content = runs.compare().to_dict()
    run = content["runs"][0]
    {
        "format": lambda: content.update(format=99),
        "rows": lambda: content["rows"][0].pop("score"),
        "runs": lambda: content.pop("runs"),
        "curve": run["train"]["loss"].clear,
        "outcome": lambda: run.update(outcome="tired"),
        "lr": lambda: run.update(lr="fast"),
        "config": lambda: run["config"].pop("data"),
    }[change]()
    with pytest.raises(ConfigError, match=r"compare\.json"):
        Comparison.from_dict(content)


def test_best_runs_of_a_label(runs: Runs) -> None:
    runs.add("fira", 0.01, 30.0, seed=2)
    runs.add("fira", 0.01, 31.0, seed=1)
    runs.add("fira", 0.02, 33.0, seed=1)
    runs.add("lora", 0.02, None)
    comparison = runs.compare()
    assert [(run.seed, run.lr) for run in comparison.best_runs("fira")] == [(1, 0.01), (2, 0.01)]
    assert comparison.best_runs("lora") == []


def test_another_text_under_the_same_name_is_told(runs: Runs) -> None:
    runs.add("full", 0.1, 20.0, result={"content_hash": "a" * 64})
    runs.add("fira", 0.1, 10.0, result={"content_hash": "b" * 64})
    runs.add("galore", 0.1, 15.0)  # of an older version, which kept no hash
    (note,) = [note for note in runs.compare().notes if "tokenizer" in note]
    assert "aaaaaaaaaaaa (full)" in note
    assert "bbbbbbbbbbbb (fira)" in note
    assert "galore" not in note


def test_what_a_short_run_never_did_is_told(runs: Runs) -> None:
    runs.add("relora", 0.1, 20.0, config={"method": {"restart_every": 1000}})
    runs.add("galore", 0.1, 15.0, config={"method": {"update_proj_gap": 5}})
    notes = runs.compare().notes
    assert "relora never restarted: its restart_every is 1,000, and the run has 20 steps." in notes
    assert not any("galore kept" in note for note in notes)
