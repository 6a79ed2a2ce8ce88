"""How an instruction is put to a model: the published prompt templates, character for character, by name.

``alpaca`` is Stanford Alpaca's, which SIFT trains with: the answer follows the colon directly. ``commonsense`` is what
LLM-Adapters and Fira train with on Commonsense170K, indentation and spaces at line ends included, and
``commonsense-eval`` is what they ask the trained model, which has other spaces. ``plain`` is the instruction alone,
and ``chat`` is whatever the tokenizer's own chat template makes of it.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fullrank.errors import ConfigError

CHAT = "chat"
COMMONSENSE_EVALUATION = "commonsense-eval"

_TASK = "Below is an instruction that describes a task"
_CONTEXT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
_INDENT = 16 * " "  # LLM-Adapters' templates are indented as far as the code around them


class _Template(NamedTuple):
    """A prompt with an input beside the instruction, and one without."""

    with_input: str
    without_input: str


def _indented(*lines: str) -> str:
    """Lines after one another, each behind the indentation; the last is not ended."""
    return "\n".join(_INDENT + line for line in lines)


_TEMPLATES = {
    "alpaca": _Template(
        f"{_TASK}{_CONTEXT}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:",
        f"{_TASK}{_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
    ),
    "commonsense": _Template(
        f"{_TASK}{_CONTEXT}{_REQUEST} \n\n"
        + _indented("### Instruction:", "{instruction}", "", "### Input:", "{input}", "", "### Response:", ""),
        f"{_TASK}{_REQUEST}  \n\n" + _indented("### Instruction:", "{instruction}", "", "### Response:", ""),
    ),
    COMMONSENSE_EVALUATION: _Template(
        f"{_TASK}{_CONTEXT}{_REQUEST}\n\n"
        + "\n\n".join(
            (
                _indented("### Instruction:", "{instruction}"),
                _indented("### Input:", "{input}"),
                _indented("### Response:", ""),
            )
        ),
        f"{_TASK}{_REQUEST} \n\n"
        + "\n\n".join((_indented("### Instruction:", "{instruction}"), _indented("### Response:", ""))),
    ),
    "plain": _Template("{instruction}\n\n{input}\n", "{instruction}\n"),
}

TRAINING_TEMPLATES = (*(name for name in _TEMPLATES if name != COMMONSENSE_EVALUATION), CHAT)
"""The templates that training examples can be put in."""


def render_prompt(
    template: str, instruction: str, input_text: str = "", *, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """The prompt of an instruction, up to where the answer starts.

    Args:
        template: Name of the template: one of `TRAINING_TEMPLATES`, or commonsense-eval.
        instruction: What is asked.
        input_text: What the instruction is about; empty: there is none.
        tokenizer: Whose chat template it is; needed for chat alone.

    Raises:
        ConfigError: If there is no such template, or the tokenizer has no chat template.
    """
    if template == CHAT:
        messages = [user_message(instruction, input_text)]
        rendered: str = chat_tokenizer(tokenizer).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return rendered
    if template not in _TEMPLATES:
        names = (*_TEMPLATES, CHAT)
        close = get_close_matches(template, names, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Set it to one of: {', '.join(names)}."
        raise ConfigError(f"there is no prompt template {template!r}. {hint}")
    chosen = _TEMPLATES[template]
    text = chosen.with_input if input_text else chosen.without_input
    return text.format(instruction=instruction, input=input_text)


def user_message(instruction: str, input_text: str) -> dict[str, str]:
    """An instruction and its input, a blank line between, as the user's turn of a conversation."""
    return {"role": "user", "content": f"{instruction}\n\n{input_text}" if input_text else instruction}


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """A tokenizer that is known to have a chat template."""
    if tokenizer is None or not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ConfigError(
            f"{name} has no chat template to put messages in. Name a tokenizer with one in data.tokenizer, or set "
            f"data.prompt_template to one of: {', '.join(name for name in TRAINING_TEMPLATES if name != CHAT)}."
        )
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer; None if it puts none."""
    answer = "an answer"
    messages = [user_message("a question", ""), {"role": "assistant", "content": answer}]
    text: str = chat_tokenizer(tokenizer).apply_chat_template(messages, tokenize=False)
    behind = text.rpartition(answer)[2]
    tokens: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in tokens if token in control), None)
