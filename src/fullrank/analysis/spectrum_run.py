"""The analysis ``spectrum``: what training changed in runs, each compared with what it started from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.analysis.draw_spectrum import make_figure
from fullrank.analysis.output import Findings, check_output, leave
from fullrank.analysis.spectrum import THRESHOLD, Spectrum, spectrum, table
from fullrank.errors import ConfigError
from fullrank.train.start import start_weights
from fullrank.weights import CHECKPOINT, Weights, from_tensors, label_folders, read_weights, run_folder


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions:
    """The runs to look at, and what to count."""

    runs: list[str] = field(default_factory=list)
    """Runs' folders, checkpoints in them, or any models' folders; LABEL=FOLDER names one in the results."""
    base: str | None = None
    """Folder of what to subtract from all of them; null: what each run started from, after its warm start if any."""
    threshold: float = THRESHOLD
    """Singular values below it are counted; 0.1 as in ReLoRA's paper."""
    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Parts of the names of the matrices."""
    output_dir: str = "spectrum"
    """Folder to write; must be new or empty."""


def analyze_spectrum(options: SpectrumOptions) -> Findings:
    """Measure the spectra of runs and leave spectrum.json, .csv, .png and .svg.

    Raises:
        ConfigError: Before anything is written, if a run, its start or an option is not as it must be.
        CheckpointError: If weights are damaged or not finite.
        UnsupportedError: If weights are quantized, or matplotlib is not installed.
    """
    check_output(options.output_dir)
    folders = label_folders(options.runs)
    trained = {label: read_weights(run) for label, run in folders.items()}
    base = None if options.base is None else read_weights(options.base)
    for run in folders.values() if base is None else ():
        if run_folder(run) is None:
            raise ConfigError(f"{run} is not a run's folder, so its start is not known. Name it by --base FOLDER.")
    found = {
        label: spectrum(
            weights,
            base or start_of(folders[label]),
            target_modules=options.target_modules,
            threshold=options.threshold,
        )
        for label, weights in trained.items()
    }
    return leave(
        "spectrum",
        options.output_dir,
        content={"runs": {label: measured.to_dict() for label, measured in found.items()}},
        rows=csv_rows(found),
        figure=make_figure(found),
        table=table(found),
    )


def start_of(folder: str | Path) -> Weights:
    """The weights that the run of this folder, its own or that of a model or checkpoint in it, started from.

    Raises:
        ConfigError: If the folder is of no run, or its start cannot be made again.
    """
    run = run_folder(folder) or Path(folder)  # which is then refused
    found = CHECKPOINT.fullmatch(Path(folder).absolute().name)
    start = start_weights(run, step=int(found[1]) if found else None)
    return read_weights(start) if isinstance(start, Path) else from_tensors(start, source=f"the start of {run}")


def csv_rows(spectra: Mapping[str, Spectrum]) -> list[dict[str, Any]]:
    """A row for each run and type of matrix."""
    numbers = ("num_values", "num_below", "effective_rank", "numerical_rank", "largest")
    return [
        {"run": label, "matrix": kind, "threshold": found.threshold}
        | {number: getattr(measured, number) for number in numbers}
        for label, found in spectra.items()
        for kind, measured in found.types.items()
    ]
