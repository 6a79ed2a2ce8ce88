"""From options to a plan: its table, its numbers, its figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fullrank.analysis.figure import require_drawing
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.plan.advice import Largest, Suggestion, largest, suggestions, variants
from fullrank.plan.options import Budget, PlanOptions, budget_of, settings_of
from fullrank.plan.table import missing_library, option_of, terminal, where
from fullrank.plan.usage import Planner, Setting, Usage
from fullrank.train.config import plain
from fullrank.train.report import versions, write_whole

FORMAT = 1
"""Of the JSON."""


@dataclass(frozen=True)
class Row:
    """A method of a plan."""

    setting: Setting
    usage: Usage
    variants: dict[str, Usage]
    """What it needs with one thing changed; empty where nobody asked."""
    suggestions: list[Suggestion]
    """What to change where it does not fit."""
    largest: list[Largest]
    """How large batch, rank or density may be, with all that is suggested; empty where it does not fit so either."""


@dataclass(frozen=True)
class Plan:
    """What runs would need."""

    rows: dict[str, Row]
    """By method."""
    budget: Budget | None
    """Memory of the GPU that was given."""
    unfit: Mapping[str, str]
    """Methods that cannot train this model so, and why."""

    def __str__(self) -> str:
        return terminal(self.rows, self.budget, self.unfit)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was found, in plain values; all sizes in bytes."""
        first = next(iter(self.rows.values())).setting
        about = {
            "model": first.network.model.name,
            "parameters": first.network.whole.num_parameters(),
            "num_layers": first.network.num_layers,
            "vocab_size": first.network.config.vocab_size,
            "dtype": first.network.model.dtype,
        }
        gpu = None if self.budget is None else {**asdict(self.budget), "usable": self.budget.usable}
        methods = {name: _row(row, self.budget) for name, row in self.rows.items()}
        return {
            "format": FORMAT,
            **about,
            "gpu": gpu,
            "methods": methods,
            "unfit": dict(self.unfit),
            "missing": missing_library(self.rows),
            "versions": versions(),
        }


def plan(options: PlanOptions, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Plan, and write the files that are asked for.

    Args:
        options: What to plan.
        overrides: Dotted keys and values: settings of a run (``method.rank``), of one method (``fira.rank``).

    Raises:
        ConfigError: If an option is out of bounds, or method, network and options do not go together.
        UnsupportedError: If a figure is asked for and matplotlib is not installed.
    """
    budget = budget_of(options)
    _check_files(options)
    planner = Planner()
    rows, unfit = {}, dict[str, str]()
    for name, setting in settings_of(options, overrides).items():
        try:
            usage = planner.usage(setting)
        except (ConfigError, UnsupportedError) as error:
            unfit[name] = str(error)
            continue
        is_wanted = options.json is not None or options.figure is not None
        advice, limits = list[Suggestion](), list[Largest]()
        if budget is not None and usage.peak > budget.usable:
            advice = suggestions(planner, setting, budget.usable)
        fitting = advice[-1].setting if advice else setting
        if budget is not None and planner.usage(fitting).peak <= budget.usable:
            limits = largest(planner, fitting, budget.usable)
        rows[name] = Row(setting, usage, variants(planner, setting) if is_wanted else {}, advice, limits)
    if not rows:
        raise ConfigError("\n".join(f"{name}: {why}" for name, why in unfit.items()))
    found = Plan(rows, budget, unfit)
    try:
        if options.json is not None:
            write_whole(Path(options.json), json.dumps(found.to_dict(), indent=1) + "\n")
        if options.figure is not None:
            from fullrank.plan.draw import draw, write

            write(draw(rows, budget, str(found).split("\n", maxsplit=1)[0]), Path(options.figure))
    except OSError as error:
        raise ConfigError(f"the plan cannot be written: {error}. Choose another file.") from error
    return found


def _check_files(options: PlanOptions) -> None:
    """Check that what is asked for can be written, before any work is done for it."""
    for key in ("json", "figure"):
        value = getattr(options, key)
        if value is None:
            continue
        if Path(value).is_dir() or not Path(value).parent.is_dir() or not os.access(Path(value).parent, os.W_OK):
            raise ConfigError(f"{key} must be a file in a folder that can be written, got {value!r}. Change it.")
    if options.json is not None and options.json == options.figure:
        raise ConfigError(f"json and figure are the same file, {options.json}. Change one.")
    if options.figure is not None:
        require_drawing()


def _row(row: Row, budget: Budget | None) -> dict[str, Any]:
    setting, work = row.setting, row.setting.work
    return {
        "option": option_of(setting),
        "options": plain(asdict(work.options)),
        "batch_size": setting.batch_size,
        "sequence_length": work.sequence_length,
        "gradient_checkpointing": work.checkpointing,
        "fused_backward": work.fused_backward,
        "bf16": work.autocast,
        "accumulates": work.accumulates,
        "quantization": work.quantization,
        "gpus": setting.spread.gpus,
        "strategy": setting.spread.strategy,
        "fits": None if budget is None else row.usage.peak <= budget.usable,
        "usage": describe(row.usage),
        "variants": {name: describe(usage) for name, usage in row.variants.items()},
        "suggestions": [
            {
                "change": one.change.what,
                "how": one.change.how,
                "cost": one.change.cost,
                "harm": one.change.harm,
                "is_largest": one.change.is_largest,
                "saves": one.saves,
                "together": one.together,
            }
            for one in row.suggestions
        ],
        "largest": {one.name: one.value for one in row.largest},
    }


def describe(usage: Usage) -> dict[str, Any]:
    """Bytes of one setting in plain values."""
    held = asdict(usage.at_peak)
    return {
        "weights": usage.weights,
        "gradients": usage.gradients,
        "states": usage.states,
        "states_on_host": usage.states_on_host,
        "activations": usage.activations,
        "kept": usage.kept,
        "temporaries": usage.temporaries,
        "peak": usage.peak,
        "at_peak": held,
        "where": where(usage),
        "source": usage.source,
        "why": usage.why,
    }
