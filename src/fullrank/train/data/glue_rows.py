"""The examples of a GLUE task as they are distributed: the hub's dataset or the official files.

The files (TASK/train.tsv and TASK/dev.tsv) hold one example a line, cells between tabs. Quotes are text in them, and
only a line feed ends a line. CoLA's have no header, MRPC's begin with a byte-order mark, QQP's have a few lines that
are broken in two. Labels get the hub's numbers, so that a model trained from one source means the same with the
other. Texts are taken as they are, spaces at their ends too, as the hub has them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError, first_line
from fullrank.train.config import GlueConfig
from fullrank.train.data.glue_tasks import HIGHEST_SCORE, LOWEST_SCORE, TASKS, GlueTask
from fullrank.train.data.sources import Source

logger = logging.getLogger(__name__)

_SUFFIXES = (".tsv", ".txt")

Row = tuple[str, tuple[str, ...], int | float]
"""Where an example is (for errors), its texts, its label."""


@dataclass(frozen=True)
class Examples:
    """Labelled examples as plain columns."""

    texts: tuple[list[str], ...]
    """The one or two texts of each example, by field."""
    labels: list[int] | list[float]


def find_train(config: GlueConfig) -> Source:
    """The training examples of `config`, found but not opened.

    Raises:
        ConfigError: If there is no such file.
    """
    place = _place(config)
    if place is None:
        return _split(config, "train")
    return _file(place) if place.is_file() else _official(TASKS[config.task].train_files, place, setting="data.name")


def find_validation(config: GlueConfig) -> list[tuple[str, Source]]:
    """The validation sets of `config`, found but not opened, each with the suffix of its metrics.

    Raises:
        ConfigError: If there is no such file.
    """
    place = _place(config)
    given = config.validation
    if given is not None and place is None and "/" not in given and not given.endswith(_SUFFIXES):
        return [("", _split(config, given))]
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(f"data.validation {given} is not a file. Set it to a .tsv file that is there.")
        return [("", _file(path))]
    sets = TASKS[config.task].validation
    if place is None:
        return [(suffix, _split(config, split)) for split, _, suffix in sets]
    folder = place.parent if place.is_file() else place
    return [(suffix, _official((name,), folder, setting="data.validation")) for _, name, suffix in sets]


def _place(config: GlueConfig) -> Path | None:
    """The folder of the task's official files, or its training file; None: a dataset that `datasets` reads."""
    name = config.name
    path = Path(name).expanduser()
    if not name or (not path.exists() and (name[0] in "./~" or name.count("/") > 1 or name.endswith(_SUFFIXES))):
        raise ConfigError(
            f"data.name {name!r} is not a file or folder. Check the path, or set it to a hub dataset: nyu-mll/glue."
        )
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise ConfigError(f"data.name {name} must be a folder or a .tsv file. Change it.")
    if not path.is_dir():
        return path if path.is_file() else None
    task = TASKS[config.task]
    names = (*task.train_files, *(file for _, file, _ in task.validation))
    below = [child for child in sorted(path.iterdir()) if child.name.lower() in (task.folder.lower(), config.task)]
    return next((folder for folder in (path, *below) if folder.is_dir() and _called(names, folder)), None)


def _called(names: tuple[str, ...], folder: Path) -> list[Path]:
    """The files of a folder with one of these names, in the order of the names, whatever the case of their letters."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [file for name in names for file in files if file.name.lower() == name]


def _official(names: tuple[str, ...], folder: Path, *, setting: str) -> Source:
    """The first of these files that a folder has."""
    found = _called(names, folder)
    if not found:
        raise ConfigError(f"{folder} has no {names[0]}. Put it there, or set {setting} to a .tsv file.")
    return _file(found[0])


def _file(path: Path) -> Source:
    return Source(str(path), files=(path.resolve(),))


def _split(config: GlueConfig, split: str) -> Source:
    return Source(config.name, subset=config.subset or config.task, split=split)


def read_examples(source: Source, task: GlueTask, *, cache_dir: Path) -> Examples:
    """Read and check every example of a source.

    Args:
        source: A file of the official format, or a split that `datasets` reads.
        task: What to read it as.
        cache_dir: Folder of what `datasets` downloads.

    Raises:
        ConfigError: If it cannot be read, or an example is not as the task has it; with the file, line and field.
    """
    texts: tuple[list[str], ...] = tuple([] for _ in task.text_fields)
    labels: list[Any] = []
    rows = _file_rows(source.files[0], task) if source.files else _split_rows(source, task, cache_dir=cache_dir)
    for where, values, label in rows:
        if not any(map(str.strip, values)):
            raise ConfigError(f"{where}: no text in {' or '.join(task.text_fields)}. Remove or mend it.")
        for column, value in zip(texts, values, strict=True):
            column.append(value)
        labels.append(label)
    if not labels:
        raise ConfigError(f"{source.name} has no examples. Name a source that has some.")
    return Examples(texts, labels)


def _file_rows(path: Path, task: GlueTask) -> Iterator[Row]:
    """Yield the examples of an official file."""
    header = task.header
    num_short = 0
    for number, cells in _lines(path):
        where = f"{path}, line {number}"
        if not header:
            header = _header(cells, task, where)
            continue
        if task.skips_short_rows and len(cells) < len(header):
            num_short += 1
            continue
        if len(cells) != len(header):
            raise ConfigError(
                f"{where}: {len(cells)} cells between tabs, {task.folder} has {len(header)} ({', '.join(header)}). "
                "Mend the line; quotes do not protect a tab."
            )
        row = dict(zip(header, cells, strict=True))
        label = _file_label(row[task.label_column].strip(), task, where)
        yield where, tuple(row[column] for column in task.text_columns), label
    if num_short:
        logger.warning("%s: left out %d broken lines, as the hub's dataset does", path, num_short)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                content = line.rstrip("\r\n")
                if content:
                    yield number, content.split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}. Check that it is a .tsv file.") from error


def _header(cells: list[str], task: GlueTask, where: str) -> tuple[str, ...]:
    """The names of the columns, if those of the task are among them."""
    header = tuple(cell.strip() for cell in cells)
    missing = [column for column in (*task.text_columns, task.label_column) if column not in header]
    if missing:
        raise ConfigError(
            f"{where}: the header ({', '.join(header)}) lacks {', '.join(missing)}, so this is not a labelled file of "
            f"{task.folder}. Set data.task and the file to match."
        )
    return header


def _file_label(text: str, task: GlueTask, where: str) -> int | float:
    """The hub's number for the label of a file."""
    if text in task.file_labels:
        return task.file_labels.index(text)
    if task.is_regression:
        try:
            score = float(text)
        except ValueError:
            score = -1.0
        if LOWEST_SCORE <= score <= HIGHEST_SCORE:
            return float(np.float32(score))  # as the hub's dataset holds it
    raise ConfigError(f"{where}: {task.label_column} is {text!r}, {_expected(task.file_labels)}. Mend the line.")


def _expected(labels: tuple[object, ...]) -> str:
    if labels:
        return f"expected one of {', '.join(map(str, labels))}"
    return f"expected a number from {LOWEST_SCORE:g} to {HIGHEST_SCORE:g}"


def _split_rows(source: Source, task: GlueTask, *, cache_dir: Path) -> Iterator[Row]:
    """Yield the examples of a split that `datasets` reads."""
    rows = _open_split(source, task, cache_dir=cache_dir)
    kind = rows.features["label"]
    if isinstance(kind, ClassLabel) and tuple(kind.names) != task.label_names:
        raise ConfigError(
            f"{_title(source)}: its labels are {', '.join(kind.names)}, those of {task.folder} "
            f"{', '.join(task.label_names)}, in this order. Set data.task and data.name to match."
        )
    numbers = () if task.is_regression else tuple(range(len(task.label_names)))
    columns = [rows[field][:] for field in (*task.text_fields, "label")]
    for index, (*values, label) in enumerate(zip(*columns, strict=True)):
        where = f"{_title(source)}, example {index}"
        if label == -1:
            raise ConfigError(f"{where}: label is -1, hidden as in GLUE's test sets. Name a split with labels.")
        if task.is_regression:
            known = isinstance(label, float) and LOWEST_SCORE <= label <= HIGHEST_SCORE
        else:
            known = type(label) is int and label in numbers
        if not known:
            raise ConfigError(f"{where}: label is {label!r}, {_expected(numbers)}. Mend it.")
        for field, value in zip(task.text_fields, values, strict=True):
            if not isinstance(value, str):
                raise ConfigError(f"{where}: {field} is {value!r}, expected text. Mend it.")
        yield where, tuple(values), label


def _open_split(source: Source, task: GlueTask, *, cache_dir: Path) -> Dataset:
    """Open a split and look for the task's fields."""
    fields = (*task.text_fields, "label")
    try:
        rows: Dataset = load_dataset(
            source.name, source.subset, split=source.split, cache_dir=str(cache_dir / "datasets")
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = first_line(error.__cause__ or error).rstrip(".")
        raise ConfigError(
            f"{_title(source)} has no {task.folder}/{task.train_files[0]}, and `datasets` cannot read it: {reason}. "
            "Check the name, the subset and the split, or set data.name to a folder with GLUE's official files."
        ) from error
    missing = [field for field in fields if field not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{_title(source)} has the fields {', '.join(rows.column_names)} and lacks {', '.join(missing)}. Set "
            "data.task and data.name to match."
        )
    return rows


def _title(source: Source) -> str:
    return f"{source.name} ({source.subset}, {source.split})"
