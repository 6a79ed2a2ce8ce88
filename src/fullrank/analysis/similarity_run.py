"""``fullrank analyze similarity``: a low-rank method and full-rank AdamW, trained alike, traced and compared."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fullrank.analysis.draw_similarity import make_figure
from fullrank.analysis.output import Findings, check_output, leave
from fullrank.analysis.similarity import Similarity, similarity, table
from fullrank.analysis.traced_runs import check_folder, in_folder, sibling, traced_run
from fullrank.errors import ConfigError
from fullrank.train.config import RunConfig
from fullrank.train.resolve import resolve
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import Trace

logger = logging.getLogger(__name__)

LOW_RANK = ("fira", "galore", "apollo")
"""Methods with the scaling factors of a subspace."""
NAME = "similarity"


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """How two runs are made, traced and compared."""

    runs: list[str] = field(default_factory=list)
    """Two traced runs to compare, the low-rank and the full-rank one; none: both are trained."""
    config: str | None = None
    """Packaged recipe or YAML file of the low-rank run: fira, galore or apollo; to be given where no run is."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of both runs, as dotted keys (trainer.max_steps); those of method are the low-rank method's."""
    output_dir: str = "similarity"
    """Folder to write: the runs that are trained, and similarity.json, .csv, .png and .svg."""
    trace_every: int = 20
    """Optimizer steps from one traced step to the next."""
    num_columns: int = 100
    """Columns sampled of each matrix, at most."""
    full: dict[str, Any] = field(default_factory=dict)
    """Options of full-rank AdamW, such as full.lr; default: the method's own, with the low-rank method's eps."""


def analyze_similarity(options: SimilarityOptions) -> Findings | None:
    """Compare two runs that were traced before, or train both and compare them; write what was found.

    Runs that an earlier call with the same options finished are not made again, and one that was stopped goes on.

    Returns:
        What was found, or None if a run was stopped (Ctrl-C): the same call goes on.

    Raises:
        ConfigError, CheckpointError: Before anything is written, if a setting cannot work, the folder is another's,
            or the runs cannot be compared.
        TrainingError: If a loss is no longer finite.
    """
    import scipy.stats  # noqa: F401, missing it should show before training

    if options.runs:
        return _compare_runs(options)
    low, full = make_configs(options)
    folder = Path(options.output_dir)
    check_folder(folder, holds=(low.method_name, full.method_name))
    traces: list[Trace] = []
    for config in (low, full):
        place = folder / config.method_name
        trace = ScalingTrace(
            place,
            every=options.trace_every,
            num_columns=options.num_columns,
            target_modules=low.method.target_modules,
            proj_type=low.method.proj_type,
        )
        logger.info("%s: %s", config.method_name, place)
        found = traced_run(in_folder(config, place), trace)
        if found is None:
            logger.warning("stopped; the same command goes on from there: fullrank analyze %s", NAME)
            return None
        traces.append(found)
    return _leave(similarity(*traces), low.to_dict(), folder)


def _compare_runs(options: SimilarityOptions) -> Findings:
    """Compare two runs whose folders hold a trace."""
    if len(options.runs) != 2:
        raise ConfigError(
            f"similarity compares two runs, the low-rank and the full-rank one, got {len(options.runs)}. Give two "
            "folders, or none and --config to train both."
        )
    if given := [f"--{name}" for name in ("config", "full", "overrides") if getattr(options, name)]:
        raise ConfigError(f"{', '.join(given)} is for training, and two runs are given. Leave out one or the other.")
    check_output(options.output_dir)
    low, full = options.runs
    saved = Path(low) / "config.yaml"
    config = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else None
    return _leave(similarity(low, full), config, Path(options.output_dir))


def make_configs(options: SimilarityOptions) -> tuple[RunConfig, RunConfig]:
    """The low-rank run, and the full-rank one that differs in its method alone.

    Raises:
        ConfigError: If a setting is unknown or cannot work.
    """
    if options.num_columns < 1:
        raise ConfigError(f"num_columns must be at least 1, got {options.num_columns}.")
    if options.trace_every < 1:
        raise ConfigError(f"trace_every must be at least 1 optimizer step, got {options.trace_every}.")
    if options.config is None:
        raise ConfigError(
            "similarity needs two traced runs, or --config RECIPE to train them. `fullrank recipes` lists recipes."
        )
    low = resolve(options.config, options.overrides)
    if low.method_name not in LOW_RANK:
        raise ConfigError(
            f"method.name must be one of {', '.join(LOW_RANK)}, got {low.method_name}: it has no scaling factors of a "
            "subspace. Give --method.name fira."
        )
    method = low.method
    if getattr(method, "scaling", None) in ("matrix", "tensor") or method.proj_type == "full":
        raise ConfigError(
            "the comparison needs a factor for each column; with method.scaling matrix or tensor, or proj_type full, "
            "there is one for the matrix. Leave these options out."
        )
    if method.lora_rank is not None:
        raise ConfigError("method.lora_rank trains LoRA's factors, which full-rank training lacks. Leave it out.")
    if (steps := low.trainer.get("max_steps", -1)) and 0 < steps < options.trace_every:
        raise ConfigError(
            f"trainer.max_steps is {steps}, so no step would be traced. Lower trace_every ({options.trace_every})."
        )
    changes = {"method.name": "full", "method.eps": method.eps}
    full = sibling(low, changes | {f"method.{key}": value for key, value in options.full.items()})
    return low, full


def _leave(found: Similarity, config: dict[str, Any] | None, folder: Path) -> Findings:
    label = "this run" if config is None else f"{config['model']['name']} ({config['method']['name']})"
    return leave(
        NAME,
        folder,
        content=found.to_dict() | {"label": label},
        rows=list(found.rows()),
        figure=make_figure(found),
        table=table({label: found}),
    )
