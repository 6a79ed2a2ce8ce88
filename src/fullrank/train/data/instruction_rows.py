"""The rows of instruction data as they lie in files or on the hub: read, told apart by their fields, and checked.

A row of JSON or CSV is kept as the JSON text of one object until it is used. Through a table it would lose what an
error has to tell: a missing field would be a null, and where every answer is a date or a number no text would be left.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from fullrank.errors import ConfigError
from fullrank.train.data.sources import Source, fingerprint, kind_of, open_rows

_SHOWN = 60  # characters of a wrong value that an error shows
_PARSED = ("json", "csv")  # kinds of files that are read here


@dataclass(frozen=True)
class Row:
    """One row, and how its values are asked for."""

    values: dict[str, Any]
    place: Callable[[], str]
    """Says which row of which file it is; called for an error alone."""

    def text(self, field: str) -> str:
        """A field that has to be there and to hold text; it may be empty.

        Raises:
            ConfigError: If it is missing, null, or something else.
        """
        return self._checked(self._value(field), field)

    def optional_text(self, field: str) -> str:
        """A field that holds text; "" where it is missing or null."""
        value = self.values.get(field)
        return "" if value is None else self._checked(value, field)

    def messages(self, field: str) -> list[dict[str, Any]]:
        """A field that holds messages: at least one, each with the texts ``role`` and ``content``.

        A turn that calls tools needs no content. What else a message holds goes to the chat template.
        """
        messages = self._value(field)
        if not isinstance(messages, list):
            raise self.error(field, f"holds {_named(messages)}, not a list of messages")
        if not messages:
            raise self.error(field, "holds no message")
        return [self._message(message, f"{field}[{number}]") for number, message in enumerate(messages)]

    def _message(self, message: Any, field: str) -> dict[str, Any]:
        """A message without the nulls that a table fills in."""
        if not isinstance(message, dict):
            raise self.error(field, f"holds {_named(message)}, not a message")
        given = {key: value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            if key == "content" and given.get("tool_calls"):
                continue
            if key not in given:
                raise self.error(f"{field}.{key}", "is null" if key in message else "is missing")
            self._checked(given[key], f"{field}.{key}")
        return given

    def _value(self, field: str) -> Any:
        """A field that has to be there."""
        if field not in self.values:
            raise self.error(field, "is missing")
        if self.values[field] is None:
            raise self.error(field, "is null")
        return self.values[field]

    def _checked(self, value: Any, field: str) -> str:
        """A value that is text, and that can be written as UTF-8."""
        if not isinstance(value, str):
            raise self.error(field, f"holds {_named(value)}, not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, f"holds half a surrogate pair, which is no text: {_short(ascii(value))}") from None
        return value

    def error(self, field: str, problem: str, *, remedy: str = "Correct the row, or leave it out.") -> ConfigError:
        """What to raise about a field of this row."""
        return ConfigError(f"{self.place()}: field {field!r} {problem}. {remedy}")


@dataclass(frozen=True)
class Rows:
    """All rows of a source."""

    source: Source
    table: Dataset
    """One column with the JSON text of each row, or the columns of the source."""
    fields: tuple[str, ...]
    """Fields of the first row."""
    cache_dir: Path

    @property
    def name(self) -> str:
        """The source, for people."""
        return self.source.name if self.source.files else f"{self.source.name} (split {self.source.split})"

    @property
    def key(self) -> tuple[object, ...]:
        """What tells these rows from others, without reading them."""
        # the folders of a prepared hub dataset name its revision
        prepared = [] if self.source.files else [Path(file["filename"]).parts[-4:] for file in self.table.cache_files]
        return (*self.source.stamp, *prepared)

    def columns(self, fields: Callable[[list[str]], list[str]]) -> list[str]:
        """The columns of `table` that a batch needs, given what picks the wanted fields."""
        return ["row"] if _is_parsed(self.source) else fields(self.table.column_names)

    def batch(self, columns: dict[str, list[Any]], numbers: list[int]) -> list[Row]:
        """Rows of a batch of `table`.

        Args:
            columns: The batch, as `datasets` gives it.
            numbers: Which row of the source each is, counted from 0.
        """
        if _is_parsed(self.source):
            values = [json.loads(text) for text in columns["row"]]
        else:
            values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [self._row(*item) for item in zip(values, numbers, strict=True)]

    def _row(self, values: dict[str, Any], number: int) -> Row:
        return Row(values, place=lambda: self.place(number))

    def place(self, number: int) -> str:
        """Where a row lies: its file, its number in it from 0, and its line if a line is a row."""
        if not self.source.files:
            return f"{self.name} row {number}"
        file, *others = self.source.files
        while others and number >= (length := self._length(file)):
            number -= length
            file = others.pop(0)
        line = _line_of(file, number)
        return f"{file} row {number}" + (f" (line {line})" if line else "")

    def _length(self, file: Path) -> int:
        """How many rows one of several files has; it is read again, which only an error waits for."""
        if _is_parsed(self.source):
            return sum(1 for _ in parse_rows([str(file)]))
        if kind_of(file) == "text":
            return 1
        return len(open_rows(Source(name=str(file), files=(file,)), cache_dir=self.cache_dir)[0])


def read_rows(source: Source, *, cache_dir: Path) -> Rows:
    """Open a source of examples.

    Raises:
        ConfigError: If it cannot be read, is empty, or does not hold rows of named fields.
    """
    if not _is_parsed(source):
        table, first = open_rows(source, cache_dir=cache_dir)
        return Rows(source, table, tuple(first), cache_dir)
    try:
        table = Dataset.from_generator(
            parse_rows,
            features=Features({"row": Value("string")}),
            gen_kwargs={"paths": [str(file) for file in source.files]},
            cache_dir=str(cache_dir / "datasets"),
            fingerprint=fingerprint("rows", source.stamp),
        )
    except DatasetsError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise
    return Rows(source, table, tuple(json.loads(table[0]["row"])), cache_dir)


def _is_parsed(source: Source) -> bool:
    """Whether the files of a source are read here, not by `datasets`."""
    return bool(source.files) and kind_of(source.files[0]) in _PARSED


def parse_rows(paths: list[str]) -> Iterator[dict[str, str]]:
    """Yield the JSON text of every row of JSON or CSV files as ``{"row": text}``.

    Raises:
        ConfigError: If a file cannot be read, or holds something else; or if there is no row at all.
    """
    empty = True
    for path in paths:
        parse = _parse_csv if kind_of(Path(path)) == "csv" else _parse_json
        try:
            with _open(path) as file:
                for text in parse(file, path):
                    empty = False
                    yield {"row": text}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason}. Convert it.") from error
        except ConfigError:
            raise
        except (OSError, EOFError, csv.Error, zlib.error, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Check that it is what it is called.") from error
    if empty:
        raise ConfigError(f"{paths[0] if len(paths) == 1 else Path(paths[0]).parent} is empty. Name files of examples.")


def _open(path: str) -> TextIO:
    """A file as text, unpacked, without a byte-order mark, its line ends as they are."""
    opener: Callable[..., TextIO] = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _parse_json(file: TextIO, path: str) -> Iterator[str]:
    """The objects of an array, or one from each line."""
    first = next((line for line in file if not line.isspace()), "")
    file.seek(0)
    if first.lstrip().startswith("["):
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON at line {error.lineno}: {error.msg}. Correct it.") from error
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ConfigError(f"{path} row {number} is {_named(row)}, not an object with fields. Correct it.")
            yield json.dumps(row)
        return
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} line {number} is not JSON: {error.msg}. A file holds an array of objects, or one on each line."
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path} line {number} is {_named(row)}, not an object with fields. Correct it.")
        yield line


def _parse_csv(file: TextIO, path: str) -> Iterator[str]:
    """The records below a header; every cell is text, also NA and 007."""
    reader = csv.reader(file, strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise ConfigError(f"{path} names a field twice in its header: {', '.join(header)}. Rename one.")
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise ConfigError(
                f"{path} line {reader.line_num} has {len(cells)} cells under a header of {len(header)} "
                f"({_short(', '.join(header))}). Put quotes around cells with commas."
            )
        yield json.dumps(dict(zip(header, cells, strict=True)))


def _line_of(path: Path, number: int) -> int | None:
    """The line, from 1, of a row of a file that has one on each line."""
    if kind_of(path) != "json":
        return None
    with _open(str(path)) as file:
        filled = [line for line, text in enumerate(file, start=1) if not text.isspace()]
        file.seek(0)
        is_array = file.read(1000).lstrip().startswith("[")
    return None if is_array else filled[number]


def _named(value: Any) -> str:
    """The kind of a value that should have been text, and the value, shortened."""
    return f"{type(value).__name__} ({_short(ascii(value))})"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
