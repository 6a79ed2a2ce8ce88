"""The command ``fullrank``: thin, so that everything it does can be done from Python."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank import __version__
from fullrank.errors import CheckpointError, ConfigError, TrainingError, UnsupportedError

if TYPE_CHECKING:
    from fullrank.train.config import RunConfig
    from fullrank.weights import Weights

USAGE = """\
usage: fullrank COMMAND [OPTIONS]

commands:
  pretrain      train a language model from scratch (or go on with one)
  export        merge an adapter into its base: a plain model folder
  analyze       measure trained weights: `analyze spectrum RUN ...` says how many directions training changed
  recipes       list the packaged recipes; `recipes show NAME` prints one

`fullrank COMMAND --help` explains a command; `fullrank --version` prints the version.
"""

PRETRAIN_USAGE = """\
usage: fullrank pretrain [--config RECIPE] [--output_dir DIR] [--SECTION.FIELD VALUE ...]
       fullrank pretrain --resume DIR

With no arguments: the quickstart recipe, a small LLaMA with Fira on the text of this Python installation.

  --config RECIPE       a packaged recipe (`fullrank recipes`) or a YAML file; default: quickstart
  --method.name NAME    {methods}; the options of `method` below are those of {method}
  --resume DIR          go on with the run in DIR from its newest complete checkpoint
  --print_config        print the resolved configuration as YAML and stop
  --trainer.FIELD VALUE any field of transformers.TrainingArguments (max_steps, save_steps, report_to, ...), and
                        trainer.total_batch_size: sequences per optimizer step over all devices, from which
                        the accumulation is derived
"""

EXPORT_USAGE = """\
usage: fullrank export --model BASE --adapter DIR --output_dir OUT [--dtype DTYPE]

Writes the base model with the adapter's changes merged in, as a folder that from_pretrained loads.

  --model BASE      folder or hub name of the model that the adapter was trained from; another one is refused
  --adapter DIR     folder of the adapter: adapter/ in the folder of a SIFT run, or what SIFT.save_adapter wrote
  --output_dir OUT  folder to write; must be new or empty
  --dtype DTYPE     float32, bfloat16 or float16; default: that of the base's files
"""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 1 failed, 2 wrong usage, 130 stopped)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fullrank").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        print(__version__ if arguments == ["--version"] else USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}. Commands: {', '.join(COMMANDS)}.")
        return COMMANDS[arguments[0]](arguments[1:])
    except (ConfigError, CheckpointError, TrainingError, UnsupportedError) as error:
        print(f"fullrank: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except ModuleNotFoundError as error:
        if error.name not in APPLICATION:
            raise
        print(f"fullrank: {error.name} is missing. Install it: pip install 'fullrank[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would only print a traceback on the way out
        print("fullrank: stopped at once; what was saved before stays", file=sys.stderr)
        return 130


def pretrain(arguments: list[str]) -> int:
    """``fullrank pretrain``."""
    import yaml

    from fullrank.train.resolve import resolve

    flags, overrides = split_arguments(arguments)
    recipe: Any = flags.config
    if flags.resume is not None:
        recipe = Path(flags.resume) / "config.yaml"
        if not recipe.is_file():
            raise ConfigError(
                f"--resume {flags.resume} is not a run folder: it has no config.yaml. Start the run again."
            )
        if flags.config is not None or "output_dir" in overrides:
            raise ConfigError(
                "--resume takes its configuration and folder from the run. Leave out --config, --output_dir."
            )
        overrides["output_dir"] = str(flags.resume)
    if recipe is not None and "finetune" in Path(recipe).parts:
        raise ConfigError(
            f"{recipe} describes a fine-tuning run: its data needs prompts or labels, which `pretrain` does not make. "
            f"Read it with: fullrank recipes show {recipe}"
        )
    config = resolve(recipe, overrides)
    if flags.help:
        print_help(config)
        return 0
    if flags.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    from fullrank.train.report import summary
    from fullrank.train.run import pretrain as run

    result = run(config, resume=flags.resume is not None)
    if result is None:
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(summary(result))
    return 0


def recipes(arguments: list[str]) -> int:
    """``fullrank recipes [show NAME]``."""
    from fullrank.train.resolve import describe_recipes, show_recipe

    if not arguments:
        print(describe_recipes())
    elif arguments[0] == "show" and len(arguments) == 2:
        print(show_recipe(arguments[1]), end="")
    elif arguments[0] in ("-h", "--help"):
        print("usage: fullrank recipes [show NAME]")
    else:
        raise ConfigError(f"recipes takes nothing, or show and one name; got {' '.join(arguments)!r}.")
    return 0


def export(arguments: list[str]) -> int:
    """``fullrank export --model BASE --adapter DIR --output_dir OUT [--dtype DTYPE]``."""
    flags = export_flags(arguments)
    if flags.help:
        print(EXPORT_USAGE)
        return 0
    from fullrank.train.export import export as run

    print(run(flags.model, flags.adapter, flags.output_dir, dtype=flags.dtype))
    return 0


def export_flags(arguments: list[str]) -> argparse.Namespace:
    """What ``fullrank export`` is told.

    Raises:
        ConfigError: If something is missing or unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("model", "adapter", "output_dir", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        flags, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    missing = [f"--{name}" for name in ("model", "adapter", "output_dir") if getattr(flags, name) is None]
    if rest and not flags.help:
        raise ConfigError(f"export does not know {' '.join(rest)!r}. `fullrank export --help` lists its options.")
    if missing and not flags.help:
        raise ConfigError(f"export needs {', '.join(missing)}. `fullrank export --help` explains them.")
    return flags


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


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags of the command itself, and every ``--section.field value`` as a dotted key and a string."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        flags, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    overrides: dict[str, str] = {}
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or len(token) == 2:
            raise ConfigError(f"expected --section.field, got {token!r}. Quote a value that has spaces.")
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, such as --{key} true.")
            value = rest.pop(0)
        overrides[key] = value
    return flags, overrides


def print_help(config: RunConfig) -> None:
    """Every field of a run with this method: meaning, unit, type, and the value it would have."""
    from fullrank.methods import METHODS
    from fullrank.train.resolve import build_parser

    parser = build_parser(config.method_name)
    given = config.to_dict()
    given["method"].pop("name")
    parser.set_defaults({f"{s}.{key}": value for s in ("model", "data", "method") for key, value in given[s].items()})
    text = parser.format_help()
    # jsonargparse also lists a file for each section and a way to append to lists, which a run does not take.
    text = re.sub(r"\n  --(model|data|method) CONFIG .*", "", text[text.index("The network") :])
    text = re.sub(r", --[\w.]+\+ \w+", "", text)
    print(PRETRAIN_USAGE.format(methods=", ".join(METHODS), method=config.method_name))
    print(text)


COMMANDS = {"pretrain": pretrain, "export": export, "analyze": analyze, "recipes": recipes}
APPLICATION = ("transformers", "accelerate", "datasets", "peft", "jsonargparse", "yaml", "matplotlib", "tokenizers")
