"""Fine-tuning examples for causal language models, from files or the hub: prepared, cached, counted and batched.

How rows are read and checked is in `instruction_rows`, how they are written as texts in `instruction_texts`, what is
learned of the texts in `instruction_tokens`, and how examples share a sequence in `packing`.

Examples with nothing to learn are left out, counted and reported: those with an empty answer, of which published data
has some, and those whose prompt fills the whole sequence. A row that is not as its format wants it is an error.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.train.config import InstructionsConfig
from fullrank.train.data.instruction_rows import Rows, read_rows
from fullrank.train.data.instruction_texts import Writer, recognise_format
from fullrank.train.data.instruction_tokens import ENCODED, Encoder
from fullrank.train.data.packing import MULTIPLE, PackedCollator, pack
from fullrank.train.data.prepared import IGNORED, Data
from fullrank.train.data.prompts import CHAT
from fullrank.train.data.sources import find_source, find_validation, fingerprint
from fullrank.train.data.token_mean import TOKEN_MEAN

logger = logging.getLogger(__name__)

_BATCH = 1_000  # rows that are encoded together
_FORMAT = 1  # of the cached examples: raise it when the same rows would give others

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class _Examples:
    """The examples of one part of the data, and what became of its rows."""

    dataset: Dataset
    format: str
    num_examples: int
    num_tokens: int
    num_cut: int
    num_left_out: int

    def __str__(self) -> str:
        text = f"{self.num_examples:,} examples of {self.num_tokens:,} tokens"
        return f"{text}, {self.num_cut:,} of them cut, {self.num_left_out:,} left out"


def load_instructions(config: InstructionsConfig, tokenizer: PreTrainedTokenizerFast, *, cache_dir: Path) -> Data:
    """Read the rows of `config` and turn them into training and validation examples.

    What is prepared is kept under `cache_dir` and found again by the hash of the rows, the tokenizer and the settings.

    Args:
        config: The data section of a run.
        tokenizer: The tokenizer; it must have an end token.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        The examples and their collator.

    Raises:
        ConfigError: If the rows cannot be found or read, one of them is not as its format wants it, or nothing is to be
            learned from any.
    """
    _check(config, tokenizer)
    source = find_source(config, cache_dir=cache_dir)
    held_out = find_validation(config.validation, config, source) if config.validation else None
    rows = read_rows(source, cache_dir=cache_dir)
    chosen, carved = _choose(len(rows.table), config, name=rows.name)
    train = _prepare(rows, chosen, config, tokenizer, cache_dir=cache_dir)
    if train.format != "instruction" and config.prompt_template != InstructionsConfig.prompt_template:
        logger.warning("data.prompt_template has no effect on the format %s of %s", train.format, rows.name)
    validation, told = None, "no validation"
    if held_out is not None:
        rows = read_rows(held_out, cache_dir=cache_dir)
        validation = _prepare(rows, None, config, tokenizer, cache_dir=cache_dir)
        told = f"validation {rows.name}: {validation}"
    elif carved is not None:
        validation = _prepare(rows, carved, config, tokenizer, cache_dir=cache_dir)
        told = f"validation carved with seed {config.seed}: {validation}"
    parts = [part.dataset for part in (train, validation) if part]
    return Data(
        train=train.dataset,
        validation=validation.dataset if validation else None,
        collate=_collator(tokenizer, packing=config.packing),
        description=f"{config.name} ({train.format}): {train}; {told}",
        num_train_tokens=train.num_tokens,
        content_hash=fingerprint(tokenizer.backend_tokenizer.to_str(), *map(_digest, parts)),
        scoring=TOKEN_MEAN,
        padded=not config.packing,
        prompt_template={"instruction": config.prompt_template, "messages": CHAT}.get(train.format),
    )


def _choose(number: int, config: InstructionsConfig, *, name: str) -> tuple[Numbers | None, Numbers | None]:
    """Which rows train and which validate, of `number`; None: all, and none.

    Validation is drawn first, so that `max_examples` does not change it.
    """
    size = 0 if config.validation else config.validation_size
    if size >= number:
        raise ConfigError(
            f"data.validation_size must leave an example to train on: at most {number - 1} of the {number} of {name}, "
            f"got {size}. Lower it."
        )
    if not size and (config.max_examples is None or config.max_examples >= number):
        return None, None
    order = np.random.default_rng(config.seed).permutation(number)
    training = np.sort(order[size:][: config.max_examples])
    return training, np.sort(order[:size]) if size else None


def _prepare(
    rows: Rows,
    chosen: Numbers | None,
    config: InstructionsConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache_dir: Path,
) -> _Examples:
    """Encode rows, leave out those with nothing to learn, and pack the rest if asked to."""
    writer = Writer(recognise_format(rows, config), config, tokenizer)
    folder = cache_dir / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(rows, chosen, writer)
    table = rows.table.select_columns(rows.columns(writer.fields))
    encoded = (table if chosen is None else table.select(chosen)).map(
        Encoder(rows, writer, chosen, config.sequence_length),
        with_indices=True,
        batched=True,
        batch_size=_BATCH,
        remove_columns=table.column_names,
        features=ENCODED,
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=fingerprint(key),  # hashing the tokenizer anew would be slow and unstable
        desc="Encoding the examples",
    )
    told = encoded.select_columns(["num_tokens", "num_learned", "is_cut", "is_blank"]).with_format("numpy")[:]
    kept = _leave_out(told, rows, chosen, config)
    examples = (encoded if kept.all() else encoded.select(np.flatnonzero(kept))).select_columns(["input_ids", "labels"])
    if config.packing:
        cache_file = folder / f"{key}-packed.arrow"
        examples = pack(examples, sequence_length=config.sequence_length, cache_file=cache_file)
    return _Examples(
        dataset=examples,
        format=writer.format,
        num_examples=int(kept.sum()),
        num_tokens=int(told["num_tokens"][kept].sum()),
        num_cut=int(told["is_cut"][kept].sum()),
        num_left_out=int((~kept).sum()),
    )


def _leave_out(
    told: dict[str, NDArray[Any]], rows: Rows, chosen: Numbers | None, config: InstructionsConfig
) -> NDArray[np.bool_]:
    """Which examples have something to learn; says how many have not, and why."""
    kept: NDArray[np.bool_] = told["num_learned"] > 0
    if kept.all():
        return kept
    first = int(np.argmin(kept))
    num_blank = int(told["is_blank"].sum())
    reasons = (
        f"{num_blank:,} with an empty answer, {int((~kept).sum()) - num_blank:,} whose prompt fills "
        f"data.sequence_length ({config.sequence_length} tokens)"
    )
    if not kept.any():
        raise ConfigError(f"{rows.name} has nothing to learn: {reasons}. Give answers, or raise data.sequence_length.")
    place = rows.place(first if chosen is None else int(chosen[first]))
    logger.warning(
        "%s: %d of %d examples are left out, the first %s: %s", rows.name, (~kept).sum(), len(kept), place, reasons
    )
    return kept


def _key(rows: Rows, chosen: Numbers | None, writer: Writer) -> str:
    """Name of what is cached: the hash of all that the examples are made from."""
    config, tokenizer = writer.config, writer.tokenizer
    settings = (config.prompt_template, config.text_field, config.train_on_inputs, config.sequence_length)
    vocabulary = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template)
    numbers = None if chosen is None else chosen.tolist()
    return fingerprint(_FORMAT, rows.key, numbers, writer.format, *settings, *vocabulary)


def _collator(tokenizer: PreTrainedTokenizerFast, *, packing: bool) -> Any:
    """What makes batches: padded on the right, where the attention mask and the labels tell padding by its place."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if packing:
        return PackedCollator(tokenizer.pad_token_id)
    return DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=MULTIPLE, label_pad_token_id=IGNORED)


def _digest(examples: Dataset) -> str:
    """Hash of all examples in their order."""
    digest = hashlib.sha256()
    for batch in examples.select_columns(["input_ids", "labels"]).with_format("arrow").iter(10 * _BATCH):
        for column in batch.columns:
            tokens = column.combine_chunks()
            digest.update(tokens.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(tokens.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _check(config: InstructionsConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse settings that no data can satisfy, before any is read."""
    if not config.name:
        raise ConfigError("data.name must name examples, got ''. Set it to a file, a folder, a glob or a hub dataset.")
    if config.sequence_length < 2:
        raise ConfigError(
            f"data.sequence_length must be at least 2 (a token and the one to predict), got {config.sequence_length}. "
            "Raise it."
        )
    if config.validation_size < 0:
        raise ConfigError(f"data.validation_size must be at least 0, got {config.validation_size}. Raise it.")
    if config.max_examples is not None and config.max_examples < 1:
        raise ConfigError(
            f"data.max_examples must be at least 1, got {config.max_examples}. Raise it, or leave it out."
        )
    if config.validation and config.validation_size:
        logger.warning("data.validation_size has no effect: data.validation is %s", config.validation)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no end token to end an answer with. Add eos_token to its "
            "tokenizer_config.json."
        )
