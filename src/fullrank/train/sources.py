"""Where text comes from: this Python's documentation, local files, or a hub dataset; and what is held out.

Every source becomes documents: rows with one string column, ``text``. A row of a table (.jsonl, .json, .csv,
.parquet) is a document. Of text files, one file alone is split at its blank lines; among several, each file is
one document. The validation documents are set aside here, before a tokenizer is trained or a token is cut,
and a text that occurs twice never falls on both sides.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError
from fullrank.train.config import DataConfig
from fullrank.train.pythondocs import write_python_docs

logger = logging.getLogger(__name__)

PYTHON_DOCS = "python-docs"
KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix of a local file -> its reader; each also with .gz behind it."""

_CHARACTERS_PER_TOKEN = 4  # of English under common tokenizers: how much text to hold out for so many tokens


@dataclass(frozen=True)
class Text:
    """Documents to learn from and documents to score on, with no text in both."""

    train: Dataset | IterableDataset
    """One string column, `text`."""
    validation: Dataset
    """One string column, `text`; at least as much text as the validation tokens need, where there is so much."""
    key: str
    """Hash of where the text came from and what was held out: the name of everything cached from it."""
    description: str
    """One line for people."""


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


def load_text(config: DataConfig, *, cache_dir: Path) -> Text:
    """Read the documents of `config` and set the validation documents aside.

    Args:
        config: The data section of a run.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The text. Training documents are a stream if ``config.streaming``; validation never is.

    Raises:
        ConfigError: If the text cannot be found or read, has no such field, or leaves nothing to score on.
    """
    source = find_source(config, cache_dir=cache_dir)
    held_out = _find_validation(config, source)
    train = read_documents(source, config, cache_dir=cache_dir, streaming=config.streaming)
    key = fingerprint(source.stamp, config.text_field, config.streaming, held_out and held_out.stamp)
    if held_out is None:
        key = fingerprint(key, config.seed, config.validation_tokens)
        train, validation = _carve(train, config, key=key)
        description = f"{source.name}, validation carved from it with seed {config.seed}"
    else:
        rows = read_documents(held_out, config, cache_dir=cache_dir, streaming=config.streaming)
        # ample, so that dense text still fills the validation tokens
        validation = _head(rows, num_characters=2 * _CHARACTERS_PER_TOKEN * config.validation_tokens)
        description = f"{source.name}, validation {held_out.name if held_out.files else held_out.split}"
    return Text(train=train, validation=validation, key=key, description=description)


def fingerprint(*parts: object) -> str:
    """Hash plain values into a name for a cached file (16 hexadecimal digits)."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_source(config: DataConfig, *, cache_dir: Path) -> Source:
    """Decide whether ``config.name`` is the Python documentation, local files, or a hub dataset."""
    if config.name == PYTHON_DOCS:
        return Source(name=PYTHON_DOCS, files=(write_python_docs(cache_dir),))
    if _looks_local(config.name):
        return Source(name=config.name, files=_find_files(config.name, setting="data.name"))
    return Source(name=config.name, subset=config.subset, split=config.split)


def _find_validation(config: DataConfig, source: Source) -> Source | None:
    """The named validation text, or none if it is to be carved from the training text."""
    if config.validation is None:
        if config.streaming:
            raise ConfigError(
                "data.streaming cannot carve a validation set out of a stream, and data.validation is not set. Set "
                "it to a file, a folder, a glob or a split of the hub dataset, or set data.streaming to false."
            )
        return None
    if source.files or _looks_local(config.validation):
        files = _find_files(config.validation, setting="data.validation")
        both = set(files) & set(source.files)
        if both:
            raise ConfigError(
                f"{min(both)} is both in data.name ({config.name}) and in data.validation ({config.validation}): "
                "the model would be scored on its training text. Narrow data.name, for example to train*.jsonl."
            )
        return Source(name=config.validation, files=files)
    if config.validation == config.split:
        raise ConfigError(
            f"data.validation and data.split are both {config.split!r}: the model would be scored on its training "
            "text. Name another split, or leave data.validation out to carve one."
        )
    return Source(name=config.name, subset=config.subset, split=config.validation)


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path: it exists, it has wildcards, or no hub name is written like it."""
    path = Path(name).expanduser()
    return path.exists() or glob.has_magic(name) or bool(_kind(path)) or name[0] in "./~" or name.count("/") > 1


def _kind(path: Path) -> str | None:
    """The reader for a file, by its suffix."""
    return KINDS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


def _find_files(name: str, *, setting: str) -> tuple[Path, ...]:
    """Files of a path, folder (with its subfolders) or glob, sorted; all of one kind."""
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [f for f in path.rglob("*") if _kind(f) and not f.name.startswith(".")]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
    files = sorted(f.resolve() for f in found)
    if not files:
        raise ConfigError(f"{setting} {name} has no file to read. {_nearby(path)}")
    kinds = {_kind(f) for f in files}
    if None in kinds or len(kinds) > 1:
        suffixes = ", ".join(sorted({"".join(f.suffixes[-2:]) for f in files}))
        raise ConfigError(
            f"{setting} {name} must name files of one kind among {', '.join(KINDS)} (or with .gz), got {suffixes}. "
            "Narrow it to one kind, for example with a glob such as folder/*.jsonl."
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
    try:
        rows = _open(source, cache_dir=cache_dir / "datasets", streaming=streaming)
        first: dict[str, Any] = next(iter(rows))
    except StopIteration:
        raise ConfigError(f"{source.name} has no rows. Name text that is not empty in data.name.") from None
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    field = "text" if source.name == PYTHON_DOCS else config.text_field
    if field not in first:
        raise ConfigError(f"{source.name} has no field {field!r}. Set data.text_field to one of: {', '.join(first)}.")
    if not isinstance(first[field], str | None):
        kind = type(first[field]).__name__
        raise ConfigError(f"field {field!r} of {source.name} holds {kind}, not text. Set data.text_field to another.")
    rows = rows.select_columns([field])
    return rows if field == "text" else rows.rename_column(field, "text")


def _open(source: Source, *, cache_dir: Path, streaming: bool) -> Dataset | IterableDataset:
    """Read a source with `datasets`; one call for local tables and the hub."""
    if not source.files:
        return load_dataset(
            source.name, source.subset, split=source.split, streaming=streaming, cache_dir=str(cache_dir)
        )
    paths = [str(f) for f in source.files]
    kind = _kind(source.files[0])
    if kind != "text":
        # escaped: `datasets` would read brackets in a path as a pattern
        data_files = [glob.escape(p) for p in paths]
        return load_dataset(kind, data_files=data_files, split="train", streaming=streaming, cache_dir=str(cache_dir))
    features = Features({"text": Value("string")})
    if streaming:
        return IterableDataset.from_generator(read_text_files, features=features, gen_kwargs={"paths": paths})
    return Dataset.from_generator(
        read_text_files,
        features=features,
        gen_kwargs={"paths": paths},
        cache_dir=str(cache_dir),
        fingerprint=fingerprint(source.stamp),
    )


def _unreadable(source: Source, error: Exception) -> ConfigError:
    """The error for text that `datasets` could not open or parse."""
    reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    if source.files:
        return ConfigError(f"{source.name} cannot be read: {reason}. Check that its files are what their suffix says.")
    return ConfigError(
        f"{source.name!r} (subset {source.subset}, split {source.split}) is not a local path, and the hub does not "
        f"give it: {reason}. Check the name, subset and split, or read local text: set data.name to a file, folder "
        f"or glob of {', '.join(KINDS)}, or to {PYTHON_DOCS}."
    )
