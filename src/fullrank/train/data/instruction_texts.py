"""From a row to the text that a model reads, and to the characters of it that it learns to write.

Instructions are put in a prompt template, prompts and completions are joined as they are, messages are written by the
tokenizer's chat template. An instruction in the template ``chat`` is a conversation of two turns, so that its answer
ends as the chat template ends a turn.

In a conversation every assistant turn is learned. Where the turns lie is what a chat template with ``{% generation %}``
says. Of one without, the text before a turn (with the generation prompt) and the text up to its end have to be
beginnings of the whole; a template that writes earlier turns in another way, such as one that drops their reasoning, is
refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from fullrank.errors import ConfigError
from fullrank.train.config import InstructionsConfig
from fullrank.train.data.instruction_rows import Row, Rows
from fullrank.train.data.prompts import CHAT, chat_tokenizer, render_prompt, user_message

_FIELDS = {
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers recognises it
_REMEDY = (
    "Add {% generation %} and {% endgeneration %} around the assistant's turns in the chat template, or set "
    "data.train_on_inputs."
)


class Example(NamedTuple):
    """A text to train on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Beginnings and ends of what is learned (characters), in order; none: the answer is empty."""
    is_chat: bool
    """Whether a chat template wrote it, control tokens and all."""


def recognise_format(rows: Rows, config: InstructionsConfig) -> str:
    """The format of the rows: the one that `config` names, or the only one that the first row has the fields of.

    Raises:
        ConfigError: If a field is missing, or the fields are those of no format or of several.
    """
    wanted = _FIELDS | {"text": (config.text_field,)}
    found = f"{rows.name} has the fields {', '.join(rows.fields)}"
    wishes = "; ".join(f"{name} wants {' and '.join(fields)}" for name, fields in wanted.items())
    if config.format != "auto":
        missing = [field for field in wanted[config.format] if field not in rows.fields]
        if missing:
            raise ConfigError(
                f"{found}, and data.format {config.format} wants {' and '.join(missing)}. Rename the fields, or set "
                f"data.format to another: {wishes}."
            )
        return config.format
    matching = [name for name, fields in wanted.items() if set(fields) <= set(rows.fields)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(f"{found}, which fit several formats: {', '.join(matching)}. Set data.format to one of them.")
    raise ConfigError(f"{found}, which fit no format: {wishes}. Rename the fields, or set data.text_field.")


@dataclass(frozen=True)
class Writer:
    """Writes rows of one format as texts."""

    format: str
    config: InstructionsConfig
    tokenizer: PreTrainedTokenizerFast

    def fields(self, available: list[str]) -> list[str]:
        """The columns of a table that rows of the format are made from."""
        wanted = (*_FIELDS.get(self.format, (self.config.text_field,)), "input")
        return [field for field in available if field in wanted]

    def __call__(self, row: Row) -> Example:
        """The text of a row.

        Raises:
            ConfigError: If a field is missing or holds something else, or the chat template cannot be used.
        """
        if self.format == "messages":
            return self._conversation(row, row.messages("messages"), field="messages")
        if self.format == "prompt_completion":
            return self._completion(row)
        if self.format == "text":
            text = row.text(self.config.text_field)
            return Example(text, _span(0, text), is_chat=False)
        instruction, input_text = row.text("instruction"), row.optional_text("input")
        answer = row.text("output")
        if self.config.prompt_template == CHAT:
            messages = [user_message(instruction, input_text), {"role": "assistant", "content": answer}]
            return self._conversation(row, messages, field="output")
        return self._joined(render_prompt(self.config.prompt_template, instruction, input_text), answer)

    def _joined(self, prompt: str, answer: str) -> Example:
        """A prompt and what follows it."""
        span = _span(len(prompt), answer)
        if span and self.config.train_on_inputs:
            span = ((0, len(prompt) + len(answer)),)
        return Example(prompt + answer, span, is_chat=False)

    def _completion(self, row: Row) -> Example:
        """A prompt and its completion: both texts, or both messages."""
        if not isinstance(row.values.get("prompt"), list):
            return self._joined(row.text("prompt"), row.text("completion"))
        prompt, completion = row.messages("prompt"), row.messages("completion")
        text = self._render(row, [*prompt, *completion])
        if any(map(_is_blank, completion)):
            return Example(text, (), is_chat=True)
        if self.config.train_on_inputs:
            return Example(text, ((0, len(text)),), is_chat=True)
        start = self._render(row, prompt, prompts=True)
        if not text.startswith(start):
            raise row.error(
                "prompt", f"is written in another way by the chat template once its completion follows. {_REMEDY}"
            )
        return Example(text, ((len(start), len(text)),), is_chat=True)

    def _conversation(self, row: Row, messages: list[dict[str, Any]], *, field: str) -> Example:
        """Messages as the chat template writes them."""
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise row.error(field, "holds no turn of the role assistant, which is what is learned")
        if any(map(_is_blank, answers)):
            return Example(self._render(row, messages), (), is_chat=True)
        if self.config.train_on_inputs:
            text = self._render(row, messages)
            return Example(text, ((0, len(text)),), is_chat=True)
        template = chat_tokenizer(self.tokenizer).get_chat_template()
        if not _GENERATION.search(template):
            return self._by_prefixes(row, messages, field=field)
        text, spans = self._with_spans(row, messages, template)
        if not spans:
            raise row.error(field, "holds an assistant turn outside the {% generation %} of the chat template")
        return Example(text, spans, is_chat=True)

    def _with_spans(
        self, row: Row, messages: list[dict[str, Any]], template: str
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text, and what lies in ``{% generation %}``.

        `apply_chat_template` would give the same as a mask of tokens, but loses a turn's end where the tokenizer's
        offsets leave spaces out (trim_offsets, as Llama 3's do), and then marks all that follows it.
        """
        render: Any = render_jinja_template  # its annotations are of another function
        try:
            texts, spans = render(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise _unwritable(row, error) from error
        return texts[0], tuple((start, end) for start, end in spans[0] if end > start)

    def _by_prefixes(self, row: Row, messages: list[dict[str, Any]], *, field: str) -> Example:
        """The text, and the turns by how long it is before and after each."""
        text = self._render(row, messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise row.error(
                    field, f"begins with an assistant turn, whose place in the text is not known. {_REMEDY}"
                )
            before = self._render(row, messages[:number], prompts=True)
            after = self._render(row, messages[: number + 1])
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                problem = f"is written by the chat template such that the place of turn {number} is not known"
                raise row.error(field, problem, remedy=_REMEDY)
            spans.append((len(before), len(after)))
        return Example(text, tuple(spans), is_chat=True)

    def _render(self, row: Row, messages: list[dict[str, Any]], *, prompts: bool = False) -> str:
        """Messages as text; with what makes the assistant answer, if `prompts`."""
        tokenizer = chat_tokenizer(self.tokenizer)
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts)
        except (TemplateError, TypeError) as error:
            raise _unwritable(row, error) from error
        return text


def _span(start: int, answer: str) -> tuple[tuple[int, int], ...]:
    """Where an answer lies; nowhere, if it is blank."""
    return ((start, start + len(answer)),) if answer.strip() else ()


def _is_blank(message: dict[str, Any]) -> bool:
    """Whether a message neither says nor calls anything."""
    return not message.get("tool_calls") and not message["content"].strip()


def _unwritable(row: Row, error: Exception) -> ConfigError:
    reason = str(error).strip() or type(error).__name__
    return ConfigError(f"{row.place()}: the tokenizer's chat template does not take its messages: {reason}")
