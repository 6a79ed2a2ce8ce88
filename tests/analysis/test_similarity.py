"""Similarity of scaling factors: known numbers, the published rows, real runs that go on, and what is refused."""

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

from fullrank.analysis.similarity import PUBLISHED, correlate, p_value, similarity, table
from fullrank.analysis.similarity_run import SimilarityOptions, analyze_similarity, make_configs
from fullrank.cli import main
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import TRACE
from tests.analysis.traces import write_trace
from tests.train.tiny import recipe, trajectory, write_text

# Spearman and Kendall of (1, 2, 3, 4, 5) and (5, 6, 7, 8, 7), as scipy's documentation prints them.
KNOWN = {"spearman": 0.8207826816681233, "spearman_p": 0.08858700531354381}


def row(step: int, mean: list[float | None], columns: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"step": step, "mean": mean, **({} if columns is None else {"columns": columns}), **more}


def test_known_correlations() -> None:
    found = correlate([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])
    assert found.spearman == pytest.approx(KNOWN["spearman"])
    assert found.spearman_p == pytest.approx(KNOWN["spearman_p"])
    # by hand: of ten pairs eight are in the same order, one is in the other, one is tied on one side
    assert found.kendall == pytest.approx((8 - 1) / (10 * 9) ** 0.5)
    assert found.count == 5
    assert correlate([1, 2, 3], [-1, -2, -3]).kendall == pytest.approx(-1)


def test_means_are_over_steps_then_compared(tmp_path: Path) -> None:
    """Factors that change from step to step, columns, and a step without a gradient."""
    low = write_trace(
        tmp_path / "low",
        [
            row(1, [1.0, 5.0, None, 10.0], [[1.0, 3.0, 2.0], [4.0, 5.0, 6.0], None, [9.0, 10.0, 11.0]]),
            row(2, [3.0, 5.0, 8.0, 10.0], [[1.0, 5.0, 2.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [9.0, 10.0, 12.0]]),
        ],
        columns=[0, 3, 7],
    )
    full = write_trace(
        tmp_path / "full",
        [row(2, [1.0, 4.0, 9.0, 7.0], [[1.0, 1.5, 0.5], [4.5, 4.0, 3.5], [8.0, 9.0, 10.0], [7.0, 6.0, 8.0]])],
        columns=[0, 3, 7],
        optimizer="AdamW",
    )
    found = similarity(low, full)
    assert found.steps == (2,), "only what both have"
    assert [pair.low for pair in found.matrices] == [3.0, 5.0, 8.0, 10.0]
    assert [pair.full for pair in found.matrices] == [1.0, 4.0, 9.0, 7.0]
    assert [pair.kind for pair in found.matrices] == ["q_proj", "v_proj", "up_proj", "q_proj"]
    assert found.matrix.spearman == pytest.approx(0.8)
    assert found.matrix.kendall == pytest.approx(4 / 6)
    assert found.column is not None
    assert found.column.count == 12
    assert [pair.spearman for pair in found.matrices] == pytest.approx([0.5, -1.0, 1.0, 0.5])
    assert found.within == pytest.approx(0.5)
    alone = similarity(low, low)
    assert alone.steps == (1, 2)
    assert [pair.low for pair in alone.matrices] == [2.0, 5.0, 8.0, 10.0]
    assert alone.matrices[0].low_columns == (1.0, 4.0, 2.0)
    assert alone.matrices[2].low_columns == (7.0, 8.0, 9.0)
    assert alone.matrix.spearman == pytest.approx(1.0)
    assert alone.column is not None
    assert alone.column.kendall == pytest.approx(1.0)


def test_without_columns_there_is_the_matrix_level(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0])])
    found = similarity(trace, trace)
    assert found.column is None
    assert found.within is None
    assert table({"ours": found}).splitlines()[-2].split()[-4:] == ["-"] * 4


def test_the_published_rows_are_exact(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0], [[1.0], [2.0], [3.0]])], columns=[0])
    lines = [line.split() for line in table({"ours": similarity(trace, trace)}).splitlines()]
    assert lines[0] == ["matrix", "level", "column", "level"]
    assert lines[1] == ["size", *(["Spearman", "p-value", "Kendall", "p-value"] * 2)]
    assert lines[2:6] == [
        ["60M", "(paper)", "0.9972", "2e-62", "0.9662", "7e-26", "0.9372", "0.0", "0.7942", "0.0"],
        ["130M", "(paper)", "0.9925", "2e-76", "0.9409", "9e-37", "0.8698", "0.0", "0.6830", "0.0"],
        ["350M", "(paper)", "0.9770", "3e-113", "0.8848", "5e-65", "0.9091", "0.0", "0.7400", "0.0"],
        ["1B", "(paper)", "0.9469", "1e-83", "0.8249", "1e-56", "0.8331", "0.0", "0.6513", "0.0"],
    ]
    assert lines[6][0] == "ours"
    assert [published.size for published in PUBLISHED] == ["60M", "130M", "350M", "1B"]


def test_p_values_that_underflow_are_a_bound() -> None:
    assert p_value(0.0) == "< 1e-300"
    assert p_value(3e-310) == "< 1e-300"
    assert p_value(1e-299) == "1e-299"
    assert p_value(0.034) == "3e-02"
    assert p_value(0.0, published=True) == "0.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [row(1, [1.0, 2.0])]}, "1 of 3 matrices are traced in .*low and not in .*full, first layers.0.up"),
        ({"shape": (8, 5)}, r"layers\.0\.q_proj\.weight is \(8, 4\) in .* and \(8, 5\)"),
        ({"rows": [row(2, [1.0, 2.0, 3.0])]}, "no traced step in common"),
        ({"rows": [row(1, [4.0, 4.0, 4.0])]}, "factors of .*full are all 4: there is no order"),
        ({"num_factors": 1}, r"8 scaling factors in .*low and 1 in .*full\. Compare runs with one factor a column"),
        ({"columns": [1, 2]}, "other columns of layers.0.q_proj.weight"),
        ({"rows": [row(1, [None, 2.0, 3.0])]}, "q_proj.weight had no gradient, or no finite one"),
    ],
)
def test_what_cannot_be_compared(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    low = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0])])
    made = {"rows": [row(1, [1.0, 2.0, 3.0])], **change}
    full = write_trace(tmp_path / "full", made.pop("rows"), **made)
    with pytest.raises(ConfigError, match=message):
        similarity(low, full)


def test_too_few_matrices_and_no_trace(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0])])
    with pytest.raises(ConfigError, match="traces 2 matrices; a rank correlation needs at least 3"):
        similarity(trace, trace)
    with pytest.raises(ConfigError, match=r"holds no trace\.jsonl"):
        similarity(trace, tmp_path)


# Real runs.

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
    assert "llama-9m (fira)" in capsys.readouterr().out
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


def test_a_run_that_went_on_without_its_trace_is_refused(done: Path, base: Path, analyze: Analyze) -> None:
    shutil.copytree(done, base / "untraced")
    path = base / "untraced" / "fira" / TRACE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    options = SimilarityOptions(
        config=str(base / "tiny.yaml"), trace_every=3, num_columns=5, output_dir=str(base / "untraced")
    )
    with pytest.raises(CheckpointError, match="ends at step 6, its run at step 12: it was resumed without the trace"):
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
