"""The text of a run: documents to learn from, and documents to score on.

The validation documents are set aside here, before a tokenizer is trained or a token is cut. They are a text of
their own (files, or a split of the hub dataset), taken as they are, or random documents carved out of the
training text: then a text that occurs twice goes to one side with its twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from fullrank.errors import ConfigError
from fullrank.train.config import PYTHON_DOCS, DataConfig
from fullrank.train.data.sources import (
    Source,
    find_source,
    find_validation,
    fingerprint,
    read_documents,
)

_CHARACTERS_PER_TOKEN = 4  # of English under common tokenizers: how much text to hold out for so many tokens


@dataclass(frozen=True)
class Text:
    """Documents to learn from and documents to score on."""

    train: Dataset | IterableDataset
    """One string column, `text`."""
    validation: Dataset
    """One string column, `text`: enough for the validation tokens, where there is so much."""
    key: str
    """Hash of where the text came from and what was held out: the name of everything cached from it."""
    description: str
    """One line for people."""


def load_text(config: DataConfig, *, cache_dir: Path) -> Text:
    """Read the documents of `config` and set the validation documents aside.

    Args:
        config: The data section of a run.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The text. Training documents are a stream if ``config.streaming``; validation never is.

    Raises:
        ConfigError: If the text cannot be found or read, has no such field, or leaves nothing to score on.
    """
    _check(config)
    source = find_source(config, cache_dir=cache_dir)
    held_out = _find_validation(config, source)
    train = read_documents(source, config, cache_dir=cache_dir, streaming=config.streaming)
    # the folders of a prepared hub dataset name its revision
    prepared = [] if config.streaming else [Path(file["filename"]).parts[-4:] for file in train.cache_files]
    key = fingerprint(source.stamp, prepared, config.text_field, config.streaming, held_out and held_out.stamp)
    if held_out is None:
        carved = (config.seed, config.validation_tokens, config.packing or config.sequence_length)
        key = fingerprint(key, carved)
        train, validation = _carve(train, config, source, cache_file=cache_dir / "text" / f"{key}.arrow")
        description = f"{source.name}, validation carved from it with seed {config.seed}"
    else:
        rows = read_documents(held_out, config, cache_dir=cache_dir, streaming=config.streaming)
        validation = _head(rows, config)
        description = f"{source.name}, validation {held_out.name if held_out.files else held_out.split}"
    return Text(train=train, validation=validation, key=key, description=description)


def load_scored_text(config: DataConfig, *, cache_dir: Path) -> Text:
    """Read the text of ``config.name`` to score on: nothing is carved out of it, and nothing is trained on.

    Args:
        config: The data section; of ``validation_tokens`` the beginning of the text is kept.
        cache_dir: Folder for what is prepared once and used again.

    Raises:
        ConfigError: If the text cannot be found or read, or has no such field.
    """
    _check(config)
    source = find_source(config, cache_dir=cache_dir)
    rows = read_documents(source, config, cache_dir=cache_dir, streaming=config.streaming)
    documents = _head(rows, config)
    key = fingerprint("scored", source.stamp, config.text_field, config.validation_tokens)
    return Text(train=documents.select([]), validation=documents, key=key, description=source.name)


def _find_validation(config: DataConfig, source: Source) -> Source | None:
    """The named validation text, or none if it is to be carved from the training text."""
    if config.validation is None:
        if config.streaming:
            raise ConfigError(
                "data.streaming cannot carve a validation set out of a stream, and data.validation is not set. "
                "Set it to a file, a folder, a glob or a split of the hub dataset, or data.streaming to false."
            )
        return None
    return find_validation(config.validation, config, source)


def _carve(documents: Dataset, config: DataConfig, source: Source, *, cache_file: Path) -> tuple[Dataset, Dataset]:
    """Take random documents out for validation: as much text as asked for, at most a tenth of the documents."""
    budget = _CHARACTERS_PER_TOKEN * config.validation_tokens
    order = np.random.default_rng(config.seed).permutation(len(documents))
    candidates = order[: max(1, len(documents) // 10)]
    held: dict[str, None] = {}  # an ordered set
    total = 0
    for index in candidates:
        text = documents[int(index)]["text"]
        if not text or not text.strip() or text in held:
            continue
        if not held or total + _scored(text, config) <= budget:
            held[text] = None
            total += _scored(text, config)
        if total >= 0.9 * budget:
            break
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    train = documents.filter(
        lambda texts: [text not in held for text in texts],  # by text: a repeated one goes with its twin
        input_columns="text",
        batched=True,
        cache_file_name=str(cache_file),
        new_fingerprint=cache_file.stem,
        desc="Setting the validation documents aside",
    )
    if not held or not len(train):
        raise ConfigError(
            f"{source.name} has {len(documents)} documents, too few to carve validation documents out of. Set "
            "data.validation to a file of its own, or split the text into more documents."
        )
    return train, _as_dataset(list(held))


def _head(rows: Dataset | IterableDataset, config: DataConfig) -> Dataset:
    """The first documents of a named validation text, enough for the validation tokens."""
    budget = 2 * _CHARACTERS_PER_TOKEN * config.validation_tokens  # ample: it takes nothing from training
    texts: list[str] = []
    total = 0
    for row in rows:
        if total >= budget:
            break
        text = row["text"]
        if text and text.strip():
            texts.append(text)
            total += _scored(text, config)
    return _as_dataset(texts)


def _scored(text: str, config: DataConfig) -> int:
    """How many characters of a document are scored, roughly: without packing its end is cut off."""
    return len(text) if config.packing else min(len(text), _CHARACTERS_PER_TOKEN * config.sequence_length)


def _as_dataset(texts: list[str]) -> Dataset:
    """Texts in memory as documents."""
    return Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")}))


def _check(config: DataConfig) -> None:
    """Refuse numbers that no text can satisfy, before any is read."""
    if not config.name:
        raise ConfigError(f"data.name must name a text, got ''. Set it to {PYTHON_DOCS}, a path or a hub name.")
    if config.sequence_length < 2:
        raise ConfigError(
            f"data.sequence_length must be at least 2 (a token and the one to predict), got "
            f"{config.sequence_length}. Raise it."
        )
    if config.validation_tokens < config.sequence_length:
        raise ConfigError(
            f"data.validation_tokens must be at least data.sequence_length ({config.sequence_length}), got "
            f"{config.validation_tokens}. Raise it."
        )
    if config.shuffle_buffer < 1:
        raise ConfigError(f"data.shuffle_buffer must be at least 1 (documents), got {config.shuffle_buffer}. Raise it.")
