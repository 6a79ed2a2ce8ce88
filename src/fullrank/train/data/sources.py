"""Where text comes from: this Python's documentation, local files, or a hub dataset.

Every source becomes documents: rows with one string column, ``text``. A row of a table (.jsonl, .json, .csv,
.parquet) is a document. Of text files (.txt), one file alone is split at its blank lines, so that a corpus in
one file has documents to shuffle and to hold out; among several, each file is one document. Any of them may be
compressed (.gz). Tables and hub datasets go through the same call of `datasets`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError, first_line
from fullrank.train.config import PYTHON_DOCS, DataConfig, InstructionsConfig
from fullrank.train.data.pythondocs import write_python_docs

logger = logging.getLogger(__name__)

KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix of a local file -> its reader; each also with .gz behind it."""


@dataclass(frozen=True)
class Source:
    """A place that text can be read from, found but not opened."""

    name: str
    files: tuple[Path, ...] = ()
    """Local files; none for a hub dataset."""
    subset: str | None = None
    split: str = "train"

    @property
    def stamp(self) -> tuple[object, ...]:
        """What identifies the content without reading it: path, size and time of change of each file."""
        files = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self.files)
        return files or (self.name, self.subset, self.split)


def fingerprint(*parts: object) -> str:
    """Hash plain values into a name for a cached file (16 hexadecimal digits)."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_source(config: DataConfig | InstructionsConfig, *, cache_dir: Path) -> Source:
    """Decide whether ``config.name`` is the Python documentation, local files, or a hub dataset."""
    if config.name == PYTHON_DOCS:
        return Source(name=PYTHON_DOCS, files=(write_python_docs(cache_dir),))
    if _looks_local(config.name):
        if config.subset is not None:
            logger.warning("data.subset %s has no effect on local files (%s)", config.subset, config.name)
        return Source(name=config.name, files=find_files(config.name, setting="data.name"))
    return Source(name=config.name, subset=config.subset, split=config.split)


def find_validation(name: str, config: DataConfig | InstructionsConfig, source: Source) -> Source:
    """Find the validation data that ``config.validation``, here `name`, names beside the training data of `source`.

    Raises:
        ConfigError: If it is part of the training data, or there is no such file.
    """
    # beside a hub dataset a bare word is a split, even where a folder is called so
    if source.files or is_text_file(name) or "/" in name:
        files = find_files(name, setting="data.validation")
        both = set(files) & set(source.files)
        if both:
            raise ConfigError(
                f"{min(both)} is in data.name ({config.name}) and in data.validation ({name}): the "
                "model would be scored on its training text. Narrow data.name, for example to train*.jsonl."
            )
        return Source(name=name, files=files)
    if name == config.split:
        raise ConfigError(
            f"data.validation and data.split are both {config.split!r}: the model would be scored on its "
            "training text. Name another split, or leave data.validation out to carve one."
        )
    return Source(name=config.name, subset=config.subset, split=name)


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path: it exists, it has wildcards, or no hub name is written like it."""
    path = Path(name).expanduser()
    return path.exists() or glob.has_magic(name) or is_text_file(name) or name[0] in "./~" or name.count("/") > 1


def is_text_file(name: str) -> bool:
    """Whether a name ends as a file we can read does."""
    return kind_of(Path(name)) is not None


def kind_of(path: Path) -> str | None:
    """The reader for a file, by its suffix; None if there is none."""
    return KINDS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


def find_files(name: str, *, setting: str) -> tuple[Path, ...]:
    """Files of a path, folder (with its subfolders) or glob, sorted; all of one kind.

    Args:
        name: The path, folder or glob; ``~`` is the home folder.
        setting: Where the name was given, for the error.

    Raises:
        ConfigError: If there is no such file, or the files are of several kinds or of none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [f for f in path.rglob("*") if kind_of(f) and not f.name.startswith(".")]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
    files = sorted(f.resolve() for f in found)
    if not files:
        raise ConfigError(f"{setting} {name} has no file to read. {_nearby(path)}")
    kinds = {kind_of(f) for f in files}
    if None in kinds or len(kinds) > 1:
        suffixes = ", ".join(sorted({"".join(f.suffixes[-2:]) for f in files}))
        raise ConfigError(
            f"{setting} {name} must name files of one kind among {', '.join(KINDS)} (or with .gz), got "
            f"{suffixes}. Narrow it to one kind, for example with a glob such as folder/*.jsonl."
        )
    return tuple(files)


def _nearby(path: Path) -> str:
    """What a mistyped path may have meant."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"There is no folder {folder}: check the path."
    names = sorted(f.name for f in folder.iterdir() if not f.name.startswith("."))
    close = get_close_matches(path.name, names, n=3) or names[:5]
    return f"{folder} has: {', '.join(close)}." if close else f"The folder {folder} is empty."


def read_documents(
    source: Source, config: DataConfig, *, cache_dir: Path, streaming: bool
) -> Dataset | IterableDataset:
    """Open a source as rows of one column, ``text``, and look at the first one.

    Raises:
        ConfigError: If it cannot be read, is empty, or lacks the text field.
    """
    rows, first = open_rows(source, cache_dir=cache_dir, streaming=streaming)
    field = "text" if source.name == PYTHON_DOCS else config.text_field
    if field not in first:
        fields = ", ".join(first)
        raise ConfigError(f"{source.name} has no field {field!r}. Set data.text_field to one of: {fields}.")
    if not isinstance(first[field], str | None):
        kind = type(first[field]).__name__
        raise ConfigError(f"field {field!r} of {source.name} holds {kind}, not text. Change data.text_field.")
    rows = rows.select_columns([field])
    return rows if field == "text" else rows.rename_column(field, "text")


def open_rows(
    source: Source, *, cache_dir: Path, streaming: bool = False
) -> tuple[Dataset | IterableDataset, dict[str, Any]]:
    """Open a source with all its fields, and look at the first row.

    Raises:
        ConfigError: If it cannot be read, or is empty.
    """
    try:
        rows = _open(source, cache_dir=cache_dir / "datasets", streaming=streaming)
        return rows, next(iter(rows))
    except StopIteration:
        raise ConfigError(f"{source.name} is empty. Name a source that holds text.") from None
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable(source, error) from error


def _open(source: Source, *, cache_dir: Path, streaming: bool) -> Dataset | IterableDataset:
    """Read a source with `datasets`; one call for local tables and the hub."""
    if not source.files:
        return load_dataset(
            source.name, source.subset, split=source.split, streaming=streaming, cache_dir=str(cache_dir)
        )
    paths = [str(f) for f in source.files]
    kind = kind_of(source.files[0])
    if kind != "text":
        # escaped: `datasets` would read brackets in a path as a pattern
        data_files = [glob.escape(p) for p in paths]
        return load_dataset(kind, data_files=data_files, split="train", streaming=streaming, cache_dir=str(cache_dir))
    features = Features({"text": Value("string")})
    settings: dict[str, Any] = {"paths": paths, "whole": len(paths) > 1}
    next(read_text_files(**settings))  # `datasets` answers text without documents with an obscure error
    if streaming:
        return IterableDataset.from_generator(read_text_files, features=features, gen_kwargs=settings)
    return Dataset.from_generator(
        read_text_files,
        features=features,
        gen_kwargs=settings,
        cache_dir=str(cache_dir),
        fingerprint=fingerprint(source.stamp),
    )


def read_text_files(paths: list[str], *, whole: bool) -> Iterator[dict[str, str]]:
    """Yield the documents of text files: each file, if `whole`, else the blocks between blank lines."""
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            if whole:
                yield {"text": file.read()}
                continue
            for blank, lines in groupby(file, key=str.isspace):
                if not blank:
                    yield {"text": "".join(lines)}


def _unreadable(source: Source, error: Exception) -> ConfigError:
    """The error for text that `datasets` could not open or parse."""
    reason = first_line(error.__cause__ or error)
    if source.files:
        return ConfigError(f"{source.name} cannot be read: {reason} Check that its files are what they are called.")
    return ConfigError(
        f"{source.name!r} (subset {source.subset}, split {source.split}) is not a local path, and the hub does "
        f"not give it: {reason} Check the name, subset and split, or read local text: set data.name to a "
        f"file, folder or glob of {', '.join(KINDS)}, or to {PYTHON_DOCS}."
    )
