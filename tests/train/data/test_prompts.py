"""Prompt templates: the published strings, every space of them, and errors that say what to do."""

from __future__ import annotations

import itertools
from typing import get_args, get_type_hints

import pytest

from fullrank.errors import ConfigError
from fullrank.train.config import InstructionsConfig
from fullrank.train.data.prompts import TRAINING_TEMPLATES, render_prompt
from tests.train.data.instructing import MARKED, make_tokenizer

BARE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

# (template, with an input) -> its lines; ~ is the 16 spaces of LLM-Adapters
LINES = {
    ("alpaca", True): [
        PAIRED,
        "",
        "### Instruction:",
        "Add {the} numbers.",
        "",
        "### Input:",
        "1\n2",
        "",
        "### Response:",
    ],
    ("alpaca", False): [BARE, "", "### Instruction:", "Add {the} numbers.", "", "### Response:"],
    ("commonsense", True): [
        PAIRED + " ",
        "",
        "~### Instruction:",
        "~Add {the} numbers.",
        "~",
        "~### Input:",
        "~1\n2",
        "~",
        "~### Response:",
        "~",
    ],
    ("commonsense", False): [
        BARE + "  ",
        "",
        "~### Instruction:",
        "~Add {the} numbers.",
        "~",
        "~### Response:",
        "~",
    ],
    ("commonsense-eval", True): [
        PAIRED,
        "",
        "~### Instruction:",
        "~Add {the} numbers.",
        "",
        "~### Input:",
        "~1\n2",
        "",
        "~### Response:",
        "~",
    ],
    ("commonsense-eval", False): [
        BARE + " ",
        "",
        "~### Instruction:",
        "~Add {the} numbers.",
        "",
        "~### Response:",
        "~",
    ],
    ("plain", True): ["Add {the} numbers.", "", "1\n2", ""],
    ("plain", False): ["Add {the} numbers.", ""],
}


@pytest.mark.parametrize(("template", "has_input"), LINES)
def test_templates_are_as_published(template: str, has_input: bool) -> None:
    expected = "\n".join(LINES[template, has_input]).replace("~", " " * 16)
    assert render_prompt(template, "Add {the} numbers.", "1\n2" if has_input else "") == expected


def test_no_two_templates_are_the_same() -> None:
    prompts = {render_prompt(name, "a", text) for (name, _), text in itertools.product(LINES, ("", "b"))}
    assert len(prompts) == len(LINES)


@pytest.mark.parametrize(("input_text", "content"), [("1 2", "Add:\n\n1 2"), ("", "Add:")])
def test_chat_is_the_tokenizers_own_template(input_text: str, content: str) -> None:
    prompt = render_prompt("chat", "Add:", input_text, tokenizer=make_tokenizer(chat=MARKED))
    assert prompt == f"<|user|>{content}<|end|>\n<|assistant|>"


def test_training_offers_what_the_config_takes() -> None:
    assert get_args(get_type_hints(InstructionsConfig)["prompt_template"]) == TRAINING_TEMPLATES


@pytest.mark.parametrize(
    ("name", "hint"),
    [("alpacca", "mean alpaca"), ("xyz", "alpaca, commonsense, commonsense-eval, plain, chat")],
)
def test_an_unknown_template_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        render_prompt(name, "a")


@pytest.mark.parametrize("given", [True, False])
def test_chat_needs_a_chat_template(given: bool) -> None:
    with pytest.raises(ConfigError, match=r"has no chat template.*data\.tokenizer"):
        render_prompt("chat", "a", tokenizer=make_tokenizer() if given else None)
