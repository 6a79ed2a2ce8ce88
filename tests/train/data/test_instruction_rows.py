"""Rows of instruction data: formats told by their fields, and bad rows refused by file, row and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fullrank.errors import ConfigError
from fullrank.train.data.instructions import load_instructions
from fullrank.train.data.prepared import Data
from tests.train.data.instructing import MARKED, config_for, learned, make_rows, make_tokenizer, write_rows

GOOD = {"instruction": "a", "input": "b", "output": "c"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def load(path: Path, **changes: Any) -> Data:
    cache = path.with_name(f"{path.name}-cache")
    return load_instructions(config_for(path, **changes), make_tokenizer(chat=MARKED), cache_dir=cache)


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "parts"),
        [
            ({**GOOD, "answer": 1, "id": None}, ["c</s>"]),
            ({"instruction": "a", "output": "c"}, ["c</s>"]),
            ({"instruction": "a", "input": None, "output": "c"}, ["c</s>"]),
            ({"prompt": "a", "completion": "c"}, ["c</s>"]),
            ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ["b<|end|>\n"]),
            ({"messages": TURNS}, ["b<|end|>"]),
            ({"text": "the c"}, ["the c</s>"]),
        ],
    )
    def test_the_first_row_tells(self, row: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
        for kind in ("jsonl", "parquet"):
            data = load(write_rows(tmp_path / f"rows.{kind}", [row, row]))
            assert [learned(example, make_tokenizer()) for example in data.train] == [parts, parts]

    def test_rows_of_both_kinds_of_prompt_may_follow_one_another(self, tmp_path: Path) -> None:
        rows = [{"prompt": "a", "completion": "c"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}] * 2
        data = load(write_rows(tmp_path / "rows.jsonl", rows))
        assert [learned(row, make_tokenizer()) for row in data.train] == [["c</s>"], ["b<|end|>\n"]] * 2

    def test_a_format_can_be_chosen_where_several_fit(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.json", [{**GOOD, "text": "the text"}])
        with pytest.raises(ConfigError, match=r"instruction, input, output, text, which fit several.*data\.format"):
            load(path)
        assert learned(load(path, format="instruction").train[0], make_tokenizer()) == ["c</s>"]
        assert learned(load(path, format="text").train[0], make_tokenizer()) == ["the text</s>"]

    @pytest.mark.parametrize("format_", ["auto", "messages"])
    def test_unknown_fields_are_refused_with_what_is_wanted(self, format_: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.json", [{"question": "a", "output": "c"}])
        with pytest.raises(ConfigError) as error:
            load(path, format=format_)
        for part in (
            "has the fields question, output",
            "instruction wants instruction and output",
            "prompt_completion wants prompt and completion",
            "text wants text",
            "messages",
        ):
            assert part in str(error.value)

    def test_a_prompt_template_without_effect_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        load(write_rows(tmp_path / "rows.json", [{"text": "the text"}]), prompt_template="plain")
        assert "prompt_template has no effect on the format text" in caplog.text


BAD = [
    ({"instruction": "a", "input": ""}, "field 'output' is missing"),
    ({**GOOD, "output": None}, "field 'output' is null"),
    ({**GOOD, "output": 5}, r"field 'output' holds int \(5\), not text"),
    ({**GOOD, "output": ["x" * 999]}, r"field 'output' holds list \(\['x{58}\.\.\.\), not text"),
    ({**GOOD, "input": 0}, r"field 'input' holds int \(0\), not text"),
    ({**GOOD, "instruction": {}}, r"field 'instruction' holds dict \(\{\}\), not text"),
    ({**GOOD, "output": "\ud83d"}, "field 'output' holds half a surrogate pair"),
]
BAD_MESSAGES = [
    ("oops", r"field 'messages' holds str \('oops'\), not a list of messages"),
    ([], "field 'messages' holds no message"),
    ([*TURNS, "oops"], r"field 'messages\[2\]' holds str \('oops'\), not a message"),
    ([{"content": "a"}], r"field 'messages\[0\].role' is missing"),
    ([{"role": "user", "content": None}], r"field 'messages\[0\].content' is null"),
    ([{"role": "user", "content": [1]}], r"field 'messages\[0\].content' holds list \(\[1\]\), not text"),
    (TURNS[:1], "field 'messages' holds no turn of the role assistant"),
]


class TestBadRows:
    @pytest.mark.parametrize(("row", "problem"), BAD)
    @pytest.mark.parametrize("kind", ["json", "jsonl.gz"])
    def test_a_bad_row_is_named(self, row: dict[str, Any], problem: str, kind: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / f"rows.{kind}", [*[GOOD] * 1003, row])
        line = "" if kind == "json" else r" \(line 1004\)"
        with pytest.raises(ConfigError, match=rf"rows\.{kind} row 1003{line}: {problem}.*Correct the row"):
            load(path)

    @pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES)
    def test_bad_messages_are_named(self, messages: Any, problem: str, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS}, {"messages": messages}])
        with pytest.raises(ConfigError, match=rf"rows\.jsonl row 1 \(line 2\): {problem}"):
            load(path)

    @pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
    def test_among_several_files_the_right_one_is_named(self, kind: str, tmp_path: Path) -> None:
        for name, number in (("a", 3), ("b", 4), ("c", 5)):
            write_rows(tmp_path / f"{name}.{kind}", make_rows(number))
        rows = make_rows(4)
        rows[2] |= {"output": None if kind != "csv" else ""}
        write_rows(tmp_path / f"b.{kind}", rows)
        if kind == "csv":  # has no null, only an empty answer
            assert "11 examples" in load(tmp_path).description
            return
        with pytest.raises(ConfigError, match=rf"b\.{kind} row 2.*'output' is null"):
            load(tmp_path)
        with pytest.raises(ConfigError, match=rf"b\.{kind} row 2"):  # also when rows are drawn
            load(tmp_path, max_examples=11, seed=3)

    def test_the_line_counts_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(f"\n{json.dumps(GOOD)}\n\n" + json.dumps({"instruction": "a"}))
        with pytest.raises(ConfigError, match=r"row 1 \(line 4\): field 'output' is missing"):
            load(path)

    def test_a_bad_value_of_a_table(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"row 0: field 'output' holds int \(7\), not text"):
            load(write_rows(tmp_path / "rows.parquet", [{**GOOD, "output": 7}]))


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "text", "problem"),
        [
            ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl line 3 is not JSON"),
            ("a.json", '[{"text": "a"},\n{]', r"a\.json is not JSON at line 2"),
            ("a.json", '{\n"text": "a"}', r"line 1 is not JSON.*array of objects"),
            ("a.json", '[{"text": "a"}, 5]', r"row 1 is int \(5\), not an object"),
            ("a.jsonl", '{"text": "a"}\n"b"', r"line 2 is str \('b'\), not an object"),
            ("a.json", "[]", "is empty"),
            ("a.jsonl", " \n", "is empty"),
            ("a.csv", "text\n", "is empty"),
            ("a.csv", "text,text\na,b\n", "names a field twice"),
            ("a.csv", "text,b\na,b\na,b,c\n", r"line 3 has 3 cells under a header of 2 \(text, b\)"),
            ("a.csv", 'text\n"a', "cannot be read"),
            ("a.jsonl.gz", "no gzip", "cannot be read"),
        ],
    )
    def test_a_broken_file_is_named(self, name: str, text: str, problem: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=problem):
            load(tmp_path / name)

    def test_text_in_another_encoding(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("text\né\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"a\.csv is not UTF-8"):
            load(tmp_path / "a.csv")

    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    def test_a_byte_order_mark_is_no_text(self, pack: Any, tmp_path: Path) -> None:
        path = tmp_path / ("a.csv.gz" if pack is gzip.compress else "a.csv")
        path.write_bytes(pack("\ufefftext\nthe\n".encode()))
        assert learned(load(path).train[0], make_tokenizer()) == ["the</s>"]


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"name": ""}, r"data\.name must name examples"),
            ({"name": "nothing/here.json"}, r"data\.name nothing/here\.json has no file"),
            ({"sequence_length": 1}, r"sequence_length must be at least 2.*got 1"),
            ({"validation_size": -1}, r"validation_size must be at least 0, got -1"),
            ({"max_examples": 0}, r"max_examples must be at least 1, got 0"),
        ],
    )
    def test_what_cannot_work_is_refused(self, changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=problem):
            load_instructions(config_for("x", **changes), make_tokenizer(), cache_dir=tmp_path)

    def test_a_tokenizer_without_an_end_is_refused(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ConfigError, match=r"no end token.*eos_token"):
            load_instructions(config_for("x"), tokenizer, cache_dir=tmp_path)

    def test_a_hub_name_that_cannot_be_had_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match=r"'nobody/nothing' \(subset None, split train\) is not a local path"):
            load_instructions(config_for("nobody/nothing"), make_tokenizer(), cache_dir=tmp_path)
