"""MMLU from its csv files, as Hendrycks gives them: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv.

A row is the question, its four options and the letter of the right one, without a header. The files lie in a folder or
in a zip, which is read in place. Prompts and scores are those of lm-evaluation-harness: the subject's description, the
solved examples of dev, the four letters ranked.

SIFT's own script (exp/mmlu/eval_mmlu.py, Hendrycks's with a causal model) puts the same words with these differences:
two spaces before the subject's name; 5 solved examples by default, fewer of them if the prompt is longer than 2048
tokens (the harness cuts it from the left); questions are not stripped of spaces at their ends; it compares the logits
of the last token of "A", "B", "C" and "D", each encoded alone, the harness those of " A" to " D" after the prompt;
and pandas reads an option such as "NA" as a missing value.
"""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.errors import ConfigError

LETTERS = "ABCD"
MAX_FEWSHOT = 5
"""Solved examples that dev has of each subject."""


@dataclass(frozen=True)
class CsvFiles:
    """The csv files of a folder or zip, by the last two parts of their names: ``test/anatomy_test.csv``."""

    source: Path
    members: dict[str, str]
    """``SPLIT/FILE`` -> path in the folder or zip."""

    def read(self, subject: str, split: str) -> list[dict[str, Any]]:
        """Rows of a subject in the fields that lm-evaluation-harness's task reads.

        Raises:
            ConfigError: If there is no such file, or a row is not a question, four options and a letter.
        """
        name = f"{split}/{subject}_{split}.csv"
        if name not in self.members:
            raise ConfigError(
                f"data.mmlu {self.source} has no {name}. Name a folder or zip with MMLU's csv files in dev/ and test/."
            )
        try:
            rows = list(csv.reader(io.StringIO(self._text(self.members[name]), newline="")))
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
            raise ConfigError(f"{self.source}, {name} cannot be read: {error}. Copy it again.") from error
        for number, row in enumerate(rows, start=1):
            if len(row) != len(LETTERS) + 2 or row[-1] not in tuple(LETTERS):
                raise ConfigError(
                    f"{self.source}, {name}, row {number}: expected a question, four options and a letter of "
                    f"{LETTERS}, got {row!r:.160}."
                )
        if not rows:
            raise ConfigError(f"{self.source}, {name} is empty. Copy it again.")
        return [{"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])} for row in rows]

    def _text(self, member: str) -> str:
        if self.source.is_dir():
            return (self.source / member).read_text(encoding="utf-8")
        with zipfile.ZipFile(self.source) as archive:
            return archive.read(member).decode("utf-8")


def open_csv(name: str) -> CsvFiles:
    """Find MMLU's files in a folder or zip.

    Raises:
        ConfigError: If it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file.relative_to(path).as_posix() for file in path.rglob("*.csv")]
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = [member for member in archive.namelist() if member.endswith(".csv")]
    else:
        raise ConfigError(f"data.mmlu {name} is neither a folder nor a zip file. Name MMLU's csv files as either.")
    return CsvFiles(path, {"/".join(member.split("/")[-2:]): member for member in found if "__MACOSX" not in member})
