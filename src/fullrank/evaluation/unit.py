"""One task that is checked and ready to run, what it runs on, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Evaluated:
    """A model on its device, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    batch_size: int
    """Sequences at once."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


@dataclass(frozen=True)
class Outcome:
    """What a task gave."""

    metrics: dict[str, float]
    """Values by name; shares are between 0 and 1."""
    metric: str
    """Name of the value that stands for the task."""
    num_examples: int
    stderr: dict[str, float] = field(default_factory=dict)
    """Standard errors of some of the metrics."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping in eval.json."""
    records: list[dict[str, Any]] | None = None
    """One row for each example, for a file of their own; None: none is kept."""


@dataclass(frozen=True)
class Unit:
    """One task: its data is found, its settings are sound, and it waits for a model."""

    task: str
    protocol: str
    """How answers are obtained, in a word."""
    settings: dict[str, Any]
    """What the number depends on beside the model and the data; the same for every task of a kind in one folder."""
    data: dict[str, Any]
    """``source``: where the examples come from; ``content``: a hash of them, if they are local."""
    run: Callable[[Evaluated], Outcome]
    prepare: Callable[[], object] = lambda: None
    """Fetch what the task needs; called before a model is loaded, unless the task is done already."""
    fit: Callable[[Evaluated], object] = lambda _: None
    """Check the data against the model and its tokenizer; called before it runs, unless the task is done already."""
    note: str = ""
    """What a reader of the number must know."""
