"""``fullrank analyze limiter``: a run with its norm-growth limiter and without it, trained alike and traced."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.analysis.draw_limiter import make_figure
from fullrank.analysis.limiter import Limits, limiter, table
from fullrank.analysis.output import Findings, check_output, leave
from fullrank.analysis.spikes import HEIGHT, LEAST_STEPS, WINDOW, find_spikes
from fullrank.analysis.traced_runs import (
    check_folder,
    check_length,
    in_folder,
    refuse_training_options,
    sibling,
    traced_run,
    traced_runs,
)
from fullrank.errors import ConfigError, TrainingError
from fullrank.train.config import RunConfig
from fullrank.train.resolve import resolve
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import Trace, read_trace

logger = logging.getLogger(__name__)

NAME = "limiter"
LIMITED = ("fira", "apollo")
"""Methods that have the limiter."""
ON, OFF = "limiter", "no-limiter"
"""Folders of the two runs."""


@dataclass(frozen=True, kw_only=True)
class LimiterOptions:
    """How two runs are made and traced, and what a loss spike is."""

    runs: list[str] = field(default_factory=list)
    """Traced runs to read: one with a limiter, and one without if there is one; none: both are trained."""
    config: str | None = None
    """Packaged recipe or YAML file of the run with a limiter: fira or apollo; to be given where no run is."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of both runs, as dotted keys (trainer.max_steps)."""
    output_dir: str = "limiter"
    """Folder to write: the runs that are trained, and limiter.json, .csv, .png and .svg."""
    trace_every: int = 1
    """Optimizer steps from one traced step to the next; growth is seen between steps in a row only."""
    spike_window: int = WINDOW
    """Logged losses that the running median is over."""
    spike_height: float = HEIGHT
    """How far above that median a training loss must lie, for two logged steps or more, to be a spike (nats)."""


def analyze_limiter(options: LimiterOptions) -> Findings | None:
    """Read traced runs, or train with and without the limiter; write what was found.

    Runs that an earlier call with the same options finished are not made again, and one that was stopped goes on. A
    run whose loss is lost counts as far as it came.

    Returns:
        What was found, or None if a run was stopped (Ctrl-C): the same call goes on.

    Raises:
        ConfigError, CheckpointError: Before anything is written, if a setting cannot work, the folder is another's,
            or the runs cannot be compared.
    """
    find_spikes([], [], window=options.spike_window, height=options.spike_height)  # refuses what is out of bounds
    if options.runs:
        return _read_runs(options)
    folder = Path(options.output_dir)
    configs = make_configs(options)
    placed = [in_folder(config, folder / name) for name, config in zip((ON, OFF), configs, strict=True)]
    runs = [(one, ScalingTrace(one.output_dir, every=options.trace_every, num_columns=0)) for one in placed]
    check_folder(folder, name=NAME, runs=runs)
    traces = traced_runs(runs, name=NAME, make=_as_far_as_it_came)
    return None if traces is None else _leave(traces, options, configs[0].to_dict())


def _as_far_as_it_came(config: RunConfig, trace: ScalingTrace) -> Trace | None:
    """A traced run; of one whose loss is lost, the trace until then."""
    try:
        return traced_run(config, trace)
    except TrainingError as error:
        logger.warning("the run in %s ended early: %s", config.output_dir, error)
        return read_trace(str(config.output_dir))


def make_configs(options: LimiterOptions) -> tuple[RunConfig, RunConfig]:
    """The run with the limiter, and the one that differs in it alone.

    Raises:
        ConfigError: If a setting is unknown or cannot work, or the method has no limiter, or it is turned off.
    """
    if options.config is None:
        raise ConfigError(
            "limiter needs a traced run or two, or --config RECIPE to train them. `fullrank recipes` lists recipes."
        )
    on = resolve(options.config, options.overrides)
    if on.method_name not in LIMITED:
        raise ConfigError(
            f"method.name must be one of {', '.join(LIMITED)}, got {on.method_name}: it has no norm-growth limiter. "
            "Give --method.name fira."
        )
    if on.method.limiter_gamma is None:
        raise ConfigError("method.limiter_gamma is null, so neither run would have a limiter. Leave it out: 1.01.")
    check_length(on, options.trace_every)
    return on, sibling(on, {"method.limiter_gamma": None})


def _read_runs(options: LimiterOptions) -> Findings:
    """What traced runs say."""
    if len(options.runs) > 2:
        raise ConfigError(f"limiter reads one run or two, with and without it, got {len(options.runs)}.")
    refuse_training_options(options, ("config", "overrides", "trace_every"), given="runs are")
    check_output(options.output_dir)
    return _leave([read_trace(run) for run in options.runs], options, None)


def _leave(traces: list[Trace], options: LimiterOptions, config: dict[str, Any] | None) -> Findings:
    found: Limits = limiter(*traces, spike_window=options.spike_window, spike_height=options.spike_height)
    spike = {"window": options.spike_window, "height": options.spike_height, "least_steps": LEAST_STEPS}
    note = (
        f"spike: {LEAST_STEPS} logged steps or more whose training loss is over {options.spike_height:g} above the "
        f"median of the {options.spike_window} before"
    )
    columns = ("name", "kind", "num_steps", "num_acted", "mean_factor", "smallest_factor", "growth", "growth_without")
    return leave(
        NAME,
        options.output_dir,
        content={"spike": spike, "config": config} | found.to_dict(),
        rows=[{key: getattr(matrix, key) for key in columns} for matrix in found.matrices],
        figure=make_figure(found),
        table=f"{table(found)}\n{note}",
    )
