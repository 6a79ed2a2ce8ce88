"""``fullrank compare``: methods side by side."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fullrank.cli.arguments import read_options, with_switches
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from fullrank.compare.config import CompareConfig

COMPARE_USAGE = """\
usage: fullrank compare [--config RECIPE] [--methods METHOD,METHOD] [--lr_grid RATE,RATE] [--seeds SEED,SEED]
                        [--output_dir DIR] [--SECTION.FIELD VALUE ...] [--LABEL.FIELD VALUE ...]
       fullrank compare --resume DIR

Trains each method at a small grid of learning rates, with the same model, data order, token budget and loop, and
writes a table, figures and one HTML page. With --output_dir the same command again goes on where it was stopped.

  --SECTION.FIELD VALUE  any setting of a run, for all of them: --trainer.max_steps 500, --method.rank 64
  --LABEL.FIELD VALUE    an option of one method, or of one variant of it: --relora.restart_every 100
  --lr_grid.LABEL RATES  the grid of one of them
  --resume DIR           go on with the comparison in DIR, with the options that it has
"""


def compare(arguments: list[str]) -> int:
    """``fullrank compare --config RECIPE --methods METHOD,METHOD``."""
    options = comparison(arguments)
    if options is None:
        return 0
    from fullrank.compare.run import compare as run
    from fullrank.compare.run import load_options
    from fullrank.report.table import terminal

    config, overrides, resumed = options
    if resumed is not None:
        config, overrides = load_options(resumed)
    found = run(config, overrides)
    if found is None:
        return 0 if config.dry_run else 130
    print(terminal(found))
    return 1 if any(row.score is None for row in found.rows) else 0


def comparison(arguments: list[str]) -> tuple[CompareConfig, dict[str, Any], str | None] | None:
    """The options of a comparison, the settings of its runs, and the folder to go on in if one is given.

    Returns:
        None if help was asked for and printed.

    Raises:
        ConfigError: If an option is unknown or of the wrong type, or stands beside ``--resume``.
    """
    from fullrank.compare.config import FOR_ALL, CompareConfig

    if {"-h", "--help"} & set(arguments):
        read_options(CompareConfig, arguments, command="compare", usage=COMPARE_USAGE)
        return None
    given = with_switches(arguments, ["dry_run"])
    resumed = given.pop("resume", None)
    if resumed is not None and given:
        raise ConfigError("--resume takes its options from the comparison. Leave out all others.")
    if "lr_grid" in given:
        given[f"lr_grid.{FOR_ALL}"] = given.pop("lr_grid")
    known = {field.name for field in fields(CompareConfig)}
    own = [f"--{key}={value}" for key, value in given.items() if key.partition(".")[0] in known]
    config = read_options(CompareConfig, own, command="compare", usage=COMPARE_USAGE)
    assert config is not None  # no help was asked for
    return config, {key: value for key, value in given.items() if key.partition(".")[0] not in known}, resumed
