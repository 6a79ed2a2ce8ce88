"""Conversations: which turns are learned, token by token, with and without marks in the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.data.instructions import load_instructions
from fullrank.train.data.prompts import render_prompt
from tests.train.data.instructing import FORGETFUL, MARKED, PLAIN, config_for, learned, make_tokenizer, write_rows

Row = dict[str, list[int]]


def turns(*contents: str) -> list[dict[str, str]]:
    """A user's and an assistant's turns after one another."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path, **changes: Any) -> Row:
    """The example of one row."""
    config = config_for(write_rows(folder / "rows.jsonl", [row]), **changes)
    example: Row = load_instructions(config, tokenizer, cache_dir=folder / "cache").train[0]
    return example


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize(("template", "tail"), [(MARKED, ""), (PLAIN, "\n")], ids=["marked", "unmarked"])
class TestTurns:
    """Marks leave the line's end out; without them a turn goes as far as the text that it adds."""

    @pytest.mark.parametrize(
        "contents",
        [
            ("the", "yes"),
            ("the", "yes", "is no", "the answer"),
            # spaces at the ends of a turn, which some offsets leave out
            ("the ", " yes ", " is", "  no  ", "the", "yes "),
            ("é", "éé ☃", "no", "é"),
        ],
    )
    def test_every_assistant_turn_is_learned(
        self, contents: tuple[str, ...], template: str, tail: str, trims: bool, tmp_path: Path
    ) -> None:
        tokenizer = make_tokenizer(trims=trims, chat=template)
        row = encode({"messages": turns(*contents)}, tokenizer, tmp_path)
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>\n" for m in turns(*contents))
        assert tokenizer.decode(row["input_ids"]) == text
        assert learned(row, tokenizer) == [f"{content}<|end|>{tail}" for content in contents[1::2]]

    def test_an_instruction_is_a_conversation_of_two_turns(
        self, template: str, tail: str, trims: bool, tmp_path: Path
    ) -> None:
        tokenizer = make_tokenizer(trims=trims, chat=template)
        given = {"instruction": "Say:", "input": "the", "output": " yes "}
        row = encode(given, tokenizer, tmp_path, prompt_template="chat")
        prompt = render_prompt("chat", "Say:", "the", tokenizer=tokenizer)
        assert tokenizer.decode(row["input_ids"]) == f"{prompt} yes <|end|>\n"
        assert learned(row, tokenizer) == [f" yes <|end|>{tail}"]

    def test_of_a_conversational_prompt_only_the_completion_is_learned(
        self, template: str, tail: str, trims: bool, tmp_path: Path
    ) -> None:
        tokenizer = make_tokenizer(trims=trims, chat=template)
        messages = turns("the", "yes", "is", "no", "yes", "the")
        row = encode({"prompt": messages[:3], "completion": messages[3:]}, tokenizer, tmp_path)
        (text,) = learned(row, tokenizer)
        assert text == "no<|end|>\n<|user|>yes<|end|>\n<|assistant|>the<|end|>\n"

    def test_train_on_inputs_learns_every_turn(self, template: str, tail: str, trims: bool, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(trims=trims, chat=template)
        messages = turns("the", "yes", "is", "no")
        for given in ({"messages": messages}, {"prompt": messages[:3], "completion": messages[3:]}):
            row = encode(given, tokenizer, tmp_path, train_on_inputs=True)
            assert row["labels"] == [-100, *row["input_ids"][1:]]

    def test_a_conversation_is_cut_on_the_right(self, template: str, tail: str, trims: bool, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(trims=trims, chat=template)
        row = encode({"messages": turns("the", "yes", "is", "no yes")}, tokenizer, tmp_path, sequence_length=14)
        assert len(row["input_ids"]) == 14
        assert learned(row, tokenizer) == [f"yes<|end|>{tail}", "no"]


def test_tokens_one_by_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat=MARKED)
    messages = [{"role": "system", "content": "the"}, *turns("is", "yes no")]
    row = encode({"messages": messages}, tokenizer, tmp_path)
    written = ["<|system|>", "the", "<|end|>", "Ċ", "<|user|>", "is", "<|end|>", "Ċ", "<|assistant|>"]
    written += ["yes", "Ġno", "<|end|>", "Ċ"]  # and no <s>, which this template does not write
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == written
    assert row["labels"] == [-100] * 9 + row["input_ids"][9:12] + [-100]


def test_a_template_may_see_more_than_the_content(tmp_path: Path) -> None:
    template = MARKED.replace(
        "{{ message.content }}<|end|>{% e", "{{ message.content }}{{ message.note }}<|end|>{% e", 1
    )
    tokenizer = make_tokenizer(chat=template)
    messages = turns("the", "yes")
    messages[1]["note"] = " no"
    assert learned(encode({"messages": messages}, tokenizer, tmp_path), tokenizer) == ["yes no<|end|>"]


class TestRefusals:
    MESSAGES = turns("the", "yes", "is", "no")

    def test_a_template_that_forgets_turns_is_refused(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat=FORGETFUL)
        assert learned(encode({"messages": self.MESSAGES[:2]}, tokenizer, tmp_path), tokenizer) == ["yes<|end|>\n"]
        with pytest.raises(ConfigError, match=r"row 0.*turn 1 is not known.*generation.*train_on_inputs"):
            encode({"messages": self.MESSAGES}, tokenizer, tmp_path)
        row = encode({"messages": self.MESSAGES}, tokenizer, tmp_path, train_on_inputs=True)
        assert row["labels"] == [-100, *row["input_ids"][1:]]

    def test_a_prompt_that_its_completion_changes_is_refused(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat="{{ messages | length }}" + PLAIN)
        with pytest.raises(ConfigError, match=r"row 0.*'prompt' is written in another way"):
            encode({"prompt": self.MESSAGES[:1], "completion": self.MESSAGES[1:2]}, tokenizer, tmp_path)

    def test_an_assistant_that_begins_needs_marks(self, tmp_path: Path) -> None:
        given = {"messages": self.MESSAGES[1:2]}
        assert learned(encode(given, make_tokenizer(chat=MARKED), tmp_path), make_tokenizer(chat=MARKED))
        with pytest.raises(ConfigError, match=r"begins with an assistant turn.*generation"):
            encode(given, make_tokenizer(chat=PLAIN), tmp_path)

    def test_an_assistant_outside_the_marks_is_refused(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat=PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
        with pytest.raises(ConfigError, match="outside the"):
            encode({"messages": self.MESSAGES}, tokenizer, tmp_path)

    @pytest.mark.parametrize("template", [MARKED, PLAIN])
    def test_what_a_template_does_not_take_is_told(self, template: str, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat="{{ raise_exception('no system here') }}" + template)
        with pytest.raises(ConfigError, match=r"row 0.*chat template does not take.*no system here"):
            encode({"messages": self.MESSAGES}, tokenizer, tmp_path)

    def test_messages_need_a_chat_template(self, tmp_path: Path) -> None:
        for given in ({"messages": self.MESSAGES}, {"prompt": self.MESSAGES[:1], "completion": self.MESSAGES[1:]}):
            with pytest.raises(ConfigError, match="has no chat template"):
                encode(given, make_tokenizer(), tmp_path)

    @pytest.mark.parametrize("template", [MARKED, PLAIN])
    def test_an_empty_turn_is_an_empty_answer(self, template: str, tmp_path: Path) -> None:
        for given in (
            {"messages": turns("the", "yes", "is", " ")},
            {"prompt": turns("the"), "completion": turns("the", "")[1:]},
        ):
            with pytest.raises(ConfigError, match="1 with an empty answer"):
                encode(given, make_tokenizer(chat=template), tmp_path)
