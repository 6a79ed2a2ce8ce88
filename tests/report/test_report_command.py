"""``fullrank report``: what it takes, what it writes, what it refuses; and a report of a run that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fullrank.cli import main
from fullrank.errors import ConfigError
from fullrank.report.comparison import Comparison
from fullrank.report.sources import ReportOptions, compare_given, read_given, report
from fullrank.report.write import write_report
from tests.report.made import write_run
from tests.train.tiny import recipe, write_text

FILES = ["compare.json", "compare.csv", "compare.md", "report.html"]
KINDS = ("loss_tokens", "loss_time", "perplexity_memory")
FIGURES = [f"{kind}.{suffix}" for kind in KINDS for suffix in ("png", "svg")]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a comparison, one of whose runs has not begun."""
    folder = tmp_path / "sweep"
    for label, method, lr, perplexity in (
        ("fira-svd", "fira", 0.01, 30.0),
        ("fira-svd", "fira", 0.02, 31.0),
        ("full", "full", 0.0025, 40.0),
    ):
        write_run(folder / "runs" / f"{label}-lr{lr:g}-seed1", method, lr=lr, perplexity=perplexity)
    (folder / "runs" / "lora-lr0.01-seed1").mkdir()
    return folder


def test_a_report_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run(tmp_path / "one", "fira"), write_run(tmp_path / "two", "fira", perplexity=40.0)
    out = tmp_path / "out"
    words = ["report", str(one), f"fira-svd={other}", "--title", "my title", "--output_dir", str(out)]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, *FIGURES])
    printed = capsys.readouterr().out
    assert printed.startswith("my title\n")
    assert [line.split()[0] for line in printed.splitlines()[3:5]] == ["fira", "fira-svd"]
    assert all(name in printed for name in [*FILES, *FIGURES])
    content = json.loads((out / "compare.json").read_text())
    assert content["title"] == "my title"
    assert content["published"]["rows"][0]["published"][0]["value"] == 31.06
    assert str(tmp_path) not in "".join((out / name).read_text() for name in FILES)


def test_a_report_of_a_comparison(sweep: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    comparison, files = report(ReportOptions(runs=[str(sweep)], output_dir=str(tmp_path / "out")))
    assert [(row.label, row.lr) for row in comparison.rows] == [("fira-svd", 0.01), ("full", 0.0025)]
    assert comparison.title == "llama-20m on text.jsonl"
    assert [file.name for file in files] == [*FILES, *FIGURES]
    assert "lora-lr0.01-seed1 has no config.yaml" in caplog.text
    assert Comparison.from_dict(json.loads(files[0].read_text())).rows == comparison.rows
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.slow
def test_a_report_of_a_report(sweep: Path, tmp_path: Path) -> None:
    """The runs need not be there any more; the title stays."""
    first, _ = report(ReportOptions(runs=[str(sweep)], output_dir=str(tmp_path / "out"), title="first"))
    for given in (tmp_path / "out", tmp_path / "out" / "compare.json"):
        again = compare_given([str(given)])
        assert (again.title, again.rows, again.notes) == (first.title, first.rows, first.notes)
    assert compare_given([str(tmp_path / "out")], title="second").title == "second"


def test_a_comparison_and_a_run_stand_together(sweep: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", "lora", perplexity=35.0)
    assert [row.label for row in compare_given([str(sweep), str(run)]).rows] == ["fira-svd", "lora", "full"]


@pytest.mark.slow
def test_the_title_of_a_comparison_that_goes_on(sweep: Path) -> None:
    """Its folder holds an earlier report, which is replaced; the runs are read anew."""
    write_report(compare_given([str(sweep)], title="mine"), sweep)
    write_run(sweep / "runs" / "lora-lr0.02-seed1", "lora", lr=0.02)
    again = compare_given([str(sweep)])
    assert again.title == "mine"
    assert {row.label for row in again.rows} == {"fira-svd", "full", "lora"}
    write_report(again, sweep)
    assert "lora" in (sweep / "compare.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run was given"),
        (["{tmp}/nowhere"], "does not exist"),
        (["{tmp}/one", "{tmp}/one"], "two runs are called 'fira'"),
        (["all={tmp}/sweep"], "holds several runs"),
        (["{tmp}/empty"], "no config.yaml"),
        (["{tmp}/bare"], "holds no run that has begun"),
        (["{tmp}/broken.json"], "cannot be read"),
        (["{tmp}/other.json"], "compare.json of format 1"),
        (["{tmp}/one", "--colour", "red"], "does not know --colour"),
        (["{tmp}/one", "--output_dir", "{tmp}/sweep"], "is not empty"),
    ],
)
def test_refusals(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "runs").mkdir(parents=True)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"format": 0}')
    before = sorted(tmp_path.rglob("*"))
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    out = [] if "--output_dir" in given else ["--output_dir", str(tmp_path / "out")]
    assert main(["report", *given, *out]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "usage: fullrank report RUN" in capsys.readouterr().out


def test_a_label_may_have_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "lr=3" / "a=b")
    _, (run,) = read_given(str(folder))
    assert run.label == "fira"
    _, (run,) = read_given(f"mine={folder}")
    assert run.label == "mine"


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run was given"):
        compare_given([])


@pytest.mark.slow
def test_a_report_of_trained_runs(tmp_path: Path) -> None:
    from fullrank.train.resolve import resolve
    from fullrank.train.run import pretrain

    text = write_text(tmp_path / "text.jsonl")
    for method in ("fira", "full"):
        pretrain(resolve(recipe(text, tmp_path / method, method)))
    comparison, files = report(
        ReportOptions(runs=[str(tmp_path / "fira"), str(tmp_path / "full")], output_dir=str(tmp_path / "out"))
    )
    assert [file.name for file in files] == [*FILES, *FIGURES]
    assert {row.label for row in comparison.rows} == {"fira", "full"}
    for row, run in ((row, comparison.best_runs(row.label)[0]) for row in comparison.rows):
        assert row.score is not None
        assert row.model_memory_bytes
        assert run.validation.step == [0, 10, 20]
        assert run.train.step == list(range(1, 21))
        assert run.train.tokens[-1] == run.result["tokens"]  # type: ignore[index]
        assert 0 < run.train.time_s[0] < run.train.time_s[-1]
    assert not [note for note in comparison.notes if "differ in" in note]


def test_a_label_of_a_line_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="40 characters long, got 41"):
        read_given(f"{'x' * 41}={run}")
