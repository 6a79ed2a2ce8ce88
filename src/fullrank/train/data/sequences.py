"""Documents to token sequences: packed to equal lengths, or one padded document each.

Packed, the default: each document's tokens and the end token are joined and cut into sequences of
``sequence_length``. This is done for 1,000 documents at a time and the tail of each such block is dropped,
half a sequence on average, so that a stream and a dataset on disk give the same sequences and a stream can be
read by several workers and resumed by replay.

Padded, as the authors of ReLoRA, GaLore and Fira prepare C4: each document is cut to ``sequence_length``, the
end token last, and padded on the right. Labels and attention leave padding out by its position; theirs by its
number, which would hide a real end token from a model whose padding token it is.

Attention may look across the documents of a packed sequence. A dataset on disk is shuffled by the trainer's
sampler, a stream here. On disk a token takes 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.config import DataConfig
from fullrank.train.data.prepared import IGNORED, Data
from fullrank.train.data.sources import fingerprint
from fullrank.train.data.text import load_scored_text, load_text
from fullrank.train.data.token_mean import TOKEN_MEAN

_BLOCK = 1_000  # documents that are packed together
_ROW = Features({"input_ids": List(Value("int32"))})
_COMPARED = 256  # sequences at each end that tell one text from another
_FORMAT = 1  # of the cached sequences: raise it when the same text would give others


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows ``{"input_ids": [...]}``; plain data, so that worker processes can have it."""

    sequence_length: int
    pad_token_id: int
    packing: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack rows into int64 tensors of shape (rows, sequence_length).

        Args:
            rows: Token sequences, as lists or arrays; equally long when packed, at most `sequence_length` when not.

        Returns:
            ``input_ids`` and ``labels``, equal when packed; when not, padded with -100 in the labels, and with
            ``attention_mask``, 1 on tokens and 0 on padding.
        """
        if self.packing:
            stacked = numpy.stack([numpy.asarray(row["input_ids"], dtype=numpy.int64) for row in rows])
            input_ids = torch.from_numpy(stacked)
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        shape = (len(rows), self.sequence_length)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            input_ids[index, : len(tokens)] = tokens
            labels[index, : len(tokens)] = tokens
            attention_mask[index, : len(tokens)] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, cache_dir: Path) -> Data:
    """Read the text of `config` and turn it into training and validation sequences.

    What is on disk is prepared once under `cache_dir` and found again by the hash of the text, the tokenizer
    and the settings.

    Args:
        config: The data section of a run.
        tokenizer: A tokenizer with an end and a padding token, as `load_tokenizer` gives it.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The sequences and their collator.

    Raises:
        ConfigError: If the text cannot be found or read, or is too little for one sequence.
    """
    text = load_text(config, cache_dir=cache_dir)
    encode = partial(_pack if config.packing else _cut, tokenizer=tokenizer, sequence_length=config.sequence_length)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = fingerprint(_FORMAT, text.key, vocabulary, tokenizer.eos_token, config.sequence_length, config.packing)
    folder = cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    cache_file = folder / f"{key}-validation-{config.validation_tokens}.arrow"
    validation = _limit(_sequences(text.validation, encode, cache_file=cache_file), config)
    num_train_tokens = None
    if config.streaming:
        train = _stream(text.train, encode, config)
        size = "a stream of training text"
    else:
        train = _sequences(text.train, encode, cache_file=folder / f"{key}-train.arrow")
        _require(len(train) > 0, config, part="training")
        num_train_tokens = _count_tokens(train, config)
        size = f"{num_train_tokens:,} training tokens in {len(train):,} sequences"
    # Arrays in place of lists of Python's numbers: a batch is made in a fraction of the time.
    arrays = train if isinstance(train, IterableDataset) else train.with_format("numpy")
    return Data(
        train=arrays,
        validation=validation,
        collate=Collator(config.sequence_length, tokenizer.pad_token_id, config.packing),
        description=f"{text.description}: {size}, {len(validation):,} validation sequences",
        num_train_tokens=num_train_tokens,
        content_hash=fingerprint(vocabulary, *_ends(validation), *([] if config.streaming else _ends(train))),
        scoring=TOKEN_MEAN,
        padded=not config.packing,
    )


def load_scored(config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, cache_dir: Path) -> Data:
    """Turn the text of ``config.name`` into sequences to score on, with an empty ``train``.

    Args:
        config: The data section; ``validation_tokens`` limits the size, of the beginning of the text.
        tokenizer: A tokenizer with an end and a padding token.
        cache_dir: Folder for what is prepared once and used again.

    Raises:
        ConfigError: If the text cannot be found or read, or is too little for one sequence.
    """
    text = load_scored_text(config, cache_dir=cache_dir)
    encode = partial(_pack if config.packing else _cut, tokenizer=tokenizer, sequence_length=config.sequence_length)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = fingerprint(_FORMAT, text.key, vocabulary, tokenizer.eos_token, config.sequence_length, config.packing)
    (cache_dir / "tokens").mkdir(parents=True, exist_ok=True)
    sequences = _sequences(text.validation, encode, cache_file=cache_dir / "tokens" / f"{key}-scored.arrow")
    validation = _limit(sequences, config)
    return Data(
        train=validation.select([]),
        validation=validation,
        collate=Collator(config.sequence_length, tokenizer.pad_token_id, config.packing),
        description=f"{text.description}: {len(validation):,} sequences",
        num_train_tokens=0,
        content_hash=fingerprint(vocabulary, *_ends(validation)),
        scoring=TOKEN_MEAN,
        padded=not config.packing,
    )


def _ends(sequences: Dataset) -> list[object]:
    """How many sequences there are, and the first and last of them."""
    number = min(_COMPARED, len(sequences))
    return [len(sequences), sequences[:number]["input_ids"], sequences[-number:]["input_ids"]]


def _tokens(texts: list[str | None], *, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Tokens of each document that has any text, without special tokens."""
    documents = [text for text in texts if text and text.strip()]
    if not documents:
        return []
    # a document that spells out "</s>" must not end itself: special tokens are for us to place
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    input_ids: list[list[int]] = encoded["input_ids"]
    return input_ids


def _pack(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> dict[str, list[list[int]]]:
    """Join documents with the end token and cut the whole into equal sequences; the tail is dropped."""
    joined: list[int] = []
    for tokens in _tokens(batch["text"], tokenizer=tokenizer):
        joined.extend(tokens)
        joined.append(tokenizer.eos_token_id)
    starts = range(0, len(joined) - sequence_length + 1, sequence_length)
    return {"input_ids": [joined[start : start + sequence_length] for start in starts]}


def _cut(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> dict[str, list[list[int]]]:
    """Cut each document to one sequence, the end token last."""
    documents = _tokens(batch["text"], tokenizer=tokenizer)
    return {"input_ids": [[*tokens[: sequence_length - 1], tokenizer.eos_token_id] for tokens in documents]}


def _sequences(documents: Dataset, encode: partial[dict[str, list[list[int]]]], *, cache_file: Path) -> Dataset:
    """Encode documents into a file of sequences, or open the file if it is there."""
    return documents.map(
        encode,
        batched=True,
        batch_size=_BLOCK,
        remove_columns=["text"],
        features=_ROW,
        cache_file_name=str(cache_file),
        new_fingerprint=fingerprint(cache_file.stem),  # hashing the tokenizer anew would be slow and unstable
        desc="Encoding the text",
    )


def _stream(
    documents: IterableDataset, encode: partial[dict[str, list[list[int]]]], config: DataConfig
) -> IterableDataset:
    """Encode a stream as it is read, in an order shuffled by ``config.seed`` and the epoch."""
    settings = {"batched": True, "batch_size": _BLOCK, "remove_columns": ["text"], "features": _ROW}
    # the unshuffled stream tells this without filling the shuffle buffer
    _require(any(True for _ in documents.map(encode, **settings)), config, part="training")
    shuffled = documents.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
    return shuffled.map(encode, **settings)


def _limit(validation: Dataset, config: DataConfig) -> Dataset:
    """Keep the first sequences, up to ``config.validation_tokens``."""
    total = kept = 0
    for row in validation:
        total += len(row["input_ids"])
        if total > config.validation_tokens:
            break
        kept += 1
    _require(kept > 0, config, part="validation")
    return validation.select(range(kept))


def _count_tokens(sequences: Dataset, config: DataConfig) -> int:
    """Tokens in all sequences."""
    if config.packing:
        return len(sequences) * config.sequence_length
    return sum(len(tokens) for batch in sequences.iter(_BLOCK) for tokens in batch["input_ids"])


def _require(enough: bool, config: DataConfig, *, part: str) -> None:
    """Refuse text that does not fill one sequence."""
    if not enough:
        remedy = "give more text" if part == "training" else "name a larger text in data.validation"
        raise ConfigError(
            f"the {part} text of {config.name} is shorter than one sequence of data.sequence_length "
            f"({config.sequence_length} tokens). Lower data.sequence_length or {remedy}."
        )
