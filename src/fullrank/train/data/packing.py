"""Whole examples joined to sequences of one length, of which none sees another's tokens.

A batch tells its examples apart by ``position_ids`` that begin again at 0: from them transformers makes attention block
by block, in every row of a batch, as long as there is no ``attention_mask`` and no cache of keys and values. TRL's own
collator joins a batch to a single row, which the masks of ``sdpa`` and ``eager`` pay for with the square of the batch
size, and which a distributed evaluation cannot take apart again.

Packing is TRL's, best fit decreasing. An example keeps its tokens and their order; what is left of a row is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from fullrank.errors import UnsupportedError
from fullrank.train.data.prepared import IGNORED
from fullrank.train.data.sources import fingerprint

MULTIPLE = 8
"""Lengths of batches are rounded up to this, which matrix units like (tokens)."""


def pack(examples: Dataset, *, sequence_length: int, cache_file: Path) -> Dataset:
    """Join examples to rows of at most `sequence_length` tokens, or open the file if it is there.

    Args:
        examples: Columns ``input_ids`` and ``labels``, no example longer than `sequence_length`.
        sequence_length: Length of a row (tokens).
        cache_file: Where the rows are kept.

    Returns:
        Rows with ``input_ids``, ``labels``, and in ``seq_lengths`` the length of each example.

    Raises:
        UnsupportedError: If TRL is not installed.
    """
    if cache_file.is_file():  # without the seconds that the import of TRL takes
        return Dataset.from_file(str(cache_file))
    try:
        from trl.data_utils import pack_dataset
    except ImportError as error:
        raise UnsupportedError("data.packing needs TRL: pip install trl, or set data.packing to false.") from error
    packed: Dataset = pack_dataset(
        examples,
        seq_length=sequence_length,
        strategy="bfd",
        map_kwargs={
            "cache_file_name": str(cache_file),
            "new_fingerprint": fingerprint(cache_file.stem),
            "desc": "Packing the examples",
        },
    )
    return packed


@dataclass(frozen=True)
class PackedCollator:
    """Makes a batch of packed rows; plain data, so that worker processes can have it."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Stack rows into int64 tensors of shape (rows, length of the longest, rounded up).

        Args:
            rows: Rows of `pack`. The first label of an example must be -100: what stands before it is another's.

        Returns:
            ``input_ids``; ``labels``, -100 on padding; ``position_ids``, from 0 in each example, 0 on padding, so that
            each token of it is alone; and ``use_cache``, false, for a model that would keep a cache unasked.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // MULTIPLE) * MULTIPLE)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "use_cache": False,
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["labels"][index, :length] = torch.tensor(row["labels"])
            batch["position_ids"][index, :length] = torch.cat([torch.arange(n) for n in row["seq_lengths"]])
        return batch


@torch.no_grad()
def require_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which examples of one packed row see each other.

    Not every architecture, nor every attention kernel, tells examples apart by their positions; one that does not
    would learn from the wrong context without a word. So it is tried: what stands before an example must not matter.

    Raises:
        UnsupportedError: If it does change, or the model takes no positions.
    """
    vocabulary: int = model.config.vocab_size
    was_training = model.training
    model.eval()
    try:
        seconds = [_second_logits(model, [number % vocabulary for number in before]) for before in ((1, 2), (3, 4))]
    except TypeError as error:
        raise UnsupportedError(f"{_named(model)} takes no position_ids. Set data.packing to false.") from error
    finally:
        model.train(was_training)
    if not torch.equal(*seconds):
        raise UnsupportedError(
            f"{_named(model)} lets packed examples see one another. Set data.packing to false, or "
            "model.attn_implementation to sdpa."
        )


def _second_logits(model: PreTrainedModel, first: list[int]) -> Tensor:
    """Logits of an example behind the example `first`, in a batch of two equal rows."""
    second = [0, 1, 0, 1]
    row = {"input_ids": first + second, "labels": first + second, "seq_lengths": [len(first), len(second)]}
    batch = PackedCollator(0)([row, row])
    places = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits: Tensor = model(**places, use_cache=batch["use_cache"]).logits
    return logits[:, len(first) : len(row["input_ids"])]


def _named(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} with attn_implementation {model.config._attn_implementation}"
