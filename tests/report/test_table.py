"""The tables of a comparison: aligned for the terminal, valid as Markdown, plain as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.runs import read_run
from fullrank.report.table import csv_text, markdown, score_text, terminal
from tests.report.made import MB, write_run

Add = tuple[str, str, dict[str, Any]]


def compared(folder: Path, *runs: Add, title: str = "a title") -> Comparison:
    """A comparison of runs given as (label, method, options of :func:`write_run`)."""
    made = [
        read_run(write_run(folder / str(number), method, **options), label=label)
        for number, (label, method, options) in enumerate(runs)
    ]
    return compare_runs(made, title=title)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    nan = {"outcome": "diverged", "note": "loss nan"}
    return compared(
        tmp_path,
        ("fira", "fira", {"lr": 0.01, "perplexity": 30.0, "seed": 1}),
        ("fira", "fira", {"lr": 0.01, "perplexity": 32.0, "seed": 2}),
        ("fira", "fira", {"lr": 0.02, "perplexity": 35.0, "seed": 1}),
        ("full", "full", {"lr": 0.001, "perplexity": 40.0, "result": {"optimizer_state_bytes": 34 * MB}}),
        ("relora", "relora", {"lr": 0.01, "perplexity": None, "outcome": nan}),
        ("relora", "relora", {"lr": 0.02, "perplexity": None}),
    )


def test_terminal(comparison: Comparison) -> None:
    text = terminal(comparison)
    lines = text.splitlines()
    assert lines[0] == "a title"
    header, fira, full = lines[2:5]
    assert header.split("  ")[0] == "label"
    costs = ["16.0", "17.0", "17.0", "901.5", "500", "2,000"]
    assert fira.split() == ["fira", "0.01*", "31.00", "(30.00,", "32.00)", "77.5%", *costs]
    assert full.split() == ["full", "0.001", "40.00", "100.0%", "34.0", "17.0", "17.0", "901.0", "500", "2,000"]
    for name in ("perplexity", "of full", "state MB", "gradients MB", "weights MB", "peak MB", "step ms", "tokens/s"):
        end = header.index(name) + len(name)
        assert fira[end - 1] != " "
        assert full[end - 1] != " "
        assert fira[end : end + 2].strip() == ""
    assert "relora: diverged at 0.01; unfinished at 0.02" in lines
    assert "* at an edge of the rates that were tried" in lines
    for note in comparison.notes:
        assert " ".join(note.split()) in " ".join(text.replace("\n  ", " ").split())
    assert max(map(len, lines)) <= 120


def test_terminal_without_any_score(tmp_path: Path) -> None:
    lines = terminal(compared(tmp_path, ("fira", "fira", {"perplexity": None}))).splitlines()
    assert lines[:3] == ["a title", "", "fira: unfinished at 0.01"]


def test_large_memory_is_in_gigabytes(tmp_path: Path) -> None:
    result = {"optimizer_state_bytes": 54_000 * MB, "peak_memory_bytes": 70_000 * MB}
    lines = terminal(compared(tmp_path, ("fira", "fira", {"result": result}))).splitlines()
    assert "state GB" in lines[2]
    assert "54.00" in lines[3]


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    result = {"step_time_median_s": None, "peak_memory_bytes": None}
    lines = terminal(compared(tmp_path, ("fira", "fira", {"older": True, "result": result}))).splitlines()
    assert lines[3].split() == ["fira", "0.01", "30.00", "100.0%", "16.0", "17.0", "-", "-", "-", "-"]


def test_shares_are_in_percent(tmp_path: Path) -> None:
    run = {"scores": {"loss": 0.3, "accuracy": 0.9123}, "metric": "accuracy", "task": "sst2"}
    comparison = compared(tmp_path, ("sift", "sift", run))
    assert "accuracy %" in terminal(comparison)
    assert "91.23" in terminal(comparison)
    assert "| sift | **91.23** |" in markdown(comparison)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("perplexity", 31.055, "31.05"),
        ("perplexity", 12345.6, "12,346"),
        ("loss", 3.14159, "3.1416"),
        ("accuracy", 0.5, "50.00"),
        ("matthews_correlation", -0.25, "-25.00"),
    ],
)
def test_scores_as_text(metric: str, value: float, text: str) -> None:
    assert score_text(metric, value) == text


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown document as cells, header first, without the line of dashes."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            if not inside:
                found.append([])
            found[-1].append(cells)
        inside = line.startswith("|")
    return [[table[0], *table[2:]] for table in found]


def test_markdown(comparison: Comparison) -> None:
    text = markdown(comparison)
    results, grid, published = tables(text)
    for table in (results, grid, published):
        assert len({len(row) for row in table}) == 1
    assert results[1][:3] == ["fira", "0.01\\*", "31.00 (30.00, 32.00)"]
    assert grid[0] == ["label", "0.001", "0.01", "0.02"]
    assert grid[1:] == [
        ["fira", "", "**30.00**", "35.00"],
        ["full", "**40.00**", "", ""],
        ["relora", "", "diverged", "unfinished"],
    ]
    assert "\n## Notes\n\n- " in text
    assert "\n## Published\n" in text
    assert {row[0] for row in published[1:]} == {"fira", "full"}
    assert "None of these papers has numbers of llama-20m" in text


def test_labels_do_not_break_the_markdown(tmp_path: Path) -> None:
    title = "a|b <script>*x* [link](http://x)\nsecond"
    text = markdown(compared(tmp_path, ("a|b_*c*<i>", "fira", {}), title=title))
    assert text.startswith("# a\\|b \\<script\\>\\*x\\* \\[link\\](http://x) second\n")
    assert tables(text)[0][1][0] == "a/b\\_\\*c\\*\\<i\\>"


def test_csv(comparison: Comparison) -> None:
    fira, full, relora = csv.DictReader(io.StringIO(csv_text(comparison)))
    assert (fira["label"], fira["method"], fira["learning_rate"], fira["at_edge"]) == ("fira", "fira", "0.01", "true")
    assert (fira["perplexity_mean"], fira["perplexity_seed_1"], fira["perplexity_seed_2"]) == ("31.0", "30.0", "32.0")
    assert full["perplexity_seed_2"] == ""
    assert (fira["relative_to_full"], full["relative_to_full"]) == ("0.775", "1.0")
    assert (full["optimizer_state_bytes"], full["model_memory_bytes"]) == (str(34 * MB), str(68 * MB))
    assert (fira["step_time_s"], fira["tokens_per_s"]) == ("0.5", "2000.0")
    assert relora["label"] == "relora"
    assert {relora[name] for name in relora if name not in ("label", "method", "at_edge")} == {""}


def test_a_comma_in_a_label_stays_in_its_cell(tmp_path: Path) -> None:
    (row,) = csv.DictReader(io.StringIO(csv_text(compared(tmp_path, ('fira, "svd"', "fira", {})))))
    assert row["label"] == 'fira, "svd"'
