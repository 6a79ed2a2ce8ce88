"""A small tokenizer that merges across borders, chat templates, and rows in files, for tests of instruction data."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from fullrank.train.config import InstructionsConfig
from fullrank.train.data.tokenizer import train_bpe

MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that says what the assistant wrote; the end of its turn belongs to it, the line's end does not."""
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same without saying so."""
FORGETFUL = PLAIN.replace("message.content }}<|end|>{% else", "(message.content if loop.last else '') }}<|end|>{% else")
"""One that drops what the assistant said in earlier turns, as reasoning models' templates do."""
CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@cache
def _trained() -> str:
    """A vocabulary in which a space and a word, and a colon and a hyphen, are one token."""
    texts = ["Response: the answer is yes :- no\n", "the answer is no: yes :- the\n", "Say: the answer :- is\n\n"]
    return train_bpe(iter(texts * 20), vocab_size=285).backend_tokenizer.to_str()


def make_tokenizer(
    *, begins: bool = True, ends: bool = False, trims: bool = False, pads: bool = True, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE.

    Args:
        begins: Puts <s> in front of a text.
        ends: Puts </s> behind it.
        trims: Leaves spaces out of the offsets.
        pads: Has a padding token; else it is the end token.
        chat: The chat template.
    """
    backend = Tokenizer.from_str(_trained())
    parts = ["<s>"] * begins + ["$A"] + ["</s>"] * ends
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), template])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if pads else "</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = chat
    return tokenizer


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows in a file of the kind that its name says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "json":
            json.dump(list(rows), file, indent=1)
        elif kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def config_for(path: Path | str, **changes: Any) -> InstructionsConfig:
    return replace(InstructionsConfig(name=str(path)), **changes)


def make_rows(number: int) -> list[dict[str, str]]:
    """Different instructions, each other with an input."""
    return [
        {
            "instruction": f"Say {n}: the",
            "input": f"no {n}" if n % 2 else "",
            "output": f"answer is {n} {n % 7 * 'yes '}",
        }
        for n in range(number)
    ]


def learned(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The learned parts of an example, decoded; several where the prompt comes between."""
    parts: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            if before == -100:
                parts.append([])
            parts[-1].append(label)
        before = label
    return [tokenizer.decode(part) for part in parts]
