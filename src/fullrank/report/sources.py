"""What a report is made of: runs, whole comparisons, or the compare.json of an earlier report."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fullrank.errors import ConfigError
from fullrank.report.comparison import Comparison, compare_runs, rate_key
from fullrank.report.runs import Run, read_run
from fullrank.report.write import write_report
from fullrank.train.folders import refuse_unusable

logger = logging.getLogger(__name__)

RUNS = "runs"
"""Folder of the runs in that of a comparison."""
CONTENT = "compare.json"
LONGEST_LABEL = 40
"""Characters: tables and legends have room for no more."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of ``fullrank report``."""

    runs: list[str] = field(default_factory=list)
    """Runs, as FOLDER or LABEL=FOLDER, folders of comparisons, or compare.json files."""
    output_dir: str = "report"
    """Folder to write; must be new or empty."""
    title: str | None = None
    """Title of the report; null: that of the comparison if one is given alone, else model and data."""


def report(options: ReportOptions) -> tuple[Comparison, list[Path]]:
    """Compare finished runs and write a report of them.

    Returns:
        The comparison and the files.

    Raises:
        ConfigError: If the folder cannot be used, nothing is given, or what is given cannot be read or compared.
    """
    folder = Path(options.output_dir)
    refuse_unusable(folder, remedy="Choose another by --output_dir.")
    comparison = compare_given(options.runs, title=options.title)
    return comparison, write_report(comparison, folder)


def compare_given(given: Sequence[str], *, title: str | None = None) -> Comparison:
    """Compare what a command line names, without writing anything.

    Args:
        given: Each a run's folder, LABEL=FOLDER, a comparison's folder or a compare.json.
        title: Title of the report; None: that of a comparison given alone, else model and data.

    Raises:
        ConfigError: If nothing is given, or something cannot be read or compared.
    """
    if not given:
        raise ConfigError("no run was given. Give at least one folder of a run or of a comparison.")
    found = [read_given(text) for text in given]
    runs = [run for _, own in found for run in own]
    if title is None:
        title = (found[0][0] if len(found) == 1 else None) or default_title(runs[0])
    return compare_runs(runs, title=title)


def read_given(text: str) -> tuple[str | None, list[Run]]:
    """The runs that one word of a command line names, and the title of the comparison if it is one.

    Raises:
        ConfigError: If it is none of what a report can be made of, or damaged.
    """
    label, path = split_label(text)
    if label is not None and len(label) > LONGEST_LABEL:
        raise ConfigError(f"a label may be {LONGEST_LABEL} characters long, got {len(label)}: {label}. Shorten it.")
    in_path = path / CONTENT if path.is_dir() else path
    is_comparison = (path / RUNS).is_dir() and not (path / "config.yaml").is_file()
    if not is_comparison and not in_path.is_file():
        return None, [read_labelled(path, label=label)]
    if label is not None:
        raise ConfigError(f"{path} holds several runs, so it cannot be called {label!r}. Leave the label out.")
    earlier = read_comparison(in_path) if in_path.is_file() else None
    runs = _read_folder(path / RUNS) if is_comparison else earlier.runs if earlier is not None else []
    if not runs:
        raise ConfigError(f"{path / RUNS} holds no run that has begun. Wait, or give other folders.")
    return earlier.title if earlier is not None else None, runs


def split_label(text: str) -> tuple[str | None, Path]:
    """LABEL=FOLDER as both; a path that exists as it stands has no label."""
    label, equals, folder = text.partition("=")
    if equals and label and "/" not in label and not Path(text).exists():
        return label, Path(folder)
    return None, Path(text)


def read_labelled(folder: Path, *, label: str | None = None) -> Run:
    """A run by its label: the given one, that in the name of its folder in a comparison, or its method.

    ``fira-svd-lr0.01-seed1`` is the name of a run of ``fira-svd``.
    """
    run = read_run(folder)
    name, end = folder.absolute().name, f"-lr{rate_key(run.lr)}-seed{run.seed}"
    in_name = name.removesuffix(end) if name.endswith(end) else ""
    return replace(run, label=label or in_name or run.label)


def read_comparison(path: Path) -> Comparison:
    """The comparison in a compare.json.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def default_title(run: Run) -> str:
    """Model and data of a run."""
    return f"{Path(run.config['model']['name']).name} on {Path(run.config['data']['name']).name}"


def _read_folder(folder: Path) -> list[Run]:
    """The runs of a comparison by their names; those that have not begun are left out."""
    runs = []
    for path in sorted(folder.iterdir()):
        if (path / "config.yaml").is_file():
            runs.append(read_labelled(path))
        elif path.is_dir():
            logger.warning("%s has no config.yaml: it has not begun and is left out", path)
    return runs
