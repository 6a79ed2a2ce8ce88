"""What GLUE's examples are refused for: the message has the place, the field, the value, and what to do."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import ConfigError
from fullrank.train.config import GlueConfig
from fullrank.train.data.glue import load_glue
from tests.train.data.glue_files import (
    FOLDERS,
    HEADERS,
    HUB_LABELS,
    make_content,
    official_line,
    word_tokenizer,
    write_dataset,
    write_official,
)


def load(task: str, name: Path | str, cache_dir: Path, **changes: Any) -> Any:
    config = replace(GlueConfig(task=task, name=str(name), sequence_length=32), **changes)  # type: ignore[arg-type]
    return load_glue(config, word_tokenizer(), cache_dir=cache_dir)


def with_line(task: str, folder: Path, line: str) -> Path:
    """A benchmark folder whose task has two good training examples, and then this line."""
    root = write_official(folder, task, make_content(task, num_train=2))
    with (root / FOLDERS[task] / "train.tsv").open("a", encoding="utf-8") as file:
        file.write(line)
    return root


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("sst2", "red cat\n", r"line 4: 1 cells between tabs, SST-2 has 2 \(sentence, label\)"),
        ("sst2", "red\tcat\t1\n", r"line 4: 3 cells between tabs, SST-2 has 2"),
        ("sst2", "red cat\t2\n", r"line 4: label is '2', expected one of 0, 1"),
        ("sst2", "red cat\t-1\n", r"line 4: label is '-1', expected one of 0, 1"),
        ("sst2", " \t1\n", r"line 4: no text in sentence"),
        # CoLA has no header: its third line is its third example
        ("cola", "gj04\t1\t\n", r"line 3: 3 cells between tabs, CoLA has 4"),
        ("cola", "gj04\tyes\t\tred\n", r"line 3: is_acceptable is 'yes', expected one of 0, 1"),
        ("rte", "7\tred\tcat\tneutral\n", r"line 4: label is 'neutral', expected one of entailment, not_entailment"),
        ("rte", "7\t\t \tentailment\n", r"line 4: no text in sentence1 or sentence2"),
        ("qqp", "7\t1\t2\tred\tcat\t0\tdog\n", r"line 4: 7 cells between tabs, QQP has 6"),
        (
            "mnli",
            "\t".join(["7"] * 10 + ["-", "-"]) + "\n",
            r"line 4: gold_label is '-', expected one of entailment, n",
        ),
    ],
)
def test_a_line_that_is_not_the_task_s(task: str, line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.tsv, {message}"):
        load(task, with_line(task, tmp_path / "glue", line), tmp_path)


@pytest.mark.parametrize("score", ["5.001", "-0.1", "-1", "nan", "inf", "high", ""])
def test_a_score_out_of_bounds(score: str, tmp_path: Path) -> None:
    line = "\t".join(["7", *["none"] * 6, "red", "cat", score]) + "\n"
    with pytest.raises(ConfigError, match=rf"line 4: score is '{score}', expected a number from 0 to 5"):
        load("stsb", with_line("stsb", tmp_path / "glue", line), tmp_path)


@pytest.mark.parametrize("score", ["0", "5", " 2.5 "])
def test_a_score_at_the_bounds(score: str, tmp_path: Path) -> None:
    line = "\t".join(["7", *["none"] * 6, "red", "cat", score]) + "\n"
    data = load("stsb", with_line("stsb", tmp_path / "glue", line), tmp_path)
    assert data.train[2]["labels"] == float(score)


def test_one_text_of_a_pair_may_be_empty(tmp_path: Path) -> None:
    """As in QQP, where some questions are."""
    data = load("qqp", with_line("qqp", tmp_path / "glue", "7\t1\t2\tred\t\t0\n"), tmp_path)
    assert data.train[2]["labels"] == 0


def test_broken_lines_of_qqp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line feed inside a question broke some lines in two; the hub's dataset leaves both halves out."""
    good = official_line("qqp", 9, (("red", "cat"), 1))
    root = with_line("qqp", tmp_path / "glue", f"7\t1\t2\tIs it red?\n\tIs it a cat?\t0\n{good}\n")
    with caplog.at_level(logging.WARNING, logger="fullrank"):
        data = load("qqp", root, tmp_path)
    assert len(data.train) == 3
    assert [record.getMessage().partition("train.tsv")[2] for record in caplog.records] == [
        ": left out 2 broken lines, as the hub's dataset does"
    ]


@pytest.mark.parametrize(
    ("task", "header", "message"),
    [
        ("sst2", "index\tsentence", r"line 1: the header \(index, sentence\) lacks label"),  # a test set
        ("mrpc", HEADERS["rte"], r"line 1: the header \(.*\) lacks #1 String, #2 String, Quality.*of MRPC"),
        ("cola", HEADERS["rte"], r"line 1: is_acceptable is 'sentence1', expected one of 0, 1"),
        ("qnli", HEADERS["rte"], r"line 1: .*lacks question, sentence.*data\.task"),
    ],
)
def test_a_file_of_another_task(task: str, header: str, message: str, tmp_path: Path) -> None:
    root = write_official(tmp_path / "glue", task, make_content(task))
    (root / FOLDERS[task] / "train.tsv").write_text(f"{header}\n")
    with pytest.raises(ConfigError, match=rf"train\.tsv, {message}"):
        load(task, root, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has no examples"), (b"sentence\tlabel\n", "has no examples"), (b"sentence\tlabel\ncaf\xe9\t1\n", "UTF-8")],
)
def test_a_file_without_examples(content: bytes, message: str, tmp_path: Path) -> None:
    root = write_official(tmp_path / "glue", "sst2", make_content("sst2"))
    (root / "SST-2" / "train.tsv").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"train\.tsv.*{message}"):
        load("sst2", root, tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    content = make_content("mnli")
    root = write_official(tmp_path / "glue", "mnli", content)
    for name in (tmp_path / "none", "./none", "none.tsv", ""):
        with pytest.raises(ConfigError, match=r"data\.name '.*' is not a file or folder.*nyu-mll/glue"):
            load("mnli", name, tmp_path)
    table = tmp_path / "rows.jsonl"
    table.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl must be a folder or a \.tsv file"):
        load("mnli", table, tmp_path)
    for validation in ("none.tsv", "validation_matched"):  # beside files, a validation set is a file
        with pytest.raises(ConfigError, match=rf"data\.validation {validation} is not a file"):
            load("mnli", root, tmp_path, validation=validation)
    (root / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(ConfigError, match=r"has no dev_mismatched\.tsv\. Put it there, or set data\.validation"):
        load("mnli", root, tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"empty \(mnli, validation_matched\) has no MNLI/train\.tsv, and `datasets`"):
        load("mnli", empty, tmp_path)


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nyu-mll/glue \(cola, validation\) has no CoLA/train\.tsv.*data\.name"):
        load("cola", "nyu-mll/glue", tmp_path)


def test_hidden_labels_of_a_test_split(tmp_path: Path) -> None:
    for task in ("rte", "stsb"):
        content = make_content(task)
        content["test"] = [(texts, -1) for texts, _ in content["validation"]]
        root = write_dataset(tmp_path / task, task, content)
        with pytest.raises(ConfigError, match=rf"\({task}, test\), example 0: label is -1, hidden as in GLUE's test"):
            load(task, root, tmp_path, validation="test")


def test_labels_in_another_order(tmp_path: Path) -> None:
    """The numbers would mean something else."""
    names = tuple(reversed(HUB_LABELS["mnli"]))
    root = write_dataset(tmp_path / "dataset", "mnli", make_content("mnli"), label_names=names)
    with pytest.raises(
        ConfigError, match=r"labels are contradiction, neutral, entailment, those of MNLI entailment, n"
    ):
        load("mnli", root, tmp_path)


def test_a_dataset_of_another_task(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "dataset", "qnli", make_content("qnli"))
    with pytest.raises(ConfigError, match=r"has the fields question, sentence, label and lacks sentence1, sentence2"):
        load("rte", root, tmp_path, subset="qnli")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((("red", None), 1), r"example 12: sentence2 is None, expected text"),
        ((("red", "cat"), None), r"example 12: label is None, expected one of 0, 1"),
        (((" ", ""), 1), r"example 12: no text in sentence1 or sentence2"),
    ],
)
def test_a_row_that_is_not_the_task_s(row: Any, message: str, tmp_path: Path) -> None:
    content = make_content("rte")
    content["train"].append(row)
    root = write_dataset(tmp_path / "dataset", "rte", content)
    with pytest.raises(ConfigError, match=message):
        load("rte", root, tmp_path)


def test_lengths_that_cannot_work(tmp_path: Path) -> None:
    root = write_official(tmp_path / "glue", "rte", make_content("rte"))
    with pytest.raises(ConfigError, match=r"data\.sequence_length must be at least 5 .*, got 4"):
        load("rte", root, tmp_path, sequence_length=4)
    assert all(len(row["input_ids"]) == 5 for row in load("rte", root, tmp_path, sequence_length=5).train)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 16
    config = GlueConfig(task="rte", name=str(root), sequence_length=17)
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 17, the tokenizer's model takes at most 16"):
        load_glue(config, tokenizer, cache_dir=tmp_path)


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    root = write_official(tmp_path / "glue", "rte", make_content("rte"))
    config = GlueConfig(task="rte", name=str(root), sequence_length=16)
    with pytest.raises(ConfigError, match="the tokenizer has no padding token"):
        load_glue(config, word_tokenizer(pad_token=None), cache_dir=tmp_path)
