"""A task of GLUE as data of a run: examples to tokens, labels to numbers, and the metrics that score them.

The two texts of a pair are cut together, the longer one first, to ``sequence_length`` with the tokenizer's special
tokens; a batch is padded to its longest example. Encoded examples are kept under the cache folder by the hash of
what they were made from.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.config import GlueConfig
from fullrank.train.data.glue_metrics import find_metrics, make_scoring
from fullrank.train.data.glue_rows import Examples, find_train, find_validation, read_examples
from fullrank.train.data.glue_tasks import TASKS, GlueTask
from fullrank.train.data.prepared import Data
from fullrank.train.data.sources import Source, fingerprint

__all__ = ["TASKS", "GlueTask", "load_glue", "load_glue_validation"]

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the cached examples: raise it when the same examples would give others
_BLOCK = 1_000  # examples that are encoded together


def load_glue(config: GlueConfig, tokenizer: PreTrainedTokenizerFast, *, cache_dir: Path) -> Data:
    """Read a task of GLUE and encode its training and validation examples.

    Args:
        config: The data section of a run.
        tokenizer: The model's, with a padding token.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The examples; ``labels`` are int64, of STS-B float32. The validation set of MNLI is its matched set and then its
        mismatched one.

    Raises:
        ConfigError: If the examples cannot be found or read, or a setting cannot work.
    """
    if config.max_examples is not None and config.max_examples < 1:
        raise ConfigError(f"data.max_examples must be at least 1 or null, got {config.max_examples}. Raise it.")
    held_out = load_glue_validation(config, tokenizer, cache_dir=cache_dir)
    task = TASKS[config.task]
    source = find_train(config)
    _refuse_overlap(source, config)
    examples = _choose(read_examples(source, task, cache_dir=cache_dir), config)
    train, key = _encode(examples, config, tokenizer, part="training", cache_dir=cache_dir)
    num_tokens = sum(len(tokens) for batch in train.iter(_BLOCK) for tokens in batch["input_ids"])
    return replace(
        held_out,
        train=train,
        description=f"{held_out.description}, {len(train):,} training examples of {num_tokens:,} tokens",
        num_train_tokens=num_tokens,
        content_hash=fingerprint(held_out.content_hash, key),
    )


def load_glue_validation(config: GlueConfig, tokenizer: PreTrainedTokenizerFast, *, cache_dir: Path) -> Data:
    """Encode the validation examples of a task alone; the training examples are not looked for.

    Args:
        config: The data section of a run.
        tokenizer: The model's, with a padding token.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        What `load_glue` gives, but with an empty ``train``.

    Raises:
        ConfigError: If the examples cannot be found or read, or a setting cannot work.
    """
    task = TASKS[config.task]
    _check(config, tokenizer)
    find_metrics(task.metrics)  # a package that is missing is told before anything is read
    parts = [(suffix, read_examples(source, task, cache_dir=cache_dir)) for suffix, source in find_validation(config)]
    joined = _join([examples for _, examples in parts])
    validation, key = _encode(joined, config, tokenizer, part="validation", cache_dir=cache_dir)
    return Data(
        train=validation.select([]),
        validation=validation,
        collate=DataCollatorWithPadding(tokenizer),
        description=f"{config.name}, {task.folder}: {len(validation):,} validation examples",
        num_train_tokens=0,
        content_hash=key,
        scoring=make_scoring(task, joined.labels, [(suffix, len(examples.labels)) for suffix, examples in parts]),
        padded=True,
        label_names=task.label_names,
    )


def _check(config: GlueConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse settings that no examples can satisfy, before any is read."""
    num_texts = len(TASKS[config.task].text_fields)
    least = tokenizer.num_special_tokens_to_add(pair=num_texts == 2) + num_texts
    if config.sequence_length < least:
        raise ConfigError(
            f"data.sequence_length must be at least {least} (special tokens, and one of each text), got "
            f"{config.sequence_length}. Raise it."
        )
    if config.sequence_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.sequence_length is {config.sequence_length}, the tokenizer's model takes at most "
            f"{tokenizer.model_max_length} tokens. Lower it."
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has no padding token. Add pad_token to its tokenizer_config.json.")


def _refuse_overlap(train: Source, config: GlueConfig) -> None:
    """Refuse to score on what is trained on."""
    for _, source in find_validation(config):
        if source.files == train.files and (source.files or source.split == train.split):
            raise ConfigError(
                f"data.validation {config.validation} is the training set: the model would be scored on what it "
                "learned from. Name another, or leave it out for the task's own."
            )


def _choose(examples: Examples, config: GlueConfig) -> Examples:
    """At most ``config.max_examples`` of them, chosen by ``config.seed``, in the order they had."""
    total = len(examples.labels)
    if config.max_examples is None or config.max_examples >= total:
        return examples
    order = np.random.default_rng(config.seed).permutation(total)
    kept = sorted(order[: config.max_examples].tolist())
    texts = tuple([column[index] for index in kept] for column in examples.texts)
    return Examples(texts, [examples.labels[index] for index in kept])


def _join(parts: list[Examples]) -> Examples:
    """All of them, one after another."""
    columns = zip(*(part.texts for part in parts), strict=True)
    labels: list[Any] = [label for part in parts for label in part.labels]
    return Examples(tuple(list(chain(*column)) for column in columns), labels)


def _encode(
    examples: Examples, config: GlueConfig, tokenizer: PreTrainedTokenizerFast, *, part: str, cache_dir: Path
) -> tuple[Dataset, str]:
    """Encode examples into a file, or open the file if it is there; with the hash of all that they depend on."""
    columns = {f"text{index}": column for index, column in enumerate(examples.texts)}
    length, names = config.sequence_length, list(tokenizer.model_input_names)
    key = fingerprint(
        _FORMAT,
        tokenizer.backend_tokenizer.to_str(),
        names,
        tokenizer.truncation_side,
        length,
        columns,
        examples.labels,
    )
    kinds = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
    if "token_type_ids" in names:
        kinds["token_type_ids"] = List(Value("int8"))
    label = Value("float32" if TASKS[config.task].is_regression else "int64")
    folder = cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    encoded = Dataset.from_dict({**columns, "labels": examples.labels}).map(
        # a copy: encoding leaves its truncation behind in the tokenizer, which is saved with the model
        partial(_tokenize, tokenizer=copy.deepcopy(tokenizer), names=tuple(kinds), length=length),
        batched=True,
        batch_size=_BLOCK,
        remove_columns=list(columns),
        features=Features({**kinds, "labels": label, "truncated": Value("bool")}),
        cache_file_name=str(folder / f"glue-{key}.arrow"),
        new_fingerprint=fingerprint("glue", key),  # hashing the tokenizer anew would be slow and unstable
        desc=f"Encoding the {part} examples",
    )
    num_truncated = sum(encoded["truncated"][:])
    if num_truncated:
        logger.info(
            "%d of %d %s examples are longer than data.sequence_length (%d tokens) and were cut",
            num_truncated,
            len(encoded),
            part,
            length,
        )
    return encoded.remove_columns("truncated"), key


def _tokenize(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...], length: int
) -> dict[str, list[Any]]:
    """Tokens of one or two texts an example, with the tokenizer's special tokens; and whether they were cut."""
    encoded = tokenizer(
        *(batch[name] for name in ("text0", "text1") if name in batch),
        truncation="longest_first",
        max_length=length,
        return_attention_mask=True,
        return_token_type_ids="token_type_ids" in names,
        split_special_tokens=True,  # a text that spells out a special token must not act as one
        verbose=False,
    )
    truncated = [bool(encoding.overflowing) for encoding in encoded.encodings]
    return {**{name: encoded[name] for name in names}, "labels": batch["labels"], "truncated": truncated}
