"""Reading a run's folder: curves, scores, how it ended, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullrank.errors import ConfigError
from fullrank.report.runs import MAX_POINTS, read_run, without_paths
from tests.report.made import write_rows, write_run


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", "fira", lr=0.005, seed=3, perplexity=31.5))
    assert (run.label, run.method, run.lr, run.seed, run.task) == ("fira", "fira", 0.005, 3, "pretrain")
    assert (run.outcome, run.note, run.metric, run.score) == ("finished", "", "perplexity", 31.5)
    assert run.train.step == list(range(1, 21))
    assert run.train.tokens[-1] == 20_000
    assert run.train.time_s[:2] == [1.5, 2.0]
    assert run.validation.step == [0, 10, 20]
    assert run.validation.tokens == [0, 10_000, 20_000]
    assert run.validation.time_s == [0.0, 6.0, 11.0]
    assert run.validation.loss == [8.0, 4.5, 4.3]


def test_label_is_given_or_the_method(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "fira")
    assert read_run(folder, label="fira-svd").label == "fira-svd"


def test_paths_are_cut(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "secret" / "mine"))
    assert run.config["data"]["name"] == "text.jsonl"
    assert run.result is not None
    assert run.result["folder"] == "mine"
    assert run.result["sample"] == "/no/path but text"
    assert "secret" not in json.dumps([run.config, run.result])
    assert without_paths({"a": ["/x/y.txt", "b/c", "/", 3]}) == {"a": ["y.txt", "b/c", "/", 3]}


def test_an_older_run_counts_the_steps_between_its_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", older=True)
    rows = [
        {"step": 5, "loss": 5.0, "tokens": 5000, "step_time_s": 2.0},
        {"step": 10, "loss": 4.0, "tokens": 10_000, "step_time_s": 1.0},
        {"step": 10, "eval_loss": 4.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert run.train.time_s == [10.0, 15.0]
    assert run.validation.time_s == [15.0]


def test_an_older_run_that_a_newer_version_went_on_with(tmp_path: Path) -> None:
    """Its clock began anew at the resume."""
    folder = write_run(tmp_path / "a")
    rows = [
        {"step": 5, "loss": 5.0, "tokens": 5000, "step_time_s": 2.0},
        {"step": 10, "loss": 4.0, "tokens": 10_000, "step_time_s": 1.0, "train_time_s": 5.0},
        {"step": 15, "loss": 4.0, "tokens": 15_000, "step_time_s": 1.0, "train_time_s": 12.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(folder).train.time_s == [10.0, 15.0, 22.0]


def test_an_older_result(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", older=True)
    content = json.loads((folder / "result.json").read_text())
    del content["scores"], content["metric"]
    (folder / "result.json").write_text(json.dumps(content | {"perplexity": 33.0}))
    run = read_run(folder)
    assert (run.metric, run.score) == ("perplexity", 33.0)


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    write_rows(folder, steps=1001)
    train = read_run(folder).train
    assert 150 < len(train.step) <= MAX_POINTS
    assert train.loss[0] == pytest.approx(sum(4 + 4 / step for step in range(1, 7)) / 6)
    assert train.step[0] in (3, 4)
    assert train.step == sorted(train.step)
    assert train.time_s[0] == pytest.approx(sum(1 + 0.5 * step for step in range(1, 7)) / 6)


def test_a_task_has_its_own_metric(tmp_path: Path) -> None:
    scores = {"loss": 0.4, "accuracy": 0.91, "f1": 0.9}
    run = read_run(write_run(tmp_path / "a", scores=scores, metric="accuracy", task="mrpc"))
    assert (run.task, run.metric, run.score) == ("mrpc", "accuracy", 0.91)


def test_a_run_without_validation_has_no_score(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", scores={}))
    assert (run.outcome, run.metric, run.score) == ("finished", None, None)
    assert "no" in run.note or "without" in run.note


def test_an_infinite_perplexity_is_no_score(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", perplexity=float("inf")))
    assert run.score is None
    assert "without a finite" in run.note


@pytest.mark.parametrize("outcome", ["stopped", "diverged", "failed"])
def test_a_run_that_ended_early(tmp_path: Path, outcome: str) -> None:
    note = "step 7: stopped, see /home/someone/runs/a/log and file:/x/y. 1/2 stays"
    run = read_run(write_run(tmp_path / "a", perplexity=None, outcome={"outcome": outcome, "note": note}))
    assert (run.outcome, run.result, run.score) == (outcome, None, None)
    assert "someone" not in run.note
    assert "see log" in run.note
    assert "1/2 stays" in run.note


def test_a_result_wins_over_an_outcome(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", outcome={"outcome": "failed", "note": "first try"}))
    assert (run.outcome, run.note) == ("finished", "")


def test_an_unfinished_run_says_how_far_it_came(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", perplexity=None)
    write_rows(folder, steps=7)
    run = read_run(folder)
    assert run.outcome == "unfinished"
    assert "step 7 of 20" in run.note
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert run.train.step == run.validation.step == []
    assert "step 0" in run.note


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_run(folder).train.step == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", None, "no config.yaml"),
        ("config.yaml", "model: [", "damaged"),
        ("config.yaml", "just text", "damaged"),
        ("config.yaml", "model: {}\ndata: {}\nmethod: {name: fira}\ntrainer: {}\n", "lr"),
        ("config.yaml", "model: {}\ndata: []\nmethod: {name: fira, lr: 1}\ntrainer: {}\n", "not a mapping"),
        ("result.json", '{"scores": ', "damaged"),
        ("result.json", "[1]", "no object"),
        ("metrics.jsonl", "5\n", "row 1 has no step"),
        ("metrics.jsonl", '{"loss": 3}\n', "row 1 has no step"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    folder = write_run(tmp_path / "a")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_run(folder)
    assert any(remedy in str(caught.value) for remedy in ("Give", "leave", "Leave", "Run it again"))


def test_an_unknown_outcome_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", perplexity=None, outcome={"outcome": "tired", "note": ""})
    with pytest.raises(ConfigError, match="got 'tired'"):
        read_run(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_run(tmp_path / "nowhere")
