"""LLM-Adapters' files of the eight commonsense tasks: rows {instruction, input, output, answer}.

The question and its options stand in the text of the instruction. For ranking they are taken out of it into the fields
that lm-evaluation-harness reads, so that its own prompts, scores and metrics apply. Every row must parse: a row in
another layout is an error, never left out.

What the files do not hold: BoolQ's passages, so that its questions are asked without them, and the border between
the two parts of a HellaSwag context, of which the harness capitalizes the second: here it is the fragment in lower
case that follows the last full sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig

FOLDERS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
"""LLM-Adapters' folder of a task, where it is not the task's own name."""

_FIELDS = ("instruction", "answer")
_EXCERPT = 160  # characters of a row in an error
_CHOICE = "Please choose the correct answer to the question: "
_CONTEXT = re.compile(r"(.*[.!?][\"')]*) ([a-z][^.!?]*)", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """How a task's instruction is written."""

    opening: str
    option: str
    """The word before an option's number."""
    counts: tuple[int, ...]
    """How many options a row may have."""
    between: str = " "
    """What stands before an option other than the first."""
    before_format: str = "\n\n"
    """What stands before the answer format."""

    def names(self, count: int) -> list[str]:
        """The answers that a row with so many options may have."""
        return [f"{self.option.lower()}{number}" for number in range(1, count + 1)]

    def template(self, count: int) -> str:
        """The instruction with words for its question and options."""
        options = self.between.join(f"{self.option}{number}: OPTION{number}" for number in range(1, count + 1))
        return f"{self.opening}QUESTION\n\n{options}{self.before_format}Answer format: {'/'.join(self.names(count))}"

    def split(self, instruction: str) -> tuple[str, list[str]] | None:
        """Question and options of an instruction; None if it is written otherwise."""
        for count in self.counts:
            escaped = re.escape(self.template(count)).replace("QUESTION", "(.+)")
            for number in range(1, count + 1):
                escaped = escaped.replace(f"OPTION{number}", "(.*)")
            if found := re.fullmatch(escaped, instruction, re.DOTALL):
                question, *options = found.groups()
                return question, options
        return None


BOOLQ_OPENING = "Please answer the following question with true or false, question: "
_BOOLQ = re.compile(re.escape(BOOLQ_OPENING) + r"(.+)\n\nAnswer format: true/false", re.DOTALL)

LAYOUTS = {
    "piqa": Layout("Please choose the correct solution to the question: ", "Solution", (2,), between="\n\n"),
    "social_i_qa": Layout(_CHOICE, "Answer", (3,)),
    "hellaswag": Layout("Please choose the correct ending to complete the given sentence: ", "Ending", (4,)),
    "winogrande": Layout(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "Option",
        (2,),
        before_format=" ",
    ),
    "arc_easy": Layout(_CHOICE, "Answer", (4, 3, 5)),
    "arc_challenge": Layout(_CHOICE, "Answer", (4, 3, 5)),
    "openbookqa": Layout(_CHOICE, "Answer", (4,)),
}
"""Task -> layout of its instructions; BoolQ has no options."""


def find(config: EvaluateConfig, task: str) -> Path | None:
    """The file of a task's test rows; None if the configuration names none.

    Raises:
        ConfigError: If it names something that is not there.
    """
    given = config.data.get(task) or config.data.get("commonsense")
    if given is None:
        return None
    key = task if task in config.data else "commonsense"
    path = Path(given).expanduser()
    if path.is_file() and key == task:
        return path
    folder = FOLDERS.get(task, task)
    candidates = [path / folder / "test.json", path / "test.json"] if key == task else [path / folder / "test.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"data.{key} {given} has no {candidates[0].relative_to(path)} in LLM-Adapters' layout. Name a folder that has "
        f"it, or the file itself by data.{task}."
    )


def read(path: Path, task: str) -> list[dict[str, Any]]:
    """Rows of a file, each with a text as its instruction and a possible answer.

    Raises:
        ConfigError: If it is no JSON list of such rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path} must be a JSON list of rows with instruction and answer. Copy it again.")
    possible = set(answers(task))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in _FIELDS):
            raise ConfigError(f"{path}, row {number}: expected text in {' and '.join(_FIELDS)}, got {_excerpt(row)}.")
        if row["answer"] not in possible:
            raise ConfigError(
                f"{path}, row {number}: answer {row['answer']!r} is none of {task}'s: {', '.join(answers(task))}."
            )
    return rows


def answers(task: str) -> list[str]:
    """All answers that a task knows."""
    return ["true", "false"] if task == "boolq" else LAYOUTS[task].names(max(LAYOUTS[task].counts))


def parse(rows: list[dict[str, Any]], task: str, *, source: Path) -> list[dict[str, Any]]:
    """Rows in the fields that lm-evaluation-harness's task reads.

    Raises:
        ConfigError: If a row is written in another layout; the message says which and what was expected.
    """
    docs = []
    for number, row in enumerate(rows, start=1):
        doc = _boolq(row) if task == "boolq" else _choices(row, task)
        if doc is None:
            expected = (
                f"{BOOLQ_OPENING}QUESTION\n\nAnswer format: true/false"
                if task == "boolq"
                else LAYOUTS[task].template(LAYOUTS[task].counts[0])
            )
            raise ConfigError(
                f"{source}, row {number}: {task}'s instruction is not in LLM-Adapters' layout. Expected "
                f"{expected!r}, got {_excerpt(row['instruction'])}."
            )
        docs.append(doc)
    return docs


def _boolq(row: dict[str, Any]) -> dict[str, Any] | None:
    found = _BOOLQ.fullmatch(row["instruction"])
    # the harness puts a question mark behind the question, which has none on the hub
    return None if found is None else {"question": found[1].removesuffix("?"), "label": int(row["answer"] == "true")}


def _choices(row: dict[str, Any], task: str) -> dict[str, Any] | None:
    layout = LAYOUTS[task]
    found = layout.split(row["instruction"])
    if found is None or row["answer"] not in layout.names(len(found[1])):
        return None
    question, options = found
    return DOCS[task](question, options, layout.names(len(options)).index(row["answer"]))


def _piqa(question: str, options: list[str], answer: int) -> dict[str, Any]:
    return {"goal": question, "sol1": options[0], "sol2": options[1], "label": answer}


def _social_i_qa(question: str, options: list[str], answer: int) -> dict[str, Any]:
    # context and question are one text in the file and one text in the harness's prompt: any space may part them
    context, _, rest = question.rpartition(" ")
    lettered = {f"answer{letter}": option for letter, option in zip("ABC", options, strict=True)}
    return {"context": context, "question": rest, **lettered, "label": str(answer + 1)}


def _hellaswag(question: str, options: list[str], answer: int) -> dict[str, Any] | None:
    activity, colon, context = question.partition(": ")
    if not colon:
        return None
    # the brackets are WikiHow's, whose contexts have one part
    parts = None if "[" in context else _CONTEXT.fullmatch(context)
    first, second = (parts[1], parts[2]) if parts else (context, "")
    return {"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": options, "label": str(answer)}


def _winogrande(question: str, options: list[str], answer: int) -> dict[str, Any] | None:
    if "_" not in question:
        return None
    return {"sentence": question, "option1": options[0], "option2": options[1], "answer": str(answer + 1)}


def _lettered(field: str) -> Callable[[str, list[str], int], dict[str, Any]]:
    def make(question: str, options: list[str], answer: int) -> dict[str, Any]:
        letters = list("ABCDE"[: len(options)])
        return {field: question, "choices": {"text": options, "label": letters}, "answerKey": letters[answer]}

    return make


DOCS: dict[str, Callable[[str, list[str], int], dict[str, Any] | None]] = {
    "piqa": _piqa,
    "social_i_qa": _social_i_qa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _lettered("question"),
    "arc_challenge": _lettered("question"),
    "openbookqa": _lettered("question_stem"),
}
"""Task -> maker of the harness's fields from question, options and the number of the right one (from 0)."""


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."
