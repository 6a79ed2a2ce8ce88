"""``fullrank plan``: what a run will need, before it is started."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fullrank.cli.arguments import pairs, read_options, separate
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from fullrank.plan.options import PlanOptions

PLAN_USAGE = """\
usage: fullrank plan --model MODEL [--sequence_length N] [--batch_size N] [--methods METHOD,METHOD] [--gpu 24GB]
                     [--SECTION.FIELD VALUE ...] [--METHOD.FIELD VALUE ...] [--json FILE] [--figure FILE]
       fullrank plan RECIPE_OR_RUN [--gpu 24GB] [...]

How much memory does each method need: weights, gradients, optimizer states, activations, and the peak of a step?
Reads a model's configuration and nothing else. With --gpu it says what fits, what to change where it does not, and how
large rank, density and batch may be.

  RECIPE_OR_RUN          a packaged recipe (`fullrank recipes`), a YAML file, or a run's folder
  --SECTION.FIELD VALUE  any setting of a run, for all methods that have it: --method.rank 64, --trainer.bf16 true
  --METHOD.FIELD VALUE   an option of one method: --sift.density 0.05
"""


def plan(arguments: list[str]) -> int:
    """``fullrank plan --model MODEL``."""
    found = read_plan(arguments)
    if found is None:
        return 0
    from fullrank.plan.run import plan as run

    options, overrides = found
    print(run(options, overrides))
    return 0


def read_plan(arguments: list[str]) -> tuple[PlanOptions, dict[str, Any]] | None:
    """What ``fullrank plan`` is told, and the settings of its runs; None if help was asked for and printed.

    Raises:
        ConfigError: If an option is unknown or of the wrong type, or there is more than one configuration.
    """
    from fullrank.methods import METHODS
    from fullrank.plan.options import PlanOptions

    if {"-h", "--help"} & set(arguments):
        read_options(PlanOptions, arguments, command="plan", usage=PLAN_USAGE)
        return None
    words, rest = separate(arguments, [])
    given = pairs(rest)
    known = {field.name for field in fields(PlanOptions)}
    own = [f"--{key}={value}" for key, value in given.items() if "." not in key]
    options = read_options(PlanOptions, own, command="plan", usage=PLAN_USAGE)
    assert options is not None  # no help was asked for
    if options.methods and (methods := [word for word in words if word.strip(",") in METHODS]):
        raise ConfigError(f"methods are one list without spaces: --methods {','.join([*options.methods, *methods])}.")
    if len(words) > 1 or (words and options.config is not None):
        named = [*words, *([options.config] if options.config else [])]
        raise ConfigError(f"plan takes one recipe or run folder, got {', '.join(named)}. Keep one.")
    if words:
        options = replace(options, config=words[0])
    return options, {key: value for key, value in given.items() if "." in key and key not in known}
