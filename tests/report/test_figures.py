"""The figures of a comparison: which files there are, what they show, and that they are the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.figures import draw, draw_loss, draw_memory, short_count
from fullrank.report.runs import read_run
from tests.report.invented import invented_run
from tests.report.made import MB, write_rows, write_run

METHODS = ("fira", "galore", "apollo", "full", "lora", "relora", "sift")
PNG = b"\x89PNG\r\n\x1a\n"


def compared(folder: Path, *runs: dict[str, Any]) -> Comparison:
    made = [read_run(write_run(folder / str(number), **options)) for number, options in enumerate(runs)]
    return compare_runs(made, title="a title")


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def svg_text(path: Path) -> str:
    """All text of an SVG, which is whole XML."""
    return " ".join(text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip())


def test_files_and_their_words(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path,
        {"method": "fira", "lr": 0.01, "perplexity": 30.0},
        {"method": "fira", "lr": 0.02, "perplexity": 35.0},
        {"method": "full", "lr": 0.001, "perplexity": 40.0},
        {"method": "lora", "perplexity": None, "outcome": {"outcome": "diverged", "note": "nan"}},
    )
    files = draw(comparison, tmp_path)
    kinds = ("loss_tokens", "loss_time", "perplexity_memory")
    assert names(files) == [f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")]
    assert all(file.read_bytes().startswith(PNG) for file in files if file.suffix == ".png")
    assert all(file.stat().st_size < 150_000 for file in files)
    words = svg_text(tmp_path / "loss_tokens.svg")
    for part in ("a title", "training tokens", "fira, lr 0.01", "full, lr 0.001", "lora, lr 0.01 (diverged)", "20K"):
        assert part in words
    assert "lr 0.02" not in words
    assert "time in optimizer steps (s)" in svg_text(tmp_path / "loss_time.svg")
    words = svg_text(tmp_path / "perplexity_memory.svg")
    assert "perplexity, lower is better" in words
    assert "lora" not in words


@pytest.mark.slow
def test_the_same_comparison_gives_the_same_bytes(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"method": "fira"})
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        contents.append([file.read_bytes() for file in draw(comparison, tmp_path / name)])
    assert contents[0] == contents[1]


def test_a_task_is_scored_in_percent(tmp_path: Path) -> None:
    run = {"method": "sift", "scores": {"loss": 0.3, "accuracy": 0.9}, "metric": "accuracy", "task": "sst2"}
    assert "score_memory.svg" in names(draw(compared(tmp_path, run), tmp_path))
    assert "accuracy (%), higher is better" in svg_text(tmp_path / "score_memory.svg")


def test_what_is_not_known_is_not_drawn(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"method": "fira", "older": True})
    assert names(draw(comparison, tmp_path))[-1] == "loss_time.svg"
    for run in range(len(comparison.runs)):
        (tmp_path / str(run) / "metrics.jsonl").unlink()
    assert draw(compare_runs([read_run(tmp_path / "0")], title=""), tmp_path) == []


def test_one_point_and_no_validation_can_be_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 4.0, "tokens": 10, "train_time_s": 1.0}) + "\n"
    )
    assert len(draw(compare_runs([read_run(folder)], title="t"), tmp_path)) == 6


def test_lines_are_the_curves(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"method": "fira"})
    axes = draw_loss(comparison, against="tokens").axes[0]
    training, validation = axes.lines
    assert list(training.get_ydata()) == pytest.approx(comparison.runs[0].train.loss)
    assert list(validation.get_xdata()) == [0, 10_000, 20_000]
    assert list(validation.get_ydata()) == [8.0, 4.5, 4.3]


def test_a_divergence_does_not_flatten_the_others(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"method": "fira"}, {"method": "lora", "perplexity": None})
    folder = tmp_path / "1"
    write_rows(folder, steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "loss": 1e6, "tokens": 21_000, "train_time_s": 12.0}) + "\n")
    comparison = compare_runs([read_run(tmp_path / "0"), read_run(folder)], title="t")
    low, high = draw_loss(comparison, against="tokens").axes[0].get_ylim()
    assert 3 < low < 4.2
    assert high < 9


@pytest.mark.parametrize("together", [False, True])
def test_names_do_not_cover_each_other(tmp_path: Path, together: bool) -> None:
    """Neither apart nor where all points are nearly the same."""
    runs = [
        {
            "method": method,
            "perplexity": 30 + (0.001 if together else 2.0) * number,
            "result": {"optimizer_state_bytes": (20 if together else 10 + 5 * number) * MB},
        }
        for number, method in enumerate(METHODS)
    ]
    figure = draw_memory(compared(tmp_path, *runs, {"method": "full", "perplexity": 90.0, "lr": 0.5}))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(METHODS)
    assert not [(a, b) for number, a in enumerate(boxes) for b in boxes[:number] if a.overlaps(b)]
    panel = figure.axes[0].get_window_extent()
    assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 for box in boxes)


def test_seeds_have_bars(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"perplexity": 30.0, "seed": 1}, {"perplexity": 32.0, "seed": 2})
    axes = draw_memory(comparison).axes[0]
    ((low, high),) = [segment[:, 1] for bars in axes.collections for segment in bars.get_segments()]
    assert (low, high) == (30.0, 32.0)


def test_scores_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"method": "fira", "perplexity": 30.0}, {"method": "lora", "perplexity": 900.0})
    assert draw_memory(comparison).axes[0].get_yscale() == "log"


def test_counts() -> None:
    assert [short_count(value) for value in (0, 950, 1500, 409_600, 1.5e6, 1.31e10)] == [
        *("0", "950", "1.5K", "409.6K", "1.5M", "13.1B")
    ]


def test_labels_are_text_and_none_is_hidden() -> None:
    """matplotlib would read a formula between dollars, and leave a name with a leading underscore out of a legend."""
    names = [r"a$\frac{$x", "_hidden"]
    comparison = compare_runs([invented_run(name, method="full") for name in names], title="text")
    figure = draw_loss(comparison, against="tokens")
    figure.draw_without_rendering()
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert len(shown) == 2
    draw_memory(comparison).draw_without_rendering()
