"""What analyses leave: tables, JSON, CSV and figures, whole, readable and the same each time."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rcParams
from PIL import Image

from fullrank.analysis.figure import COLOURS, STYLES, new_figure, plain, save
from fullrank.analysis.output import check_output, leave
from fullrank.analysis.table import csv_text, text_table
from fullrank.errors import ConfigError, UnsupportedError

ROWS = [{"run": "one, two", "value": 0.1}, {"run": 'say "x"', "value": None}, {"run": "ä", "value": math.nan}]


def figure(title: str = "loss & norm") -> Any:
    made = new_figure(4, 3)
    axes = made.subplots()
    for place, colour in enumerate(COLOURS):
        axes.plot([0, 1], [place, place + 1], color=colour, linestyle=STYLES[place % len(STYLES)], label=str(place))
    axes.set_title(title)
    axes.legend()
    plain(axes)
    return made


def test_words_stand_left_and_numbers_right() -> None:
    lines = text_table(("name", "run", "value"), [("a", "long-name", "1.5"), ("bcdef", "b", "10.25")], num_left=2)
    assert lines.splitlines() == [
        "name   run        value",
        "a      long-name    1.5",
        "bcdef  b          10.25",
    ]
    assert text_table(("a", "b"), [("x", "")]) == "a  b\nx", "no blanks at the end of a line"
    assert text_table(("a", "b"), []) == "a  b"


def test_csv_is_read_back() -> None:
    """With quotes, commas and letters of any kind; what is no number is empty."""
    text = csv_text(ROWS)
    assert text.splitlines()[0] == "run,value"
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"run": "one, two", "value": "0.1"},
        {"run": 'say "x"', "value": ""},
        {"run": "ä", "value": ""},
    ]


def test_everything_is_left_in_the_folder(tmp_path: Path) -> None:
    content = {"numbers": [1.5, math.inf, {"x": (math.nan, 2)}], "none": None, "word": "ä"}
    found = leave("kind", tmp_path / "a" / "b", content=content, rows=ROWS, figure=figure(), table="the table")
    folder = tmp_path / "a" / "b"
    files = [folder / f"kind.{end}" for end in ("json", "csv", "png", "svg")]
    assert found.files == files
    assert sorted(folder.iterdir()) == sorted(files), "and no partial file"
    read = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert read.pop("versions")["torch"]
    assert read == {"numbers": [1.5, None, {"x": [None, 2]}], "none": None, "word": "ä"} == found.content
    assert files[1].read_text() == csv_text(ROWS)
    assert str(found) == "the table\n" + ", ".join(map(str, files))


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    for folder, message in ((tmp_path, "is not empty; nothing was overwritten"), (tmp_path / "file", "is a file")):
        with pytest.raises(ConfigError, match=message):
            check_output(folder)


def test_matplotlib_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = figure()
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    for call in (lambda: check_output(tmp_path), lambda: new_figure(1, 1), lambda: save(made, tmp_path / "x")):
        with pytest.raises(UnsupportedError, match=r"pip install 'fullrank\[report\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    """Saved twice, and made and saved again; another figure gives others."""
    made = figure()
    saved = [save(made, tmp_path / "a"), save(made, tmp_path / "b"), save(figure(), tmp_path / "c")]
    assert saved[0] == [tmp_path / "a.png", tmp_path / "a.svg"]
    assert len({tuple(path.read_bytes() for path in paths) for paths in saved}) == 1
    other = save(figure("another"), tmp_path / "d")
    assert all(new.read_bytes() != old.read_bytes() for new, old in zip(other, saved[0], strict=True))


def test_colours_are_true_and_text_is_text(tmp_path: Path) -> None:
    before = dict(rcParams)
    png, svg = save(figure(), tmp_path / "name.with.dots")
    assert dict(rcParams) == before, "the settings of others are left alone"
    with Image.open(png) as image:
        assert (image.mode, image.size) == ("RGB", (440, 330)), "a palette would change the colours"
    text = svg.read_text(encoding="utf-8")
    assert ">loss &amp; norm</text>" in text
    assert "<dc:date>" not in text
    assert png.name == "name.with.dots.png"


def test_axes_are_plain() -> None:
    axes = figure().axes[0]
    shown = {side: spine.get_visible() for side, spine in axes.spines.items()}
    assert shown == {"left": True, "bottom": True, "top": False, "right": False}
    assert axes.xaxis.get_gridlines()[0].get_alpha() == 0.3


def test_colours_can_be_told_apart() -> None:
    assert len(set(COLOURS)) == len(COLOURS)
    pairs = {(COLOURS[place % len(COLOURS)], STYLES[place % len(STYLES)]) for place in range(28)}
    assert len(pairs) == 28, "as many lines in one figure"
