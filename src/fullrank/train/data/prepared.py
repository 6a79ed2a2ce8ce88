"""What a run trains and is scored on, once its data is prepared: the same for text, instructions and GLUE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import EvalPrediction

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Scoring:
    """How a model is scored on the validation set."""

    compute: Callable[[EvalPrediction], dict[str, float]]
    """Metrics by name, from what `condense` kept of all batches; ``loss`` is among them (nats, or squared error)."""
    condense: Callable[[Any, Tensor], Tensor] | None
    """What to keep of a batch's logits, given its labels; None: the logits."""
    metric: str
    """The metric that says which model is best, unless told otherwise."""
    metrics: tuple[str, ...]
    """Every metric of ``compute``; of ``loss`` and ``perplexity`` less is better, of all others more."""


@dataclass(frozen=True)
class Data:
    """Prepared training and validation examples, how to batch them, and how a model is scored on them."""

    train: Dataset | IterableDataset
    """Training examples, with no columns but those that `collate` reads; a stream, already shuffled, if streamed."""
    validation: Dataset | None
    """Validation examples, the same in every run with the same data section and tokenizer; None: there are none."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    """The data collator for both."""
    description: str
    """One line for people."""
    num_train_tokens: int | None
    """Tokens in one pass over `train`, padding not counted; unknown for a stream."""
    content_hash: str
    """Hash of the tokenizer and of the examples at both ends: other data has another."""
    scoring: Scoring
    """How a model is scored on `validation`."""
    padded: bool
    """Whether batches hold padding, told by their ``attention_mask``."""
    prompt_template: str | None = None
    """How instructions were put to the model; None: there are none, or they stand in the data as they are."""
    label_names: tuple[str, ...] = ()
    """Names of the classes of a classification task; a single one: regression; none: a language-model task."""
