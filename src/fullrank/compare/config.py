"""What a comparison can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fullrank.methods import METHODS

FOR_ALL = "all"
"""The key of a learning-rate grid that holds for every method without one of its own."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of ``fullrank compare``."""

    config: str | None = None
    """A packaged recipe (`fullrank recipes`) or a YAML file: model, data and trainer of every run; null: quickstart."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Methods to compare; LABEL=METHOD names a variant, such as fira-svd=fira, with options --fira-svd.basis svd."""
    lr_grid: dict[str, Any] = field(default_factory=dict)
    """Peak learning rates, for all methods or as --lr_grid.LABEL; default: half, once and twice that of the recipe."""
    extend_grid: int = 2
    """Rates to add at most, one by one, where the best one lies at an end of a grid (each twice or half the last)."""
    seeds: list[int] = field(default_factory=list)
    """Seeds: the grid runs with the first, the best rate again with each further one; none: the recipe's seed."""
    early_stop: float | None = 0.5
    """End a rate whose validation loss is so much above that of the method's best at the same step (nats); null: never.

    It is looked at from a third of the run on.
    """
    jobs: int | None = None
    """Runs at a time; null: one for each GPU, or one on the CPU."""
    keep_models: Literal["best", "all", "none"] = "best"
    """Whose trained weights stay: those of each method's best rate, of all runs, or of none; checkpoints never do."""
    title: str | None = None
    """Title of the report; null: model and data."""
    output_dir: str | None = None
    """Folder of the comparison; one that holds the same comparison goes on. null: runs/compare-N."""
    dry_run: bool = False
    """Say which runs there would be, and stop."""
