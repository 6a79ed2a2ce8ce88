"""The tokenizer of a run: one that exists, or a byte-level BPE trained on the run's own text.

A trained tokenizer sees training documents alone, never the validation documents. It is kept under the cache
folder by the hash of its text and size, so the next run on the same text loads it in milliseconds.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fullrank.errors import ConfigError, first_line
from fullrank.train.config import TRAINED, DataConfig
from fullrank.train.data.sources import fingerprint
from fullrank.train.data.text import load_text

logger = logging.getLogger(__name__)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

_SMALLEST_VOCABULARY = 256 + 3  # every byte, and the special tokens
_SAMPLE_CHARACTERS = 10_000_000  # more text hardly changes a vocabulary of this kind, and costs seconds


def load_tokenizer(config: DataConfig, *, cache_dir: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `config` names, or train one on its training text.

    Args:
        config: The data section of a run.
        cache_dir: Folder for what is prepared once and used again.

    Returns:
        A tokenizer with an end token and a padding token, which are the same token where it brought no padding
        token: padding is known by its position, never by its number.

    Raises:
        ConfigError: If it cannot be found, has no end token, or its size cannot work.
    """
    if config.tokenizer == TRAINED:
        folder = _trained(config, cache_dir=cache_dir)
        trained: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return trained
    return named_tokenizer(config.tokenizer, remedy=f"Set data.tokenizer to {TRAINED} or to a local folder.")


def named_tokenizer(
    name: str, *, remedy: str, revision: str | None = None, needs_end: bool = True
) -> PreTrainedTokenizerFast:
    """Load a tokenizer by its folder or hub name.

    Args:
        name: Folder or hub name.
        remedy: What to do if it cannot be used, as a sentence.
        revision: Branch, tag or commit on the hub; None: the main branch.
        needs_end: Refuse one without an end token.

    Raises:
        ConfigError: If it cannot be found or used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"tokenizer {name!r} is neither a folder with a tokenizer nor one the hub gives us: {reason} {remedy}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {name} has no fast version (a tokenizer.json). Save one there. {remedy}")
    if needs_end and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {name} has no end token, which a document or an answer ends with. Add eos_token to its "
            f"tokenizer_config.json. {remedy}"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {name} has neither a padding nor an end token to fill batches with. {remedy}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _trained(config: DataConfig, *, cache_dir: Path) -> Path:
    """Folder of the BPE of this text and size; trains it if there is none."""
    if config.vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size must be at least {_SMALLEST_VOCABULARY} (256 bytes and 3 special tokens), got "
            f"{config.vocab_size}. Raise it."
        )
    text = load_text(config, cache_dir=cache_dir)
    name = fingerprint(text.key, config.vocab_size, config.seed)
    folder = cache_dir / "tokenizers" / f"bpe-{config.vocab_size}-{name}"
    if folder.is_dir():
        return folder
    logger.info("training a tokenizer of %d tokens on %s", config.vocab_size, text.description)
    tokenizer = train_bpe(_sample(text.train, config), vocab_size=config.vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # saved aside and renamed: another process may be doing the same, and a crash leaves no half folder
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".bpe-"))
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # the other process was first, with the same tokenizer
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
    return folder


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text can be written in it, and decodes to itself.

    Args:
        texts: What to learn the merges from.
        vocab_size: Size to reach, the 256 bytes and 3 special tokens included (tokens).

    Returns:
        The tokenizer; smaller than asked for, with a warning, if the text has no more pairs to merge.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    if bpe.get_vocab_size() < vocab_size:
        logger.warning("data.vocab_size %d: the text has pairs for %d tokens only", vocab_size, bpe.get_vocab_size())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _sample(documents: Dataset | IterableDataset, config: DataConfig) -> Iterator[str]:
    """Yield training text to learn merges from: random documents, or the head of a shuffled stream."""
    if isinstance(documents, Dataset):
        order = np.random.default_rng(config.seed).permutation(len(documents))
        texts = (documents[int(index)]["text"] for index in order)
    else:
        stream = documents.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
        texts = (row["text"] for row in stream)
    total = 0
    for text in texts:
        if total >= _SAMPLE_CHARACTERS:
            return
        if text:
            total += len(text)
            yield text
