"""Evaluate a trained model: check, load, run task after task, and keep every result as soon as it is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.model import describe, unfit
from fullrank.evaluation.plan import plan, together
from fullrank.evaluation.record import FILE, Record
from fullrank.evaluation.unit import Evaluated, Unit
from fullrank.train.load import Loaded, device_named, forget_generation, load_trained

logger = logging.getLogger(__name__)

_SHOWN = 3  # differences that are told; of MMLU there may be 57


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on the tasks that ``output_dir`` does not have yet.

    What can be checked is checked before the model runs. ``eval.json`` is written after every task, MMLU's subjects
    each being one, so that an interrupted evaluation is gone on with by the same call.

    Args:
        config: The model, the tasks, and how.

    Returns:
        The content of ``eval.json``.

    Raises:
        ConfigError: If something cannot work, or the folder holds results obtained otherwise.
        CheckpointError: If ``eval.json`` or an adapter is damaged.
    """
    units = plan(config)
    record = Record(Path(config.output_dir))
    pending = _pending(units, record)
    _try_all([unit.prepare for unit in pending])
    loaded = load_trained(config.model, adapter=config.adapter, dtype=config.dtype)
    if problems := unfit(config, loaded, units):
        raise together(problems)
    record.claim(describe(config, loaded))
    _warn_of_template(loaded, config, pending)
    evaluated = _on_device(loaded, config)
    _try_all([partial(unit.fit, evaluated) for unit in pending])
    for number, unit in enumerate(pending, start=1):
        logger.info("%s (%d of %d)", unit.task, number, len(pending))
        start = time.perf_counter()
        outcome = unit.run(evaluated)
        record.add(unit, outcome, batch_size=config.batch_size, seconds=time.perf_counter() - start)
    return record.content


def _pending(units: list[Unit], record: Record) -> list[Unit]:
    """The tasks that the folder does not have; those it has must have been run in the same way."""
    differences = list(dict.fromkeys(line for unit in units for line in record.differences(unit)))
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ConfigError(
            f"{record.folder / FILE} holds results obtained otherwise: {'; '.join(differences[:_SHOWN])}"
            f"{more}. Choose another output_dir, or ask for the same."
        )
    pending = [unit for unit in units if unit.task not in record.tasks]
    if len(pending) < len(units):
        logger.info("%s has %d of %d tasks already", record.folder / FILE, len(units) - len(pending), len(units))
    return pending


def _try_all(steps: Sequence[Callable[[], object]]) -> None:
    """Take every step, and tell the errors of all."""
    problems = []
    for step in steps:
        try:
            step()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise together(problems)


def _warn_of_template(loaded: Loaded, config: EvaluateConfig, pending: list[Unit]) -> None:
    """A model that learned to answer one prompt is asked with another."""
    asked = config.prompt_template
    trained = loaded.prompt_template
    fitting = {"commonsense": ("commonsense", "commonsense-eval")}.get(trained or asked, (trained or asked,))
    if asked not in fitting and any(unit.protocol == "generate" for unit in pending):
        logger.warning(
            "prompt_template is %s, and %s was trained with %s: its answers may suffer", asked, config.model, trained
        )


def _on_device(loaded: Loaded, config: EvaluateConfig) -> Evaluated:
    """The model where it is to run, in evaluation mode, its data type kept."""
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)  # checked before
    loaded.model.to(device_named(config.device))  # type: ignore[arg-type]
    loaded.model.eval()
    forget_generation(loaded.model, loaded.tokenizer)
    return Evaluated(loaded.model, loaded.tokenizer, config.batch_size)
