"""The command ``fullrank``: thin, so that everything it does can be done from Python."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from fullrank import __version__
from fullrank.cli.analysis import analyze
from fullrank.cli.comparing import compare
from fullrank.cli.planning import plan
from fullrank.cli.reporting import report
from fullrank.cli.training import finetune, pretrain, recipes
from fullrank.cli.using import evaluate, export, generate
from fullrank.errors import CheckpointError, ConfigError, DisconnectedError, TrainingError, UnsupportedError

USAGE = """\
usage: fullrank COMMAND [OPTIONS]

commands:
  plan          how much memory each method needs, what fits a GPU and what to change, before a run
  pretrain      train a language model from scratch (or go on with one)
  finetune      train a trained model on instructions, or on a task of GLUE
  evaluate      score a model: perplexity, commonsense tasks, MMLU, HumanEval, GLUE
  compare       train several methods at a grid of learning rates, and report on them side by side
  report        compare finished runs: a table, figures, one HTML page
  generate      let a model continue a prompt, or tell its class
  export        write a model, adapter merged, as a plain model folder
  analyze       measure gradients, training and weights: similarity, limiter, spectrum, sparsity
  recipes       list the packaged recipes; `recipes show NAME` prints one

`fullrank COMMAND --help` explains a command; `fullrank --version` prints the version.
"""

COMMANDS = {
    "plan": plan,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "generate": generate,
    "export": export,
    "analyze": analyze,
    "recipes": recipes,
}
EXTRAS = {
    **dict.fromkeys(
        ("transformers", "accelerate", "datasets", "peft", "trl", "jsonargparse", "yaml", "matplotlib", "tokenizers"),
        "train",
    ),
    **dict.fromkeys(("lm_eval", "sklearn", "scipy"), "eval"),
    **dict.fromkeys(("plotly", "jinja2", "rich"), "report"),
}
"""Package that may be missing -> the extra that brings it."""


ALONE_AFTER = 15.0
"""Seconds after which a process takes an error for its own, which the first one of its machine has not met."""


def let_first_speak() -> None:
    """Print an error once where all processes meet it: the launcher ends the others as soon as the first one ends."""
    if int(os.environ.get("LOCAL_RANK") or 0) > 0:
        time.sleep(ALONE_AFTER)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of bitsandbytes' products is to be shown: not that of a cast, once for each pass of a layer."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 1 failed, 2 wrong usage, 3 diverged, 130 stopped)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fullrank").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(is_news)
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        print(__version__ if arguments == ["--version"] else USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"unknown command {arguments[0]!r}. Commands: {', '.join(COMMANDS)}.")
        return COMMANDS[arguments[0]](arguments[1:])
    except (ConfigError, CheckpointError, TrainingError, UnsupportedError) as error:
        if not isinstance(error, DisconnectedError):
            let_first_speak()
        print(f"fullrank: {error}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        print(f"fullrank: {package} is missing. Install it: pip install 'fullrank[{EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would only print a traceback on the way out
        print("fullrank: stopped at once; what was saved before stays", file=sys.stderr)
        return 130
