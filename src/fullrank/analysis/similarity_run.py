"""``fullrank analyze similarity``: a low-rank method and full-rank AdamW, trained alike, traced and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fullrank.analysis.draw_similarity import make_figure
from fullrank.analysis.output import Findings, check_output, leave
from fullrank.analysis.similarity import similarity, table
from fullrank.analysis.traced_runs import (
    check_folder,
    check_length,
    in_folder,
    refuse_training_options,
    sibling,
    traced_runs,
)
from fullrank.errors import ConfigError
from fullrank.train.config import RunConfig
from fullrank.train.resolve import resolve
from fullrank.train.trace import ScalingTrace
from fullrank.train.trace_file import Trace, read_trace

LOW_RANK = ("fira", "galore", "apollo")
"""Methods with the scaling factors of a subspace."""
LOW_RANK_OPTIMIZERS = ("FiraAdamW", "FiraRMSprop", "GaLoreAdamW", "GaLoreRMSprop", "ApolloAdamW")
FULL_RANK_OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "RMSprop")
"""Classes of torch.optim that keep Adam's moments, or RMSprop's."""
KINDS = ("low-rank", "full-rank")
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
    placed = [in_folder(config, folder / config.method_name) for config in (low, full)]
    runs = [(config, _tracer(options, low, config.output_dir)) for config in placed]
    check_folder(folder, name=NAME, runs=runs)
    traces = traced_runs(runs, name=NAME)
    return None if traces is None else _leave(traces, [low.to_dict(), full.to_dict()], folder)


def _tracer(options: SimilarityOptions, low: RunConfig, folder: str | None) -> ScalingTrace:
    """The trace of either run: of the low-rank method's matrices."""
    return ScalingTrace(
        folder,
        every=options.trace_every,
        num_columns=options.num_columns,
        target_modules=low.method.target_modules,
        proj_type=low.method.proj_type,
    )


def _compare_runs(options: SimilarityOptions) -> Findings:
    """Compare two runs whose folders hold a trace."""
    if len(options.runs) != 2:
        raise ConfigError(
            f"similarity compares two runs, the low-rank and the full-rank one, got {len(options.runs)}. Give two "
            "folders, or none and --config to train both."
        )
    names = ("config", "full", "overrides", "trace_every", "num_columns")
    refuse_training_options(options, names, given="two runs are")
    check_output(options.output_dir)
    traces = [read_trace(run) for run in options.runs]
    for trace, kind, known in zip(traces, KINDS, (LOW_RANK_OPTIMIZERS, FULL_RANK_OPTIMIZERS), strict=True):
        if trace.optimizer not in known:
            raise ConfigError(
                f"{trace.folder} is given as the {kind} run, and was traced with {trace.optimizer}. Give a run of "
                f"{', '.join(LOW_RANK_OPTIMIZERS)} first, then one of torch's {', '.join(FULL_RANK_OPTIMIZERS)}."
            )
    return _leave(traces, [_saved_config(Path(run)) for run in options.runs], Path(options.output_dir))


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in a run's folder; None where there is none, or another program's."""
    path = folder / "config.yaml"
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if not all(isinstance(found[section]["name"], str) for section in ("model", "method")):
            return None
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError):
        return None
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))  # YAML has dates, JSON has none
    return plain


def make_configs(options: SimilarityOptions) -> tuple[RunConfig, RunConfig]:
    """The low-rank run, and the full-rank one that differs in its method alone.

    Raises:
        ConfigError: If a setting is unknown or cannot work.
    """
    if options.num_columns < 1:
        raise ConfigError(f"num_columns must be at least 1, got {options.num_columns}.")
    if "name" in options.full:
        raise ConfigError("full.name is full: the second run is of full-rank AdamW. Leave it out; see --method.name.")
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
    check_length(low, options.trace_every)
    changes = {"method.name": "full", "method.eps": method.eps}
    full = sibling(low, changes | {f"method.{key}": value for key, value in options.full.items()})
    return low, full


def _leave(traces: Sequence[Trace], configs: Sequence[dict[str, Any] | None], folder: Path) -> Findings:
    found = similarity(*traces)
    config, low = configs[0], traces[0]
    place = low.folder if low.folder.is_dir() else low.folder.parent
    label = place.resolve().name if config is None else f"{config['model']['name']} ({config['method']['name']})"
    made = {"config": config, "full_config": configs[1], "trace_every": low.every}
    made |= {"num_columns": low.num_columns, "seed": low.seed}
    return leave(
        NAME,
        folder,
        content=found.to_dict() | {"label": label} | made,
        rows=list(found.rows()),
        figure=make_figure(found),
        table=table({label: found}),
    )
