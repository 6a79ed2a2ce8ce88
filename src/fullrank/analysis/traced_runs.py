"""Runs that an analysis makes for itself, traced: one is done once, goes on where it was stopped, and stays."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullrank.analysis.figure import require_drawing
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.checkpoint import verify_run
from fullrank.train.config import RunConfig
from fullrank.train.folders import refuse_unusable
from fullrank.train.report import num_processes
from fullrank.train.resolve import resolve
from fullrank.train.run import finetune, placed, pretrain
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import Trace, TracedMatrix, find_trace, read_trace

logger = logging.getLogger(__name__)


def traced_run(config: RunConfig, trace: ScalingTrace) -> Trace | None:
    """Make a run with a trace in its folder, or go on with it; a finished one is only read.

    Args:
        config: The run, with its ``output_dir``.
        trace: How it is traced; its ``folder`` is the run's.

    Returns:
        The trace, or None if the run was stopped before its end: the same call goes on with it.

    Raises:
        ConfigError, CheckpointError: If the folder holds another run or another trace, or the configuration cannot
            work; before anything is written.
        TrainingError: If the loss is no longer finite.
    """
    folder = Path(str(config.output_dir))
    verify_traced(config, trace)
    if not (folder / "result.json").is_file():
        make = pretrain if config.command == "pretrain" else finetune
        if make(config, resume=(folder / "config.yaml").is_file(), callbacks=[trace]) is None:
            return None
        verify_traced(config, trace)
    return read_trace(folder)


def traced_runs(
    runs: Sequence[tuple[RunConfig, ScalingTrace]],
    *,
    name: str,
    make: Callable[[RunConfig, ScalingTrace], Trace | None] = traced_run,
) -> list[Trace] | None:
    """Make the runs of an analysis one after another; None if one was stopped before its end.

    Args:
        runs: Each with its ``output_dir``, and how it is traced.
        name: The analysis.
        make: Makes one of them.
    """
    traces = []
    for config, trace in runs:
        place = Path(str(config.output_dir))
        logger.info("%s: %s", place.name, place)
        found = make(config, trace)
        if found is None:
            logger.warning("stopped; the same command goes on from there: fullrank analyze %s", name)
            return None
        traces.append(found)
    return traces


def verify_traced(config: RunConfig, trace: ScalingTrace) -> None:
    """Check that a run's folder is new or empty, or holds this run, traced like this, finished or not.

    Raises:
        ConfigError, CheckpointError: If it holds something else, or was trained without its trace.
    """
    folder = Path(str(config.output_dir))
    if not (folder / "config.yaml").is_file():
        refuse_unusable(folder, remedy="Choose another by --output_dir.")
        return
    verify_run(folder, placed(config))
    found = find_trace(folder)
    last = 0 if found is None else found.last_step
    for name in ("every", "num_columns", "seed"):
        if last and getattr(found, name) != (asked := getattr(trace, name)):
            raise ConfigError(
                f"the run in {folder} was traced with {name} {getattr(found, name)}, asked for is {asked}. Ask for "
                "that, or choose another --output_dir."
            )
    if not (folder / "result.json").is_file():
        return
    num_steps = read_result(folder).get("steps")
    if not isinstance(num_steps, int):
        raise CheckpointError(f"{folder / 'result.json'} tells of no steps. Remove {folder}, and train it again.")
    if num_steps < trace.every:
        raise ConfigError(
            f"the run in {folder} ended at step {num_steps}, and every {trace.every} steps were to be traced: none "
            "was. Remove the folder, and lower trace_every or train for more steps."
        )
    if last <= num_steps - trace.every:
        raise CheckpointError(
            f"the trace in {folder} ends at step {last}, its run at step {num_steps}: it was trained or resumed "
            "without the trace. Remove the folder, and let the analysis train it."
        )


def read_result(folder: Path) -> dict[str, Any]:
    """What a run's ``result.json`` holds; nothing, with a warning, where it is not a run's."""
    path = folder / "result.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s cannot be read (%s), and is left out", path, error)
        return {}
    if not isinstance(found, dict):
        logger.warning("%s is not the result of a run, and is left out", path)
        return {}
    return found


def check_folder(folder: str | Path, *, name: str, runs: Sequence[tuple[RunConfig, ScalingTrace]]) -> None:
    """Check that an analysis can train in a folder: new, empty, or what an earlier call with these options left.

    Args:
        folder: The folder of the results; the runs are in folders of their own inside it.
        name: The analysis, which its results are called after.
        runs: Each run, with its folder as ``output_dir``, and how it is traced.

    Raises:
        ConfigError, CheckpointError: If it cannot be made, or holds something else: another run, another trace, or
            the results of other runs.
        UnsupportedError: If matplotlib is not installed.
    """
    require_drawing()
    place = Path(folder)
    inside = [Path(str(config.output_dir)) for config, _ in runs]
    refuse_unusable(
        place, remedy="Choose another by --output_dir.", may_hold_files=any(path.is_dir() for path in inside)
    )
    if num_processes() > 1:
        raise ConfigError(
            f"the analysis trains in one process, and this one is of {num_processes()}. Start it without torchrun, or "
            "trace runs of your own (fullrank.train.trace.ScalingTrace) and give their folders."
        )
    results = [path for end in ("json", "csv", "png", "svg") if (path := place / f"{name}.{end}").exists()]
    if results and (absent := [path.name for path in inside if not (path / "config.yaml").is_file()]):
        raise ConfigError(
            f"{results[0]} is of other runs: there is no {' and no '.join(absent)} in {place}, which this call would "
            "train. Choose another --output_dir; nothing was overwritten."
        )
    if results and (method := _method_of(results[0])) not in (None, runs[0][0].method_name):
        raise ConfigError(
            f"{results[0]} is of {method}, and this call of {runs[0][0].method_name}. Choose another --output_dir; "
            "nothing was overwritten."
        )
    for config, trace in runs:
        verify_traced(config, trace)


def _method_of(path: Path) -> Any:
    """The method that the results in a file are of; None where it does not say."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]["method"]["name"]
    except (ValueError, LookupError, TypeError):
        return None


def check_length(config: RunConfig, trace_every: int) -> None:
    """Check that a run whose length is given is long enough to be traced.

    Raises:
        ConfigError: If it is not, or ``trace_every`` is out of bounds.
    """
    if trace_every < 1:
        raise ConfigError(f"trace_every must be at least 1 optimizer step, got {trace_every}.")
    if 0 < (steps := config.trainer.get("max_steps", -1)) < trace_every:
        raise ConfigError(
            f"trainer.max_steps is {steps}, so no step would be traced. Lower trace_every ({trace_every})."
        )


def refuse_training_options(options: Any, names: Sequence[str], *, given: str) -> None:
    """Refuse options that only training reads, where runs are given.

    Raises:
        ConfigError: Names those that are not at their default.
    """
    plain = type(options)()
    if changed := [f"--{name}" for name in names if getattr(options, name) != getattr(plain, name)]:
        raise ConfigError(f"{', '.join(changed)} is for training, and {given} given. Leave out one or the other.")


def sibling(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The same run with other settings (dotted keys); at a change of method options that mean the same stay.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    content = config.to_dict()
    content.pop("output_dir", None)
    for key in changes:
        section, _, name = key.partition(".")
        if name != "name" and isinstance(content.get(section), dict):
            content[section].pop(name, None)  # else it would be told as left out where the method changes
    return resolve(content, changes, command=config.command)


def in_folder(config: RunConfig, folder: Path) -> RunConfig:
    """The same run in another folder."""
    return replace(config, output_dir=str(folder))


def same_matrices(one: Trace, other: Trace) -> Mapping[str, TracedMatrix]:
    """The matrices of two traces.

    Raises:
        ConfigError: If they are not the same, or not of the same shapes.
    """
    for first, second in ((one, other), (other, one)):
        if absent := [name for name in first.matrices if name not in second.matrices]:
            raise ConfigError(
                f"{len(absent)} of {len(first.matrices)} matrices are traced in {first.folder} and not in "
                f"{second.folder}, first {absent[0]}. Compare runs of one model, traced with the same target_modules."
            )
    for name, matrix in one.matrices.items():
        if matrix.shape != other.matrices[name].shape:
            raise ConfigError(
                f"{name} is {matrix.shape} in {one.folder} and {other.matrices[name].shape} in {other.folder}. "
                "Compare runs of one model."
            )
    return one.matrices


def common_steps(one: Trace, other: Trace) -> list[int]:
    """The steps that both traces have; warns where one has more.

    Raises:
        ConfigError: If there is none.
    """
    common = sorted({*one.steps} & {*other.steps})
    if not common:
        raise ConfigError(f"{one.folder} and {other.folder} have no traced step in common. Trace both every n steps.")
    if not len(common) == len(one.steps) == len(other.steps):
        logger.warning(
            "of %d traced steps in %s and %d in %s the %d that both have are compared",
            len(one.steps),
            one.folder,
            len(other.steps),
            other.folder,
            len(common),
        )
    return common
