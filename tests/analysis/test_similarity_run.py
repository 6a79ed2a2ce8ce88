"""The command for similarity: real runs that go on, folders that stay what they are, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.analysis.similarity import correlate
from fullrank.analysis.similarity_run import SimilarityOptions, analyze_similarity, make_configs
from fullrank.cli import main
from fullrank.errors import CheckpointError
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import TRACE
from tests.train.tiny import recipe, trajectory, write_text

ARGUMENTS = ["--trace_every", "3", "--num_columns", "5"]
Analyze = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("similarity")
    content = recipe(write_text(base / "documents.jsonl"), base, max_steps=12, eval_steps=12)
    content.pop("output_dir")
    (base / "tiny.yaml").write_text(yaml.safe_dump(content))
    return base


@pytest.fixture
def analyze(base: Path, monkeypatch: pytest.MonkeyPatch) -> Analyze:
    """The command, on the tiny recipe."""
    monkeypatch.setenv("FULLRANK_CACHE", str(base / "cache"))

    def run(folder: str, *arguments: str) -> int:
        given = ["--config", str(base / "tiny.yaml"), *ARGUMENTS, "--output_dir", str(base / folder), *arguments]
        return main(["analyze", "similarity", *given])

    return run


@pytest.fixture(scope="module")
def done(base: Path) -> Path:
    """The whole analysis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLRANK_CACHE", str(base / "cache"))
        options = SimilarityOptions(
            config=str(base / "tiny.yaml"), trace_every=3, num_columns=5, output_dir=str(base / "done")
        )
        findings = analyze_similarity(options)
    assert findings is not None
    assert [path.name for path in findings.files] == [f"similarity.{end}" for end in ("json", "csv", "png", "svg")]
    return base / "done"


def test_one_command_trains_both_and_compares(done: Path) -> None:
    content = json.loads((done / "similarity.json").read_text())
    assert content["label"] == "llama-9m (fira)"
    assert content["num_steps"] == 4
    assert len(content["matrices"]) == content["matrix"]["count"] == 14
    assert content["column"]["count"] == 14 * 5
    assert -1 <= content["within"] <= 1
    assert (content["trace_every"], content["num_columns"], content["seed"]) == (3, 5, 0)
    assert (content["config"]["method"]["name"], content["full_config"]["method"]["name"]) == ("fira", "full")
    assert content["matrix"]["spearman"] > 0.5, "q_proj and v_proj differ by far in both"
    with (done / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 * 6
    points = [(float(row["low"]), float(row["full"])) for row in rows if row["column"]]
    again = correlate(*map(list, zip(*points, strict=True)))
    assert again.spearman == pytest.approx(content["column"]["spearman"], abs=1e-3)
    assert (done / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert "column level" in (done / "similarity.svg").read_text()


def test_the_two_runs_differ_in_the_method_alone(done: Path) -> None:
    low, full = (yaml.safe_load((done / name / "config.yaml").read_text()) for name in ("fira", "full"))
    assert {key for key in low if low[key] != full[key]} == {"method", "output_dir"}
    assert full["method"]["name"] == "full"
    assert full["method"]["lr"] == 2e-3, "its own"
    assert full["method"]["eps"] == low["method"]["eps"] == 1e-6, "which enters the factors"


def test_finished_runs_are_not_made_again(
    done: Path, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: path.stat().st_mtime_ns for path in done.rglob("*") if "similarity." not in path.name}
    before = (done / "similarity.json").read_bytes()
    assert analyze("done") == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (done / "similarity.json").read_bytes() == before
    output = capsys.readouterr()
    assert "llama-9m (fira)" in output.out
    assert "method.eps" not in output.err, "which the full-rank run does take over"
    assert main(["analyze", "similarity", str(done / "fira"), str(done / "full"), "--output_dir", str(base / "b")]) == 0
    assert (base / "b" / "similarity.csv").read_bytes() == (done / "similarity.csv").read_bytes()


def test_stopped_it_goes_on(
    done: Path, base: Path, analyze: Analyze, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in the second run: it saves and stops; the same command ends it as if it had never been stopped."""
    shutil.copytree(done, base / "stopped")
    shutil.rmtree(base / "stopped" / "full")
    for path in (base / "stopped").glob("similarity.*"):
        path.unlink()
    real = ScalingTrace.on_optimizer_step

    def interrupted(self: ScalingTrace, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ScalingTrace, "on_optimizer_step", interrupted)
        assert analyze("stopped") == 130
    assert "the same command goes on from there: fullrank analyze similarity" in caplog.text
    assert not (base / "stopped" / "similarity.json").exists()
    assert (base / "stopped" / "full" / "checkpoint-7").is_dir()
    assert analyze("stopped") == 0
    for name in ("fira", "full"):
        assert (base / "stopped" / name / TRACE).read_bytes() == (done / name / TRACE).read_bytes()
        assert trajectory(base / "stopped" / name) == trajectory(done / name)
    assert (base / "stopped" / "similarity.csv").read_bytes() == (done / "similarity.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.lr", "0.02"], "fira belongs to another run: method.lr was 0.01, is now 0.02"),
        (["--full.lr", "0.02"], "full belongs to another run: method.lr was 0.002, is now 0.02"),
        (["--trace_every", "4"], "was traced with every 3, asked for is 4"),
        (["--num_columns", "6"], "was traced with num_columns 5, asked for is 6"),
    ],
)
def test_other_options_do_not_go_on(
    arguments: list[str], message: str, done: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(done.rglob("*"))
    assert analyze("done", *arguments) != 0
    assert message in capsys.readouterr().err
    assert sorted(done.rglob("*")) == before


def test_results_of_other_runs_are_not_overwritten(
    done: Path, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another method beside the same full-rank run: refused before it trains."""
    before = {path: path.read_bytes() for path in done.rglob("*.*") if path.is_file()}
    eps = ("--full.eps", "1e-6")
    assert analyze("done", "--method.name", "galore", "--method.rank", "4", *eps) == 2
    assert "similarity.json is of other runs: there is no galore in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in done.rglob("*.*") if path.is_file()} == before
    shutil.copytree(done, base / "mixed")
    found = json.loads((done / "similarity.json").read_text())
    found["config"]["method"]["name"] = "galore"
    (base / "mixed" / "similarity.json").write_text(json.dumps(found))
    assert analyze("mixed") == 2
    assert "similarity.json is of galore, and this call of fira" in capsys.readouterr().err


def test_the_second_folder_is_looked_at_before_the_first_run(
    done: Path, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "full", base / "second" / "full")
    assert analyze("second", "--full.lr", "0.02") == 1
    assert "full belongs to another run: method.lr" in capsys.readouterr().err
    (base / "second" / "full" / TRACE).unlink()
    assert analyze("second") == 1
    assert "ends at step 0, its run at step 12: it was trained or resumed without the trace" in capsys.readouterr().err
    (base / "second" / "full" / "config.yaml").unlink()
    assert analyze("second") == 2
    assert "full exists and is not empty; nothing was overwritten" in capsys.readouterr().err
    assert not (base / "second" / "fira").exists()


def test_a_skipped_last_step_is_no_missing_trace(done: Path, base: Path, analyze: Analyze) -> None:
    shutil.copytree(done, base / "skipped")
    path = base / "skipped" / "fira" / TRACE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + json.dumps({"step": 12, "skipped": True}) + "\n")
    assert analyze("skipped") == 0
    assert json.loads((base / "skipped" / "similarity.json").read_text())["num_steps"] == 3


def test_given_runs_are_the_low_rank_and_the_full_rank_one(
    done: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, full = str(done / "fira"), str(done / "full")
    for runs, message in (
        ((full, low), "full is given as the low-rank run, and was traced with AdamW"),
        ((low, low), "fira is given as the full-rank run, and was traced with FiraAdamW"),
        ((low, full, "--trace_every", "5", "--num_columns", "3"), "--trace_every, --num_columns is for training"),
    ):
        assert main(["analyze", "similarity", *runs, "--output_dir", str(base / "given")]) == 2
        assert message in capsys.readouterr().err
    assert not (base / "given").exists()


@pytest.mark.parametrize("content", ["model: gpt2\nmethod: fira\n", "a: [\n", "\xff", None])
def test_the_label_falls_back_to_the_folder(content: str | None, done: Path, tmp_path: Path) -> None:
    low = shutil.copytree(done / "fira", tmp_path / "mine", ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    (low / "config.yaml").unlink()
    if content is not None:
        (low / "config.yaml").write_bytes(content.encode("latin-1"))
    runs = [str(low), str(done / "full")]
    found = analyze_similarity(SimilarityOptions(runs=runs, output_dir=str(tmp_path / "out")))
    assert found is not None
    assert (found.content["label"], found.content["config"]) == ("mine", None)


def test_a_run_that_went_on_without_its_trace_is_refused(done: Path, base: Path, analyze: Analyze) -> None:
    shutil.copytree(done, base / "untraced")
    path = base / "untraced" / "fira" / TRACE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    options = SimilarityOptions(
        config=str(base / "tiny.yaml"), trace_every=3, num_columns=5, output_dir=str(base / "untraced")
    )
    with pytest.raises(CheckpointError, match="ends at step 6, its run at step 12: it was trained or resumed"):
        analyze_similarity(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.name", "lora"], "method.name must be one of fira, galore, apollo, got lora"),
        (["--method.scaling", "matrix"], "the comparison needs a factor for each column"),
        (["--method.proj_type", "full"], "the comparison needs a factor for each column"),
        (["--method.lora_rank", "8"], "full-rank training lacks"),
        (["--trainer.max_steps", "2"], "trainer.max_steps is 2, so no step would be traced"),
        (["--trace_every", "0"], "trace_every must be at least 1"),
        (["--num_columns", "0"], "num_columns must be at least 1"),
        (["--full.name", "galore"], "full.name is full"),
        (["--full.rank", "3"], "unknown key method.rank"),
        (["--fool.lr", "3"], "does not know --fool.lr"),
        (["RUN"], "similarity compares two runs"),
    ],
)
def test_refused_before_anything_is_written(
    arguments: list[str], message: str, base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze("refused", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (base / "refused").exists()


def test_a_folder_of_something_else_is_refused(
    base: Path, analyze: Analyze, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "other").mkdir()
    (base / "other" / "thesis.txt").write_text("words")
    assert analyze("other") == 2
    assert "exists and is not empty; nothing was overwritten" in capsys.readouterr().err
    assert main(["analyze", "similarity", "--output_dir", str(base / "other")]) == 2
    assert "similarity needs two traced runs, or --config RECIPE" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert analyze("new") == 2
    assert "the analysis trains in one process, and this one is of 2" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_other_low_rank_methods_have_their_configurations(method: str, base: Path) -> None:
    options = SimilarityOptions(
        config=str(base / "tiny.yaml"), overrides={"method.name": method}, full={"lr": "1e-3"}, trace_every=3
    )
    low, full = make_configs(options)
    assert (low.method_name, full.method_name, full.method.lr) == (method, "full", 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_other_low_rank_methods(method: str, base: Path, analyze: Analyze) -> None:
    assert analyze(method, "--method.name", method, "--method.rank", "4") == 0
    assert json.loads((base / method / "similarity.json").read_text())["label"] == f"llama-9m ({method})"
