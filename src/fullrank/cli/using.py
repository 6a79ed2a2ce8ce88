"""``fullrank evaluate``, ``generate`` and ``export``: what a trained model is used for."""

from __future__ import annotations

import argparse

from fullrank.cli.arguments import read_options
from fullrank.errors import ConfigError

EXPORT_USAGE = """\
usage: fullrank export --model MODEL [--adapter DIR] --output_dir OUT [--dtype DTYPE]

Writes a trained model, adapter merged, as a folder that from_pretrained loads, with its tokenizer.

  --model MODEL     a run's folder, one of its checkpoints, a model's folder or hub name; with an adapter, its base:
                    another one than it was trained from is refused
  --adapter DIR     folder of an adapter: adapter/ of a run, what PEFT saved, or what SIFT.save_adapter wrote
  --output_dir OUT  folder to write; must be new or empty
  --dtype DTYPE     float32, bfloat16 or float16; default: that of the model's files
"""

EVALUATE_USAGE = """\
usage: fullrank evaluate --model MODEL [--adapter DIR] --tasks TASK,TASK [--data.TASK PATH ...] [--output_dir DIR]

Scores a model and prints a table; writes eval.json. The same command again goes on where it was stopped.

  TASK   perplexity; boolq, piqa, social_i_qa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, or
         commonsense for all eight; mmlu, or mmlu_SUBJECT; humaneval; cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte
  PATH   local files of a task, in the authors' layout; without: the hub
"""

GENERATE_USAGE = """\
usage: fullrank generate --model MODEL [--adapter DIR] --prompt TEXT [--OPTION VALUE ...]

Prints how a language model goes on after the prompt, put to it as in its fine-tuning, or the class that a classifier
gives to it.
"""


def evaluate(arguments: list[str]) -> int:
    """``fullrank evaluate --model MODEL --tasks TASK,TASK``."""
    from fullrank.evaluation.config import EvaluateConfig

    config = read_options(EvaluateConfig, arguments, command="evaluate", usage=EVALUATE_USAGE)
    if config is None:
        return 0
    from fullrank.evaluation.run import evaluate as run
    from fullrank.evaluation.table import table

    print(table(run(config)))
    return 0


def generate(arguments: list[str]) -> int:
    """``fullrank generate --model MODEL --prompt TEXT``."""
    from fullrank.train.generate import GenerateConfig
    from fullrank.train.generate import generate as run

    config = read_options(GenerateConfig, arguments, command="generate", usage=GENERATE_USAGE)
    if config is not None:
        print(run(config))
    return 0


def export(arguments: list[str]) -> int:
    """``fullrank export --model MODEL [--adapter DIR] --output_dir OUT [--dtype DTYPE]``."""
    flags = export_flags(arguments)
    if flags.help:
        print(EXPORT_USAGE)
        return 0
    from fullrank.train.export import export as run

    print(run(flags.model, flags.output_dir, adapter=flags.adapter, dtype=flags.dtype))
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
    missing = [f"--{name}" for name in ("model", "output_dir") if getattr(flags, name) is None]
    if rest and not flags.help:
        raise ConfigError(f"export does not know {' '.join(rest)!r}. `fullrank export --help` lists its options.")
    if missing and not flags.help:
        raise ConfigError(f"export needs {', '.join(missing)}. `fullrank export --help` explains them.")
    return flags
