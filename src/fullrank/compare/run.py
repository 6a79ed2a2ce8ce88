"""A comparison from its options to its report."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from fullrank.analysis.figure import require_drawing
from fullrank.compare.config import CompareConfig
from fullrank.compare.sweep import Sweep
from fullrank.compare.variants import Spec, Variant, make_variants
from fullrank.errors import CheckpointError, ConfigError
from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.runs import read_run
from fullrank.report.write import write_report
from fullrank.train.config import GlueConfig, InstructionsConfig
from fullrank.train.folders import refuse_unusable
from fullrank.train.report import num_processes, write_whole

logger = logging.getLogger(__name__)

OPTIONS = "compare.yaml"
"""The options of a comparison, in its folder."""
LOCK = "lock"
"""Held by a comparison at work, and by its runs; the first file in its folder."""


def compare(config: CompareConfig, overrides: Mapping[str, Any] | None = None) -> Comparison | None:
    """Train every method at its grid of learning rates, and leave a report behind.

    The folder holds ``runs/`` (an ordinary run folder each), ``logs/`` and the report. Called again with the same
    folder, and the same options or more methods, rates or seeds, it goes on: runs that have ended are not repeated.

    Args:
        config: Options of the comparison.
        overrides: Settings of its runs, as `make_variants` takes them.

    Returns:
        The comparison, or None if it was stopped before its end, or if only the plan was asked for.

    Raises:
        ConfigError: If an option cannot work, or a run refuses its configuration.
        CheckpointError: If the folder holds runs with other settings, or another process is at work in it.
    """
    if num_processes() > 1:
        raise ConfigError("compare starts a process for each run itself. Call it without torchrun.")
    require_report()
    overrides = dict(overrides or {})
    variants = make_variants(config, overrides)
    seeds = config.seeds or [variants[0].config.seed]
    refuse_without_scores(variants)
    folder = find_folder(config)
    logger.info("%s", plan(variants, seeds))
    if config.dry_run:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        sweep = Sweep(variants, seeds, folder, config, keep_open=lock, greater_is_better=greater_is_better(variants[0]))
        sweep.wanted()  # refuses what is there of other settings before anything is written
        for name in ("runs", "logs"):
            (folder / name).mkdir(exist_ok=True)
        write_whole(folder / OPTIONS, yaml.safe_dump(anchored_options(config, overrides, variants), sort_keys=False))
        if not sweep.run():
            logger.warning("stopped; go on with: fullrank compare --resume %s", folder)
            return None
        comparison = make_comparison(config, sweep)
        clear(comparison, sweep)
        write_report(comparison, folder)
    return comparison


def require_report() -> None:
    """Check that a report can be made, before hours of training for it.

    Raises:
        ModuleNotFoundError, UnsupportedError: If a package of the extra ``report`` is missing.
    """
    import jinja2  # noqa: F401
    import plotly  # noqa: F401

    require_drawing()


def load_options(folder: str | Path) -> tuple[CompareConfig, dict[str, Any]]:
    """The options of the comparison in a folder and the settings of its runs, to go on with it.

    Raises:
        ConfigError: If it holds no comparison.
        CheckpointError: If its compare.yaml cannot be read.
    """
    path = Path(folder) / OPTIONS
    if not path.is_file():
        raise ConfigError(f"{folder} is not the folder of a comparison: it has no {OPTIONS}. Start it anew.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        overrides = dict(content.pop("overrides"))
        for name, kind in (("methods", list), ("seeds", list), ("lr_grid", dict)):
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} must be a {kind.__name__}")
        return CompareConfig(**content | {"output_dir": str(folder)}), overrides
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Give the options of the comparison again.") from None


def find_folder(config: CompareConfig) -> Path:
    """The folder asked for, new or of a comparison, or the first free ``runs/compare-N``; nothing is made yet."""
    if config.output_dir is None:
        number = 1
        while (folder := Path("runs") / f"compare-{number}").exists():
            number += 1
        return folder
    folder = Path(config.output_dir)
    known = (folder / OPTIONS).is_file() or (folder / LOCK).is_file()
    refuse_unusable(folder, remedy="It holds no comparison: choose another.", may_hold_files=known)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep other comparisons out of a folder; yields the lock, which lives as long as any run that inherits it.

    Raises:
        CheckpointError: If another one is at work in it.
    """
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(
            f"a comparison, or a run that one left behind, is at work in {folder}. Wait for its end, or end it."
        ) from None
    else:
        yield lock
    finally:
        os.close(lock)


def refuse_without_scores(variants: list[Variant]) -> None:
    """Check that there is something to choose a rate by.

    Raises:
        ConfigError: If there are no validation examples, and a choice to make.
    """
    data = variants[0].config.data
    unscored = isinstance(data, InstructionsConfig) and data.validation is None and data.validation_size == 0
    if unscored and any(len(variant.rates) > 1 for variant in variants):
        raise ConfigError(
            "there are no validation examples to choose a learning rate by. Set data.validation or "
            "data.validation_size, or give one rate by lr_grid."
        )


def greater_is_better(variant: Variant) -> bool:
    """Whether the largest score is the best: of GLUE's metrics; a language model has a perplexity."""
    return isinstance(variant.config.data, GlueConfig)


def plan(variants: list[Variant], seeds: list[int]) -> str:
    """What there is to run, a line a label."""
    lines = [f"{variant.label:<14} lr {', '.join(f'{rate:g}' for rate in variant.rates)}" for variant in variants]
    number = sum(len(variant.rates) for variant in variants)
    further = f", then the best rate of each with seed {', '.join(map(str, seeds[1:]))}" if seeds[1:] else ""
    config = variants[0].config
    steps = config.trainer.get("max_steps", -1)
    length = f"{steps:,} optimizer steps" if steps > 0 else f"{config.trainer['num_train_epochs']:g} epochs"
    return "\n".join([f"{number} runs of {config.model.name}, {length}, seed {seeds[0]}{further}:", *lines])


def make_comparison(config: CompareConfig, sweep: Sweep) -> Comparison:
    """The comparison of all runs that there are."""
    runs = [read_run(sweep.folder / "runs" / spec.name, label=spec.label) for spec in sorted_specs(sweep)]
    data = next(iter(sweep.variants.values())).config.data
    model = Path(next(iter(sweep.variants.values())).config.model.name).name
    return compare_runs(runs, title=config.title or f"{model} on {Path(data.name).name}")


def sorted_specs(sweep: Sweep) -> list[Spec]:
    """Every run that has ended, by label in the order asked for, then rate and seed."""
    order = list(sweep.variants)
    return sorted(sweep.ended, key=lambda spec: (order.index(spec.label), spec.lr, spec.seed))


def clear(comparison: Comparison, sweep: Sweep) -> None:
    """Remove the checkpoints of runs that have ended for good, and the weights that ``keep_models`` does not want.

    A failed run keeps its checkpoints, to be tried again from there. Where no run has a score none is the best one,
    and all weights stay unless none are wanted.
    """
    best = {row.label: row.lr for row in comparison.rows if row.score is not None}
    keep = sweep.config.keep_models
    for spec, ended in sweep.ended.items():
        folder = sweep.folder / "runs" / spec.name
        if ended.outcome == "failed":
            continue
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if keep == "none" or (keep == "best" and best.get(spec.label, spec.lr) != spec.lr):
            for name in ("model", "warm_start", "adapter"):
                shutil.rmtree(folder / name, ignore_errors=True)


def anchored_options(config: CompareConfig, overrides: dict[str, Any], variants: list[Variant]) -> dict[str, Any]:
    """The options for ``compare.yaml``, with files and folders named from the root, to be found from any folder."""
    run = variants[0].config
    places = {
        "data.name": run.data.name,
        "data.validation": run.data.validation,
        "data.tokenizer": run.data.tokenizer,
        "model.name": run.model.name,
    }
    given = overrides | {key: place for key, place in places.items() if place and os.path.isabs(place)}
    recipe = config.config
    if recipe is not None and Path(recipe).is_file():
        recipe = os.path.abspath(recipe)
    return asdict(replace(config, config=recipe, output_dir=None, dry_run=False)) | {"overrides": given}
