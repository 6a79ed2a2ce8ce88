"""Instruction data to examples: what is read, what is learned of it token by token, and what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.data.instructions import load_instructions
from fullrank.train.data.prepared import Data
from fullrank.train.data.prompts import render_prompt
from tests.shared_data import SHARED
from tests.train.data.instructing import config_for, learned, make_rows, make_tokenizer, write_rows

Load = Callable[..., Data]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Prepares rows, given with the tokenizer and changes of the configuration."""

    def prepared(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Data:
        number = len(list(tmp_path.glob("*.jsonl")))
        config = config_for(write_rows(tmp_path / f"rows{number}.jsonl", rows), **changes)
        return load_instructions(config, tokenizer, cache_dir=tmp_path / "cache")

    return prepared


def tokens(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast, column: str = "input_ids") -> list[str]:
    """Tokens as they are written, with · for what is not learned."""
    return [tokenizer.convert_ids_to_tokens(token) if token != -100 else "·" for token in row[column]]


class TestMasks:
    @pytest.mark.parametrize("begins", [True, False])
    @pytest.mark.parametrize("input_text", ["", "yes no"])
    def test_an_instruction_teaches_its_answer_and_the_end(self, load: Load, begins: bool, input_text: str) -> None:
        tokenizer = make_tokenizer(begins=begins)
        rows = [{"instruction": "Say: the", "input": input_text, "output": "yes :- no", "answer": "unused"}]
        row = load(rows, tokenizer).train[0]
        prompt = render_prompt("alpaca", "Say: the", input_text)
        assert tokenizer.decode(row["input_ids"]) == begins * "<s>" + prompt + "yes :- no</s>"
        assert tokens(row, tokenizer, "labels")[-5:] == ["·", "yes", "Ġ:-", "Ġno", "</s>"]
        assert learned(row, tokenizer) == ["yes :- no</s>"]

    @pytest.mark.parametrize("trims", [True, False])
    @pytest.mark.parametrize(
        ("prompt", "completion", "written", "labels"),
        [
            # a space that the prompt ends with goes with the first word; a colon with the hyphen
            ("Response: ", "the no", ["Response", ":", "Ġthe", "Ġno", "</s>"], ["Ġthe", "Ġno", "</s>"]),
            ("Response:", "- no", ["Response", ":-", "Ġno", "</s>"], [":-", "Ġno", "</s>"]),
            # spaces that are tokens of their own, on either side
            ("Response:  ", "the", ["Response", ":", "Ġ", "Ġthe", "</s>"], ["Ġthe", "</s>"]),
            ("Response:", "  the ", ["Response", ":", "Ġ", "Ġthe", "Ġ", "</s>"], ["Ġ", "Ġthe", "Ġ", "</s>"]),
            # a character of several tokens
            ("Response:é", "é", ["Response", ":", "Ã", "©", "Ã", "©", "</s>"], ["Ã", "©", "</s>"]),
        ],
    )
    def test_a_token_across_the_border_is_learned(
        self, load: Load, prompt: str, completion: str, written: list[str], labels: list[str], trims: bool
    ) -> None:
        tokenizer = make_tokenizer(trims=trims)
        row = load([{"prompt": prompt, "completion": completion}], tokenizer).train[0]
        assert tokens(row, tokenizer) == ["<s>", *written]
        assert tokens(row, tokenizer, "labels") == ["·"] * (1 + len(written) - len(labels)) + labels

    @pytest.mark.parametrize("begins", [True, False])
    def test_of_text_all_but_the_first_token_is_learned(self, load: Load, begins: bool) -> None:
        tokenizer = make_tokenizer(begins=begins)
        row = load([{"text": "the answer"}], tokenizer).train[0]
        assert tokens(row, tokenizer, "labels") == ["·", *["the"] * begins, "Ġanswer", "</s>"]

    def test_train_on_inputs_learns_the_prompt_too(self, load: Load) -> None:
        tokenizer = make_tokenizer()
        for rows in (make_rows(1), [{"prompt": "the", "completion": " yes"}]):
            row = load(rows, tokenizer, train_on_inputs=True).train[0]
            assert row["labels"] == [-100, *row["input_ids"][1:]]

    def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(self, load: Load) -> None:
        tokenizer = make_tokenizer(ends=True)
        row = load([{"prompt": "Say:", "completion": " no"}], tokenizer).train[0]
        assert tokens(row, tokenizer) == ["<s>", "Say", ":", "Ġno", "</s>"]
        assert tokens(row, tokenizer, "labels")[-2:] == ["Ġno", "</s>"]

    def test_spelled_special_tokens_are_text(self, load: Load) -> None:
        tokenizer = make_tokenizer()
        rows = [{"instruction": "<s>", "output": "a</s><|end|>"}]
        row = load(rows, tokenizer).train[0]
        special = [token for token in tokens(row, tokenizer) if token in tokenizer.all_special_tokens]
        assert special == ["<s>", "</s>"]
        assert learned(row, tokenizer) == ["a</s><|end|></s>"]

    def test_several_rows_keep_their_order(self, load: Load) -> None:
        tokenizer, rows = make_tokenizer(), make_rows(30)
        parts = [learned(row, tokenizer) for row in load(rows, tokenizer).train]
        assert parts == [[row["output"] + "</s>"] for row in rows]


class TestLengths:
    PROMPT, COMPLETION = "Say:", " yes no the"  # <s> Say : | Ġyes Ġno Ġthe | </s>

    @pytest.mark.parametrize(
        ("length", "labels", "cut"),
        [
            (7, ["Ġyes", "Ġno", "Ġthe", "</s>"], 0),
            (6, ["Ġyes", "Ġno", "Ġthe"], 1),
            (4, ["Ġyes"], 1),
        ],
    )
    def test_a_cut_answer_has_no_end(self, load: Load, length: int, labels: list[str], cut: int) -> None:
        tokenizer = make_tokenizer()
        data = load([{"prompt": self.PROMPT, "completion": self.COMPLETION}], tokenizer, sequence_length=length)
        assert tokens(data.train[0], tokenizer, "labels") == ["·"] * 3 + labels
        assert f"{3 + len(labels)} tokens, {cut} of them cut" in data.description
        assert data.num_train_tokens == 3 + len(labels)

    def test_examples_without_a_label_are_left_out_and_told(self, load: Load, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = make_tokenizer()
        rows = [{"prompt": "Say:", "completion": "no"}, {"prompt": "Say: the", "completion": "no"}]
        rows += [{"prompt": "", "completion": " \n"}]
        for _ in range(2):  # also when the examples are found in the cache
            caplog.clear()
            data = load(rows, tokenizer, sequence_length=4)
            assert [learned(row, tokenizer) for row in data.train] == [["no"]]
            assert "2 of 3 examples are left out" in caplog.text
            assert "row 1 (line 2): 1 with an empty answer, 1 whose prompt fills" in caplog.text
            assert "1 examples of 4 tokens, 1 of them cut, 2 left out" in data.description
        with pytest.raises(ConfigError, match=r"nothing to learn: 1 with an empty answer, 1 whose.*\(4 tokens\)"):
            load(rows[1:], tokenizer, sequence_length=4)

    @pytest.mark.parametrize("pads", [True, False])
    def test_padding_is_told_by_its_place(self, load: Load, pads: bool) -> None:
        tokenizer = make_tokenizer(pads=pads)
        tokenizer.padding_side = "left"  # for generation; training pads on the right all the same
        data = load([{"text": "the"}, {"text": "the answer is yes the answer is"}], tokenizer)
        batch = data.collate([data.train[0], data.train[1]])
        assert data.padded
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        lengths = [len(row["input_ids"]) for row in data.train]
        assert lengths == [3, 9]
        for index, length in enumerate(lengths):
            assert batch["input_ids"][index].tolist() == data.train[index]["input_ids"] + [tokenizer.pad_token_id] * (
                16 - length
            )
            assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (16 - length)
            assert batch["labels"][index].tolist() == data.train[index]["labels"] + [-100] * (16 - length)
            assert batch["labels"][index, length - 1] == tokenizer.eos_token_id
        assert tokenizer.padding_side == "left"


class TestSources:
    KINDS = ("json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz")

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_file_gives_the_same(self, kind: str, tmp_path: Path) -> None:
        rows = make_rows(12)
        rows[3] |= {"instruction": 'a "quoted", cell\nof two lines ☃', "output": "NA"}
        for number in (5, 6):
            rows[number]["output"] = "2024-01-02"
        config = config_for(write_rows(tmp_path / f"rows.{kind}", rows))
        data = load_instructions(config, make_tokenizer(), cache_dir=tmp_path / "cache")
        assert [learned(row, make_tokenizer()) for row in data.train] == [[row["output"] + "</s>"] for row in rows]
        prompt = render_prompt("alpaca", rows[3]["instruction"], rows[3]["input"])
        assert make_tokenizer().decode(data.train[3]["input_ids"]) == f"<s>{prompt}NA</s>"

    @pytest.mark.parametrize("kind", ["json", "csv"])
    @pytest.mark.parametrize("answer", ["2024-01-02", "7", "007", "true", "null"])
    def test_text_stays_text_though_all_of_it_looks_like_something_else(
        self, kind: str, answer: str, tmp_path: Path
    ) -> None:
        rows = [{"instruction": "a", "output": answer}] * 3
        config = config_for(write_rows(tmp_path / f"rows.{kind}", rows))
        data = load_instructions(config, make_tokenizer(), cache_dir=tmp_path / "cache")
        assert learned(data.train[2], make_tokenizer()) == [answer + "</s>"]

    def test_a_folder_and_a_glob_are_read_in_order(self, tmp_path: Path) -> None:
        rows = make_rows(9)
        for name, part in (("b", rows[4:]), ("a", rows[:4])):
            write_rows(tmp_path / f"{name}.json", part)
        for name in (tmp_path, tmp_path / "*.json"):
            data = load_instructions(config_for(name), make_tokenizer(), cache_dir=tmp_path / "cache" / name.name[0])
            assert [learned(row, make_tokenizer()) for row in data.train] == [[r["output"] + "</s>"] for r in rows]

    def test_a_text_file_is_split_at_blank_lines(self, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("the answer\n\nis yes\n")
        data = load_instructions(config_for(tmp_path / "text.txt"), make_tokenizer(), cache_dir=tmp_path)
        assert make_tokenizer().decode(data.train[1]["input_ids"]) == "<s>is yes\n</s>"

    def test_text_of_another_field(self, load: Load) -> None:
        data = load([{"body": "the", "instruction": "b"}], make_tokenizer(), text_field="body")
        assert learned(data.train[0], make_tokenizer()) == ["the</s>"]

    def test_only_what_the_collator_reads_is_kept(self, load: Load) -> None:
        assert load(make_rows(3), make_tokenizer()).train.column_names == ["input_ids", "labels"]


class TestHeldOut:
    def rows_of(self, dataset: Any) -> set[str]:
        return {make_tokenizer().decode(row["input_ids"]) for row in dataset}

    def test_carving_is_disjoint_and_the_same_every_time(self, load: Load) -> None:
        data = load(make_rows(20), make_tokenizer(), validation_size=5)
        again = load(make_rows(20), make_tokenizer(), validation_size=5)
        other = load(make_rows(20), make_tokenizer(), validation_size=5, seed=1)
        fewer = load(make_rows(20), make_tokenizer(), validation_size=5, max_examples=4)
        train, validation = self.rows_of(data.train), self.rows_of(data.validation)
        assert (len(train), len(validation), len(train | validation)) == (15, 5, 20)
        assert (self.rows_of(again.train), self.rows_of(again.validation)) == (train, validation)
        assert self.rows_of(other.validation) != validation
        assert self.rows_of(fewer.validation) == validation
        assert len(fewer.train) == 4
        assert self.rows_of(fewer.train) < train
        assert len({d.content_hash for d in (data, again)}) == 1
        assert len({d.content_hash for d in (data, other, fewer)}) == 3

    def test_carving_leaves_an_example(self, load: Load) -> None:
        assert len(load(make_rows(3), make_tokenizer(), validation_size=2).train) == 1
        with pytest.raises(ConfigError, match=r"at most 2 of the 3.*got 3"):
            load(make_rows(3), make_tokenizer(), validation_size=3)

    def test_validation_of_a_file(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train, other = write_rows(tmp_path / "a.json", make_rows(4)), write_rows(tmp_path / "b.csv", make_rows(9)[4:])
        config = config_for(train, validation=str(other), validation_size=2)
        data = load_instructions(config, make_tokenizer(), cache_dir=tmp_path / "cache")
        assert (len(data.train), len(data.validation)) == (4, 5)
        assert "validation_size has no effect" in caplog.text
        with pytest.raises(ConfigError, match="scored on its training"):
            load_instructions(config_for(train, validation=str(train)), make_tokenizer(), cache_dir=tmp_path / "cache")

    def test_without_validation_there_is_none(self, load: Load) -> None:
        data = load(make_rows(3), make_tokenizer(), max_examples=7)
        assert data.validation is None
        assert len(data.train) == 3

    def test_what_is_prepared_is_found_again(self, tmp_path: Path) -> None:
        config = config_for(write_rows(tmp_path / "rows.jsonl", make_rows(8)), validation_size=2, packing=True)

        def load_once(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> tuple[str, dict[Path, int]]:
            data = load_instructions(config_for(config.name, **(vars(config) | changes)), tokenizer, cache_dir=tmp_path)
            files = (tmp_path / "examples").iterdir()
            return data.content_hash, {f: f.stat().st_mtime_ns for f in files}

        first, files = load_once(make_tokenizer())
        assert (first, files) == load_once(make_tokenizer())
        for tokenizer, changes in (
            (make_tokenizer(begins=False), {}),
            (make_tokenizer(), {"sequence_length": 256}),
            (make_tokenizer(), {"prompt_template": "plain"}),
            (make_tokenizer(), {"train_on_inputs": True}),
        ):
            other, more = load_once(tokenizer, **changes)
            assert other != first, changes
            assert len(more) == len(files) + 4  # both parts, encoded and packed
            files = more


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs Alpaca's and LLM-Adapters' files")
class TestPublished:
    @pytest.mark.parametrize("name", ["gpt2", "llama2-32k"])
    @pytest.mark.parametrize(
        ("path", "template", "count", "left_out"),
        [
            ("instruct/alpaca_5000.json", "alpaca", 4998, 2),
            ("commonsense/llm-adapters/ARC-*/train.json", "commonsense", 3370, 0),
        ],
    )
    def test_every_answer_is_learned(
        self, path: str, template: str, count: int, left_out: int, name: str, tmp_path: Path
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
        config = config_for(SHARED / path, prompt_template=template, sequence_length=2048)
        data = load_instructions(config, tokenizer, cache_dir=tmp_path)
        assert len(data.train) == count
        assert f"0 of them cut, {left_out} left out" in data.description
        files = sorted(SHARED.glob(path))
        rows = [row for file in files for row in json.loads(file.read_text()) if row["output"]]
        for row, example in zip(rows[::50], data.train.select(range(0, count, 50)), strict=True):
            prompt = render_prompt(template, row["instruction"], row["input"])
            (answer,) = learned(example, tokenizer)
            ends = tokenizer.eos_token
            assert answer.removesuffix(ends).lstrip(" :") == row["output"].lstrip(" :")
            assert answer.endswith(ends)
            whole = torch.tensor(example["input_ids"])
            assert tokenizer.decode(whole, skip_special_tokens=True).lstrip() == prompt + row["output"]

    @pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/llama2-32k", "models/stories260K-hf"])
    def test_spelled_special_tokens_are_text(self, name: str, load: Load) -> None:
        tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
        rows = [{"prompt": "<s> </s> <|endoftext|> <unk>", "completion": " </s> <|endoftext|>"}]
        row = load(rows, tokenizer).train[0]
        num_begins = len(tokenizer("").input_ids)
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        assert not set(row["input_ids"][num_begins:-1]) & set(tokenizer.all_special_ids)
        assert learned(row, tokenizer)[0].lstrip() == "</s> <|endoftext|>" + tokenizer.eos_token
