"""A whole comparison as a user types it: run, repeated, widened, interrupted, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fullrank.cli import main
from fullrank.compare.run import load_options, locked
from fullrank.errors import CheckpointError
from fullrank.train.report import read_metrics
from tests.train.tiny import assert_same_run, recipe, write_text

pytestmark = pytest.mark.slow

METHODS = "full,lora"
REPORT = {"compare.json", "compare.csv", "compare.md", "report.html", "loss_tokens.png", "loss_tokens.svg"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "FULLRANK_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe."""
    folder = tmp_path_factory.mktemp("compare")
    content = recipe(write_text(folder / "documents.jsonl"), folder, eval_steps=5, logging_steps=1)
    del content["output_dir"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder


def words(base: Path, folder: Path, *arguments: str) -> list[str]:
    fixed = ["--config", str(base / "recipe.yaml"), "--output_dir", str(folder)]
    return [sys.executable, "-m", "fullrank.cli", "compare", *fixed, *arguments]


def call(base: Path, folder: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words(base, folder, *arguments), env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def results(folder: Path) -> dict[str, int]:
    """When each run's result was written, by the run's name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}


@pytest.fixture(scope="module")
def whole(base: Path, environment: dict[str, str]) -> Path:
    folder = base / "whole"
    grid = ("--lr_grid", "0.002,0.004", "--extend_grid", "0")
    done = call(base, folder, "--methods", METHODS, *grid, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "full, lr 0.002, seed 42: finished" in done.stderr
    assert "full" in done.stdout
    assert "lora" in done.stdout
    return folder


def test_report_and_runs_are_there(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= REPORT | {"runs", "logs", "compare.yaml"}
    content = json.loads((whole / "compare.json").read_text())
    assert {row["label"] for row in content["rows"]} == {"full", "lora"}
    assert len(content["runs"]) == len(results(whole)) == 4
    for row in content["rows"]:
        scores = {rate: score for rate, score in row["grid"].items() if isinstance(score, float)}
        assert row["score"] == min(scores.values())


def test_only_the_models_of_the_best_rates_stay(whole: Path) -> None:
    best = {(row["label"], row["lr"]) for row in json.loads((whole / "compare.json").read_text())["rows"]}
    kept = {path.parent.name for path in whole.glob("runs/*/model")}
    assert kept == {f"{label}-lr{lr:g}-seed42" for label, lr in best}
    assert not list(whole.glob("runs/*/checkpoint-*"))


def test_same_data_and_start_for_all(whole: Path) -> None:
    rows = {folder.name: read_metrics(folder) for folder in (whole / "runs").iterdir()}
    assert len({tuple(row["tokens"] for row in found if "loss" in row) for found in rows.values()}) == 1
    first = {found[0]["eval_loss"] for found in rows.values()}
    assert len(first) == 1
    assert len({json.loads(p.read_text())["content_hash"] for p in whole.glob("runs/*/result.json")}) == 1


def test_again_repeats_nothing_and_a_seed_adds_only_itself(
    base: Path, whole: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(whole)
    grid = ("--methods", METHODS, "--lr_grid", "0.002,0.004", "--extend_grid", "0")
    monkeypatch.setenv("FULLRANK_CACHE", environment["FULLRANK_CACHE"])
    assert main(words(base, whole, *grid)[3:]) == 0
    assert results(whole) == before
    done = call(base, whole, *grid, "--seeds", "42,43", environment=environment)
    assert done.returncode == 0, done.stderr
    after = results(whole)
    assert before.items() < after.items()
    assert sorted(name.rpartition("-")[2] for name in after.keys() - before.keys()) == ["seed43", "seed43"]
    rows = json.loads((whole / "compare.json").read_text())["rows"]
    assert all(set(row["scores"]) == {"42", "43"} for row in rows)
    config, overrides = load_options(whole)
    assert (config.seeds, config.methods) == ([42, 43], ["full", "lora"])
    assert overrides == {"data.name": str(base / "documents.jsonl")}  # found from any folder


def test_other_settings_are_refused(base: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(whole)
    options = ("--methods", METHODS, "--lr_grid", "0.002,0.004", "--trainer.max_steps", "21")
    assert main(words(base, whole, *options)[3:]) == 1
    assert "trainer.max_steps was 20, is now 21" in capsys.readouterr().err
    assert results(whole) == before


def test_divergence_is_a_result_and_hopeless_rates_end(
    base: Path, environment: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base / "bad"
    grid = ("--methods", "full", "--lr_grid", "0.004,0.0000001,1e30", "--extend_grid", "0", "--early_stop", "0.05",
            "--trainer.max_steps", "600", "--trainer.eval_steps", "50", "--trainer.save_strategy", "no")  # fmt: skip
    done = call(base, folder, *grid, environment=environment)
    assert done.returncode == 0, done.stderr
    outcomes = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/outcome.json")}
    assert outcomes["full-lr1e+30-seed42"]["outcome"] == "diverged"
    assert "Lower method.lr" in outcomes["full-lr1e+30-seed42"]["note"]
    assert outcomes["full-lr1e-07-seed42"]["outcome"] == "stopped"
    assert "hopeless: validation loss" in outcomes["full-lr1e-07-seed42"]["note"]
    assert len(read_metrics(folder / "runs" / "full-lr1e-07-seed42")) < len(
        read_metrics(folder / "runs" / "full-lr0.004-seed42")
    )
    (row,) = json.loads((folder / "compare.json").read_text())["rows"]
    assert row["lr"] == 0.004
    assert {type(value) for value in row["grid"].values()} == {float, str}
    caplog.set_level("INFO", "fullrank")
    monkeypatch.setenv("FULLRANK_CACHE", environment["FULLRANK_CACHE"])
    assert main(words(base, folder, *grid)[3:]) == 0
    assert "3 runs" in caplog.text
    assert "seed 42: " not in caplog.text  # nothing ran


def test_interrupted_comparison_goes_on(
    base: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base / "interrupted"
    options = ("--methods", "full", "--lr_grid", "0.004", "--trainer.max_steps", "120", "--keep_models", "all")
    process = subprocess.Popen(
        words(base, folder, *options), env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    run = folder / "runs" / "full-lr0.004-seed42"
    deadline = time.monotonic() + 300
    while len(read_metrics(run)) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert f"go on with: fullrank compare --resume {folder}" in printed
    assert not (run / "result.json").exists()
    assert not (run / "outcome.json").exists()
    stopped_at = read_metrics(run)[-1]["step"]
    assert stopped_at < 120
    assert (run / f"checkpoint-{stopped_at}").is_dir()
    resumed = subprocess.run(
        [sys.executable, "-m", "fullrank.cli", "compare", "--resume", str(folder)],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    monkeypatch.setenv("FULLRANK_CACHE", environment["FULLRANK_CACHE"])
    plain = ["pretrain", "--config", str(base / "recipe.yaml"), "--method.name", "full", "--method.lr", "0.004"]
    assert main([*plain, "--trainer.max_steps", "120", "--output_dir", str(base / "plain")]) == 0
    assert_same_run(run, base / "plain")


def test_refusal_of_a_run_ends_the_comparison(base: Path, environment: dict[str, str]) -> None:
    done = call(base, base / "refused", "--methods", "fira,full", "--lr_grid", "0.004", "--fira.rank", "4096",
                environment=environment)  # fmt: skip
    assert done.returncode == 2
    assert "fira, lr 0.004, seed 42: rank" in done.stderr
    assert "4096" in done.stderr


def test_folder_of_something_else_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(words(base, tmp_path, "--methods", "full")[3:]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_comparisons_do_not_share_a_folder(base: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(whole):
        assert main(words(base, whole, "--methods", METHODS, "--lr_grid", "0.002,0.004")[3:]) == 1
    assert "at work in" in capsys.readouterr().err
    with locked(whole), pytest.raises(CheckpointError, match="at work"), locked(whole):
        pass


def test_dry_run_writes_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fullrank")
    assert main(words(base, base / "dry", "--methods", METHODS, "--dry_run")[3:]) == 0
    assert "6 runs" in caplog.text
    assert not (base / "dry").exists()
