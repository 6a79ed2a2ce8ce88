"""The analysis ``sparsity``: how few entries hold the gradient's norm, in a run as it starts or in trained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fullrank.analysis.draw_sparsity import gaussian_norm_share, make_figure
from fullrank.analysis.output import Findings, check_output, leave
from fullrank.analysis.sparsity import (
    DENSITIES,
    GradientSparsity,
    Row,
    Shares,
    check_densities,
    combined,
    gradient_sparsity,
)
from fullrank.analysis.spectrum import matrix_types
from fullrank.analysis.subjects import Subject, make_subject
from fullrank.analysis.table import text_table
from fullrank.errors import ConfigError
from fullrank.train.config import RunConfig
from fullrank.train.resolve import resolve
from fullrank.weights import label_folders, run_folder

TARGETS = ["attn", "mlp"]
ENCODER_TARGETS = ["query", "key", "value", "attention.output.dense"]
"""Of SIFT's own runs on GLUE, whose models do not have the names above."""
CLAIM = (0.01, 0.99)
"""Density and share of the norm: the abstract of the first version of SIFT's paper (arXiv:2312.11875v1)."""
EACH, ALL = "all, largest of each", "all, largest of all"
SHARES = {"norm": "L2 norm", "squared": "squares", "absolute": "L1 norm"}
"""Field of `Shares` -> what it is a share of."""


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The models and data to measure, and what to count."""

    runs: list[str] = field(default_factory=list)
    """Runs' folders or checkpoints in them; with `config`, any models' folders or hub names. LABEL=FOLDER names one."""
    config: str | None = None
    """Recipe or YAML file of a run: the model as such a run starts, on its data; with `runs`, those on its data."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of the run by dotted key; of trained runs those of their data, batches and seed."""
    num_batches: int = 1
    """Batches whose mean gradient is measured: the first ones of training. SIFT chooses by its first batch."""
    batch_size: int | None = None
    """Sequences in a batch; null: the run's per_device_train_batch_size."""
    target_modules: list[str] | None = None
    """Parts of the names of the weights; null: attn,mlp, or query,key,value,attention.output.dense in models without
    such names, as in SIFT's own runs on GLUE."""
    densities: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.05, 0.1])
    """Shares of the entries, the largest ones, whose share of the norm is told."""
    output_dir: str = "sparsity"
    """Folder to write; must be new or empty."""


def analyze_sparsity(options: SparsityOptions) -> Findings:
    """Measure the sparsity of gradients and leave sparsity.json, .csv, .png and .svg.

    Raises:
        ConfigError: Before anything is written, if a run, the data or an option is not as it must be.
        CheckpointError: If weights are damaged.
        TrainingError: If a gradient is not finite.
        UnsupportedError: If matplotlib is not installed.
    """
    check_output(options.output_dir)
    check_densities(options.densities)
    measured: dict[str, GradientSparsity] = {}
    runs: dict[str, dict[str, Any]] = {}
    for label, config, trained in chosen_runs(options):
        subject = make_subject(config, trained=trained, num_batches=options.num_batches, batch_size=options.batch_size)
        given = options.target_modules
        patterns = default_targets(subject.model) if given is None else given
        measured[label] = gradient_sparsity(
            subject.model,
            subject.batches,
            target_modules=patterns,
            densities=sorted({*options.densities, *DENSITIES}),
        )
        runs[label] = _about(subject, config, patterns) | to_dict(measured[label], options.densities)
    content = {
        "densities": options.densities,
        "runs": runs,
        "gaussian_norm": [gaussian_norm_share(density) for density in options.densities],
        "published": {"density": CLAIM[0], "norm": CLAIM[1], "source": "arXiv:2312.11875v1, abstract"},
    }
    return leave(
        "sparsity",
        options.output_dir,
        content=content,
        rows=csv_rows(measured, options.densities),
        figure=make_figure(measured),
        table=table(measured, options.densities),
    )


def chosen_runs(options: SparsityOptions) -> list[tuple[str, RunConfig, str | None]]:
    """Label, configuration, and the trained weights if it is not the start of the run that is measured.

    Raises:
        ConfigError: If there is neither a run nor a recipe, data are not known, or a setting has no effect.
    """
    if not options.runs:
        if options.config is None:
            raise ConfigError("no run was given. Give at least one run's folder, or --config RECIPE.")
        path = Path(options.config)
        label = path.parent.name if path.name == "config.yaml" else path.stem if path.is_file() else options.config
        return [(label, resolve(options.config, options.overrides), None)]
    without_effect = [key for key in options.overrides if key.split(".")[0] in ("model", "method")]
    if options.config is None and without_effect:
        raise ConfigError(
            f"--{without_effect[0]} has no effect on a run that is trained. Leave it out, or measure the start of "
            "a run by --config RECIPE."
        )
    chosen: list[tuple[str, RunConfig, str | None]] = []
    for label, folder in label_folders(options.runs).items():
        run = run_folder(folder)
        if run is None and options.config is None:
            raise ConfigError(
                f"{folder} is not a run's folder, so its data are not known. Name them by --config RECIPE."
            )
        recipe = options.config or f"{run}/config.yaml"
        chosen.append((label, resolve(recipe, options.overrides), str(folder)))
    return chosen


def default_targets(model: nn.Module) -> list[str]:
    """The parts of names that SIFT trains in such a model."""
    names = [name for name, _ in model.named_parameters()]
    for patterns in (TARGETS, ENCODER_TARGETS):
        if all(any(pattern in name for name in names) for pattern in patterns):
            return patterns
    return TARGETS  # which the measurement refuses, with names that are near


def of_types(measured: GradientSparsity) -> dict[str, Row]:
    """All weights of a type together, the largest entries of each weight: the query of every layer, and so on."""
    rows: dict[str, list[Row]] = {}
    kinds = matrix_types([row.name for row in measured.weights])
    for kind, row in zip(kinds, measured.weights, strict=True):
        rows.setdefault(kind, []).append(row)
    return {kind: combined(kind, found, len(measured.densities)) for kind, found in rows.items()}


def lines_of(measured: GradientSparsity) -> dict[str, Row]:
    """What a table tells: each type, and all weights in both ways to choose."""
    return {**of_types(measured), EACH: measured.by_matrix, ALL: measured.model}


def to_dict(measured: GradientSparsity, densities: Sequence[float]) -> dict[str, Any]:
    """For JSON: the shares at these densities for each type and each weight, and the curves to six digits."""

    def told(row: Row) -> dict[str, Any]:
        shares = None if row.shares is None else asdict(at(row.shares, measured.densities, densities))
        return {"numel": row.numel, "norm": row.norm, "absolute_sum": row.absolute_sum, "shares": shares}

    curves = {"largest_of_each": measured.by_matrix.shares, "largest_of_all": measured.model.shares}
    return {
        "types": {kind: told(row) for kind, row in of_types(measured).items()},
        "largest_of_each": told(measured.by_matrix),
        "largest_of_all": told(measured.model),
        "weights": [{"name": row.name} | told(row) for row in measured.weights],
        "curves": {"densities": measured.densities}
        | {name: [float(f"{norm:.6g}") for norm in shares.norm] for name, shares in curves.items() if shares},
    }


def at(shares: Shares, known: Sequence[float], densities: Sequence[float]) -> Shares:
    """The shares at some of the densities that were measured."""
    places = [known.index(density) for density in densities]
    return Shares(*([getattr(shares, name)[place] for place in places] for name in SHARES))


def csv_rows(measured: Mapping[str, GradientSparsity], densities: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each run, type of weight and density; shares are 0 to 1."""
    rows = []
    for label, found in measured.items():
        for name, row in lines_of(found).items():
            for density in densities:
                place = found.densities.index(density)
                shares = {key: getattr(row.shares, key)[place] if row.shares else None for key in SHARES}
                rows.append({"run": label, "weights": name, "numel": row.numel, "density": density, **shares})
    return rows


def table(measured: Mapping[str, GradientSparsity], densities: Sequence[float]) -> str:
    """The shares of every type of weight and run in lines for a terminal, in percent; what to compare with below."""
    header = ("weights", "share of", "run", *(f"{100 * density:g}%" for density in densities))
    found = {label: lines_of(one) for label, one in measured.items()}
    kinds = [kind for lines in found.values() for kind in lines if kind not in (EACH, ALL)]
    rows = []
    for kind in (*dict.fromkeys(kinds), EACH, ALL):
        for key, what in SHARES.items():
            for label, lines in found.items():
                if kind in lines and (shares := lines[kind].shares):
                    told = at(shares, measured[label].densities, densities)
                    rows.append((kind, what, label, *map(_percent, getattr(told, key))))
    gaussian = [_percent(gaussian_norm_share(density)) for density in densities]
    rows.append(("entries of a Gaussian", SHARES["norm"], "", *gaussian))
    if CLAIM[0] in densities:
        claimed = [_percent(CLAIM[1]) if density == CLAIM[0] else "" for density in densities]
        rows.append(("SIFT's paper, v1", "norm", "", *claimed))
    return text_table(header, rows, num_left=3)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _about(subject: Subject, config: RunConfig, patterns: Sequence[str]) -> dict[str, Any]:
    """What was measured."""
    return {
        "model": subject.source,
        "data": subject.data,
        "num_batches": len(subject.batches),
        "batch_size": len(subject.batches[0]["input_ids"]),
        "num_tokens": subject.num_tokens,
        "seed": config.seed,
        "target_modules": list(patterns),
    }
