"""From texts to tokens, and to the tokens that are learned.

A text is tokenized whole, prompt and answer as one string, with the tokenizer's own beginning token in front, if it
adds one, and the end token behind; then cut to ``sequence_length``. Where the cut falls before the end there is no
end token, as in LLM-Adapters. Special tokens that are spelled in a text are text; only a chat template writes control
tokens, and it begins and ends its texts itself.

What is learned is told by characters, through the tokenizer's offsets: a token counts if it holds any character of an
answer. A token across the border, such as one for the space that ends a prompt and the word that begins the answer,
thus counts. LLM-Adapters and Alpaca tokenize the prompt a second time, alone, and leave out as many tokens as that
gives: where the two merge the first token of the answer is not learned. The first token of an example never counts,
since nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from fullrank.train.data.instruction_rows import Rows
from fullrank.train.data.instruction_texts import Example, Writer
from fullrank.train.data.prepared import IGNORED

ENCODED = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "num_tokens": Value("int32"),
        "num_learned": Value("int32"),
        "is_cut": Value("bool"),
        "is_blank": Value("bool"),
    }
)
"""Columns of encoded examples: whether one was cut, and whether its answer is empty, beside its tokens."""


@dataclass(frozen=True)
class Encoder:
    """Turns batches of rows into batches of tokens, for ``Dataset.map``."""

    rows: Rows
    writer: Writer
    chosen: NDArray[np.int64] | None
    """Which rows of the source the mapped ones are; None: all."""
    sequence_length: int

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Encode a batch into the columns of `ENCODED`.

        Raises:
            ConfigError: If a row is not as its format wants it.
        """
        numbers = indices if self.chosen is None else self.chosen[indices].tolist()
        examples = [self.writer(row) for row in self.rows.batch(columns, numbers)]
        encoded = encode(examples, self.writer.tokenizer, sequence_length=self.sequence_length)
        return {name: [row[name] for row in encoded] for name in ENCODED}


def encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, *, sequence_length: int
) -> list[dict[str, Any]]:
    """Tokens and labels of texts, as rows of `ENCODED`."""
    tokens = _tokenize([example for example in examples if not example.is_chat], tokenizer, is_chat=False)
    chats = _tokenize([example for example in examples if example.is_chat], tokenizer, is_chat=True)
    rows = []
    for example in examples:
        ids, offsets = next(chats if example.is_chat else tokens)
        learned = _learned(offsets, example)
        if not example.is_chat:
            ids = [*ids, tokenizer.eos_token_id]
            learned = np.append(learned, bool(example.spans))
        rows.append(_cut(ids, learned, example, sequence_length=sequence_length))
    return rows


def _tokenize(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, *, is_chat: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Tokens of each text and the characters that they stand for; no special tokens that the tokenizer adds behind."""
    if not examples:
        return
    encoded: Any = tokenizer(
        [example.text for example in examples],
        add_special_tokens=not is_chat,
        split_special_tokens=not is_chat,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for ids, offsets, special in zip(
        encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        length = len(ids)
        while not is_chat and length and special[length - 1]:
            length -= 1
        yield ids[:length], offsets[:length]


def _learned(offsets: list[tuple[int, int]], example: Example) -> NDArray[np.bool_]:
    """Which tokens hold a character that is learned.

    A token is taken to begin where the ones before it end, if it says that it begins later: offsets may leave out the
    spaces that a token begins with, or all of one that is nothing but spaces.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(np.concatenate(([0], ends)))[:-1]
    starts = np.minimum(starts, reached)
    learned = np.zeros(len(starts), dtype=np.bool_)
    for first, last in example.spans:
        learned |= (ends > first) & (starts < last)
    return learned


def _cut(tokens: list[int], learned: NDArray[np.bool_], example: Example, *, sequence_length: int) -> dict[str, Any]:
    """At most `sequence_length` tokens, their labels, and what became of the example."""
    learned[:1] = False
    kept, counts = tokens[:sequence_length], learned[:sequence_length].tolist()
    return {
        "input_ids": kept,
        "labels": [token if count else IGNORED for token, count in zip(kept, counts, strict=True)],
        "num_tokens": len(kept),
        "num_learned": sum(counts),
        "is_cut": len(tokens) > sequence_length,
        "is_blank": not example.spans,
    }
