"""``fullrank analyze``: measurements of trained weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from fullrank.weights import Weights

ANALYZE_USAGE = """\
usage: fullrank analyze spectrum RUN [RUN ...] [--base FOLDER] [--threshold 0.1] [--target_modules attn,mlp]
                                 [--output_dir DIR]

Prints, for each type of matrix, the singular values of (trained weights - weights that training started from): how many
are below the threshold, the effective and the numerical rank; writes spectrum.json and spectrum.png.

  RUN               a run's folder, a checkpoint in it, or any model's folder; LABEL=FOLDER names it in the results
  --base FOLDER     what to subtract from all of them; default: what each run started from, after its warm start if any
  --threshold S     singular values below S are counted; default: 0.1, as in ReLoRA's paper
  --target_modules  comma-separated parts of the names of the matrices; default: attn,mlp
  --output_dir DIR  folder to write; must be new or empty; default: spectrum
"""


def analyze(arguments: list[str]) -> int:
    """``fullrank analyze spectrum RUN ...``."""
    flags = analyze_flags(arguments)
    if flags.help:
        print(ANALYZE_USAGE)
        return 0
    from fullrank.analysis.draw_spectrum import draw
    from fullrank.analysis.spectrum import spectrum, table
    from fullrank.train.folders import refuse_unusable
    from fullrank.train.report import versions, write_whole
    from fullrank.weights import label_folders, read_weights, run_folder

    folder = Path(flags.output_dir)
    refuse_unusable(folder, remedy="Choose another by --output_dir.")
    folders = label_folders(flags.runs)
    trained = {label: read_weights(run) for label, run in folders.items()}
    base = None if flags.base is None else read_weights(flags.base)
    for run in folders.values() if base is None else ():
        if run_folder(run) is None:
            raise ConfigError(f"{run} is not a run's folder, so its start is not known. Name it by --base FOLDER.")
    found = {
        label: spectrum(
            weights,
            base or start_of(folders[label]),
            target_modules=[part.strip() for part in flags.target_modules.split(",")],
            threshold=flags.threshold,
        )
        for label, weights in trained.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {"runs": {label: measured.to_dict() for label, measured in found.items()}, "versions": versions()}
    write_whole(folder / "spectrum.json", json.dumps(content, indent=1))
    print(table(found))
    print(f"{folder / 'spectrum.json'}, {draw(found, folder / 'spectrum.png')}")
    return 0


def start_of(folder: Path) -> Weights:
    """The weights that the run of this folder started from."""
    from fullrank.train.start import start_weights
    from fullrank.weights import CHECKPOINT, from_tensors, read_weights, run_folder

    run = run_folder(folder)
    assert run is not None  # looked at before
    found = CHECKPOINT.fullmatch(folder.absolute().name)
    start = start_weights(run, step=int(found[1]) if found else None)
    return read_weights(start) if isinstance(start, Path) else from_tensors(start, source=f"the start of {run}")


def analyze_flags(arguments: list[str]) -> argparse.Namespace:
    """What ``fullrank analyze`` is told.

    Raises:
        ConfigError: If something is missing or unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--base")
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--target_modules", default="attn,mlp")
    parser.add_argument("--output_dir", default="spectrum")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        flags, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    unknown = [word for word in rest if word.startswith("-")]
    if unknown and not flags.help:
        raise ConfigError(f"analyze does not know {' '.join(unknown)!r}. `fullrank analyze --help` lists its options.")
    if rest[:1] != ["spectrum"] and not flags.help:
        raise ConfigError(f"analyze can measure: spectrum. Got {' '.join(rest[:1]) or 'nothing'!r}.")
    flags.runs = rest[1:]
    if not flags.runs and not flags.help:
        raise ConfigError("analyze spectrum needs at least one run's folder. `fullrank analyze --help` explains it.")
    return flags
