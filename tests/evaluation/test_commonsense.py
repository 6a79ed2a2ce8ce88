"""LLM-Adapters' rows: every one parses to the fields of the hub, or is refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import ConfigError
from fullrank.evaluation.commonsense import find, parse, read
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.tasks import COMMONSENSE
from tests.evaluation.made import FOLDERS, HUB, LOCAL, local_row, write_commonsense
from tests.shared_data import SHARED

ADAPTERS = SHARED / "commonsense" / "llm-adapters"
SIZES = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}


def parsed(task: str, **changes: str) -> dict[str, Any]:
    [doc] = parse([{**local_row(task), **changes}], task, source=Path("test.json"))
    return doc


@pytest.mark.parametrize("task", [task for task in COMMONSENSE if task != "social_i_qa"])
def test_a_row_becomes_the_hubs(task: str) -> None:
    doc = parsed(task)
    assert doc == {key: HUB[task][key] for key in doc}


def test_social_i_qa_joins_to_the_hubs_prompt() -> None:
    doc, hub = parsed("social_i_qa"), HUB["social_i_qa"]
    assert f"{doc['context']} {doc['question']}" == f"{hub['context']} {hub['question']}"
    assert [doc[f"answer{letter}"] for letter in "ABC"] == ["sad", "glad", "tall"]
    assert doc["label"] == "1"


@pytest.mark.parametrize("count", [3, 5])
def test_arc_has_three_to_five_options(count: int) -> None:
    options = " ".join(f"Answer{n}: option {n}" for n in range(1, count + 1))
    names = "/".join(f"answer{n}" for n in range(1, count + 1))
    text = f"Please choose the correct answer to the question: Why?\n\n{options}\n\nAnswer format: {names}"
    doc = parsed("arc_easy", instruction=text, answer="answer3")
    assert doc["choices"]["text"] == [f"option {n}" for n in range(1, count + 1)]
    assert doc["choices"]["label"][2] == doc["answerKey"] == "C"


@pytest.mark.parametrize(
    ("context", "first", "second"),
    [
        ("A man sits. He waits. then the man", "A man sits. He waits.", "then the man"),
        ('He says "stop!" the dog', 'He says "stop!"', "the dog"),
        ("A man sits. He waits.", "A man sits. He waits.", ""),
        ("A man sits on", "A man sits on", ""),
        ("[header] How to sit [step] Sit. then wait", "[header] How to sit [step] Sit. then wait", ""),
    ],
)
def test_a_hellaswag_context_is_parted(context: str, first: str, second: str) -> None:
    doc = parsed("hellaswag", instruction=LOCAL["hellaswag"][0].replace("A man sits on a roof. he", context))
    assert (doc["activity_label"], doc["ctx_a"], doc["ctx_b"]) == ("Roof repair", first, second)


@pytest.mark.parametrize(
    ("task", "old", "new"),
    [
        ("boolq", "Answer format: true/false", "Answer: true/false"),
        ("boolq", "question: ", "the question is "),
        ("piqa", "Solution2: ", "Solution 2: "),
        ("social_i_qa", " Answer3: tall", ""),
        ("hellaswag", "Roof repair: ", ""),
        ("hellaswag", "Ending4", "Ending5"),
        ("winogrande", "_", "it"),
        ("winogrande", "Option1: the cup ", ""),
        ("arc_easy", "Which is hot?\n\n", ""),
        ("openbookqa", "answer1/answer2/answer3/answer4", "answer1/answer2/answer3"),
    ],
)
def test_another_layout_is_refused(task: str, old: str, new: str) -> None:
    assert old in LOCAL[task][0]
    bad = {**local_row(task), "instruction": LOCAL[task][0].replace(old, new)}
    with pytest.raises(ConfigError, match=r"some/test.json, row 2: .*Expected 'Please .*, got 'Please"):
        parse([local_row(task), bad], task, source=Path("some/test.json"))


def test_an_answer_beyond_the_options_is_refused() -> None:
    with pytest.raises(ConfigError, match="row 1"):
        parsed("arc_easy", answer="answer5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be a JSON list of rows"),
        ("{", "cannot be read as JSON"),
        ('[{"instruction": "x"}]', "row 1: expected text in instruction and answer"),
        (
            json.dumps([local_row("piqa"), {**local_row("piqa"), "answer": "answer1"}]),
            "row 2: answer 'answer1' is none",
        ),
    ],
)
def test_a_file_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(path, "piqa")


def test_files_are_found_by_group_and_by_task(tmp_path: Path) -> None:
    folder = write_commonsense(tmp_path / "dataset")
    single = tmp_path / "one.json"
    single.write_text(json.dumps([local_row("arc_easy")]))

    def found(**data: Path) -> Path | None:
        return find(EvaluateConfig(data={key: str(value) for key, value in data.items()}), "arc_easy")

    expected = folder / "ARC-Easy" / "test.json"
    assert found() is None
    assert found(commonsense=folder) == found(arc_easy=folder) == found(arc_easy=folder / "ARC-Easy") == expected
    assert found(commonsense=folder, arc_easy=single) == single
    with pytest.raises(ConfigError, match=r"data.commonsense .* has no ARC-Easy/test.json"):
        found(commonsense=tmp_path)


@pytest.mark.shared_data
@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="needs LLM-Adapters' files")
@pytest.mark.parametrize("task", SIZES)
def test_every_real_row_parses(task: str) -> None:
    for split in ("test", "train"):
        path = ADAPTERS / FOLDERS[task] / f"{split}.json"
        if path.is_file():
            rows = read(path, task)
            assert len(parse(rows, task, source=path)) == len(rows)
            assert split == "train" or len(rows) == SIZES[task]


@pytest.mark.shared_data
@pytest.mark.skipif(not ADAPTERS.is_dir(), reason="needs LLM-Adapters' files and the original ones")
def test_real_rows_are_the_originals() -> None:
    """WinoGrande and Social IQa, whose original development sets are at hand."""
    path = ADAPTERS / "winogrande" / "test.json"
    docs = parse(read(path, "winogrande"), "winogrande", source=path)
    lines = (SHARED / "commonsense" / "winogrande_1.1" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    assert docs == [{key: row[key] for key in docs[0]} for row in map(json.loads, lines)]

    path = ADAPTERS / "social_i_qa" / "test.json"
    docs = parse(read(path, "social_i_qa"), "social_i_qa", source=path)
    [archive] = (SHARED / "commonsense" / "socialiqa").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        rows = opened.read(next(n for n in names if n.endswith("dev.jsonl"))).decode().splitlines()
        labels = opened.read(next(n for n in names if n.endswith("dev-labels.lst"))).decode().split()
    for doc, row, label in zip(docs, map(json.loads, rows), labels, strict=True):
        assert f"{doc['context']} {doc['question']}" == f"{row['context']} {row['question']}"
        assert [doc[f"answer{letter}"] for letter in "ABC"] == [row[f"answer{letter}"] for letter in "ABC"]
        assert doc["label"] == label
