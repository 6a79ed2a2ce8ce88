"""``fullrank pretrain`` and ``fullrank finetune``, and the recipes that they run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.cli.arguments import split_arguments
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from fullrank.train.config import RunConfig
    from fullrank.train.kinds import Command

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
  --trainer.fused_backward true
                        step each parameter as its gradient arrives, and free the gradient
{parallel}
"""

FINETUNE_USAGE = """\
usage: fullrank finetune --model.name MODEL --data.name EXAMPLES [--method.name NAME] [--SECTION.FIELD VALUE ...]
       fullrank finetune --config RECIPE [--SECTION.FIELD VALUE ...]
       fullrank finetune --resume DIR

Trains a causal language model on instructions, prompts, conversations or text, or an encoder on a task of GLUE.

  --config RECIPE       a packaged recipe (`fullrank recipes`) or a YAML file; default: none
  --data.task TASK      instructions (default), or a task of GLUE: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte; the
                        options of `data` below are those of {task}
  --method.name NAME    {methods}; the options of `method` below are those of {method}
  --resume DIR          go on with the run in DIR from its newest complete checkpoint
  --print_config        print the resolved configuration as YAML and stop
  --trainer.FIELD VALUE any field of transformers.TrainingArguments (num_train_epochs, eval_strategy, bf16, ...), and
                        trainer.total_batch_size: examples per optimizer step over all devices, from which the
                        accumulation is derived
  --trainer.fused_backward true
                        step each parameter as its gradient arrives, and free the gradient
{parallel}
"""


PARALLEL = """\
Several processes, under torchrun:
  --trainer.strategy S  ddp (default: each holds the model) or fsdp2 (the model is spread over them)
  --trainer.shard_size N processes that fsdp2 spreads one copy of the model over; default: all"""

FIRST_SECTION = {"pretrain": "The network", "finetune": "The trained network"}
"""Where the options begin in what jsonargparse prints."""


def pretrain(arguments: list[str]) -> int:
    """``fullrank pretrain``."""
    return _train("pretrain", arguments)


def finetune(arguments: list[str]) -> int:
    """``fullrank finetune``."""
    return _train("finetune", arguments)


def _train(command: Command, arguments: list[str]) -> int:
    """Resolve the configuration of a run, and print it or make the run."""
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
    if flags.help and recipe is None and command == "finetune":
        overrides = {"model.name": "MODEL", "data.name": "EXAMPLES"} | overrides
    config = resolve(recipe, overrides, command=command)
    if flags.help:
        print_help(config)
        return 0
    if flags.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    from fullrank.sharding import disconnect
    from fullrank.train import run
    from fullrank.train.report import summary

    make = run.pretrain if command == "pretrain" else run.finetune
    result = make(config, resume=flags.resume is not None)
    disconnect()
    if result is None:
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(summary(result))
    return 0


def recipes(arguments: list[str]) -> int:
    """``fullrank recipes [show NAME]``."""
    from fullrank.train.recipes import describe_recipes, show_recipe

    if not arguments:
        print(describe_recipes())
    elif arguments[0] == "show" and len(arguments) == 2:
        print(show_recipe(arguments[1]), end="")
    elif arguments[0] in ("-h", "--help"):
        print("usage: fullrank recipes [show NAME]")
    else:
        raise ConfigError(f"recipes takes nothing, or show and one name; got {' '.join(arguments)!r}.")
    return 0


def print_help(config: RunConfig) -> None:
    """Every field of a run with this method: meaning, unit, type, and the value it would have."""
    from fullrank.methods import METHODS
    from fullrank.train.kinds import Kind
    from fullrank.train.resolve import build_parser

    task = getattr(config.data, "task", None)
    parser = build_parser(Kind(config.method_name, task))
    given = config.to_dict()
    given["method"].pop("name")
    parser.set_defaults({f"{s}.{key}": value for s in ("model", "data", "method") for key, value in given[s].items()})
    text = parser.format_help()
    # jsonargparse also lists a file for each section and a way to append to lists, which a run does not take.
    text = re.sub(r"\n  --(model|data|method) CONFIG .*", "", text[text.index(FIRST_SECTION[config.command]) :])
    text = re.sub(r", --[\w.]+\+ \S+", "", text)
    usage = PRETRAIN_USAGE if config.command == "pretrain" else FINETUNE_USAGE
    print(usage.format(methods=", ".join(METHODS), method=config.method_name, task=task, parallel=PARALLEL))
    print(text)
