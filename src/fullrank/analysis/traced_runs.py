"""Runs that an analysis makes for itself, traced: one is done once, goes on where it was stopped, and stays."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
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
from fullrank.train.trace_file import Trace, TracedMatrix, read_trace

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
    begun = (folder / "config.yaml").is_file()
    if begun:
        verify_run(folder, placed(config))
    if not (folder / "result.json").is_file():
        make = pretrain if config.command == "pretrain" else finetune
        if make(config, resume=begun, callbacks=[trace]) is None:
            return None
    found = read_trace(folder)
    for name in ("every", "num_columns", "seed"):
        if getattr(found, name) != (asked := getattr(trace, name)):
            raise ConfigError(
                f"the run in {folder} was traced with {name} {getattr(found, name)}, asked for is {asked}. Ask for "
                "that, or choose another --output_dir."
            )
    num_steps = int(json.loads((folder / "result.json").read_text(encoding="utf-8"))["steps"])
    if found.steps[-1] <= num_steps - found.every:
        raise CheckpointError(
            f"the trace in {folder} ends at step {found.steps[-1]}, its run at step {num_steps}: it was resumed "
            "without the trace. Remove the folder, and let the analysis train it."
        )
    return found


def check_folder(folder: str | Path, *, holds: Sequence[str]) -> None:
    """Check that an analysis can train in a folder: new, empty, or with the runs of an earlier call in it.

    Raises:
        ConfigError: If it cannot be made, or holds something else.
        UnsupportedError: If matplotlib is not installed.
    """
    require_drawing()
    place = Path(folder)
    ours = any((place / name).is_dir() for name in holds)
    refuse_unusable(place, remedy="Choose another by --output_dir.", may_hold_files=ours)
    if num_processes() > 1:
        raise ConfigError(
            f"the analysis trains in one process, and this one is of {num_processes()}. Start it without torchrun, or "
            "trace runs of your own (fullrank.train.trace.ScalingTrace) and give their folders."
        )


def sibling(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The same run with other settings (dotted keys); at a change of method options that mean the same stay.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    content = config.to_dict()
    content.pop("output_dir", None)
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
