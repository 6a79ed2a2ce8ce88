"""What every analysis leaves: a folder with its numbers (JSON, CSV) and its figure, and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.analysis.figure import require_drawing, save
from fullrank.analysis.table import csv_text, finite
from fullrank.train.folders import refuse_unusable
from fullrank.train.report import versions, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Findings:
    """The results of an analysis, once they are written."""

    content: dict[str, Any]
    """What its JSON file holds, versions left out."""
    table: str
    """For the terminal."""
    files: list[Path]
    """What was written: NAME.json, NAME.csv, NAME.png and NAME.svg."""

    def __str__(self) -> str:
        return f"{self.table}\n{', '.join(map(str, self.files))}"


def check_output(folder: str | Path) -> None:
    """Check that results can be left in a folder, before any work is done for them; nothing is written.

    Raises:
        ConfigError: If it is a file, holds something, or cannot be made.
        UnsupportedError: If matplotlib is not installed.
    """
    refuse_unusable(Path(folder), remedy="Choose another by --output_dir.")
    require_drawing()


def leave(
    name: str,
    folder: str | Path,
    *,
    content: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    figure: Figure,
    table: str,
) -> Findings:
    """Write the results of an analysis: NAME.json, NAME.csv, NAME.png and NAME.svg, each whole or not at all.

    Args:
        name: The analysis, which its files are called after.
        folder: Where to; made if need be.
        content: Everything that was found; ``versions`` are added. A number that is not finite becomes null.
        rows: The same as a table, a line each: name of a column and value. The first has all columns.
        figure: The figure.
        table: The lines for the terminal.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    found = {key: finite(value) for key, value in content.items()}
    files = [place / f"{name}.json", place / f"{name}.csv"]
    write_whole(files[0], json.dumps(found | {"versions": versions()}, indent=1, allow_nan=False) + "\n")
    write_whole(files[1], csv_text(rows))
    return Findings(content=found, table=table, files=[*files, *save(figure, place / name)])
