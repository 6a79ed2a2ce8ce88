"""``fullrank analyze``: measurements of gradients, of training and of trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fullrank.cli.arguments import read_options
from fullrank.errors import ConfigError

if TYPE_CHECKING:
    from fullrank.analysis.output import Findings

Parts = tuple[type[Any], Callable[[Any], "Findings | None"]]
"""The dataclass of an analysis' options, and the analysis; what it trains may be stopped, then it finds nothing yet."""


@dataclass(frozen=True)
class Analysis:
    """One analysis, as the command knows it."""

    about: str
    """What it says, in one line."""
    usage: str
    """Printed above its options."""
    load: Callable[[], Parts]
    """Imports the dataclass of its options and itself, whose packages take seconds to load."""
    words: str | None = "runs"
    """The option that takes what stands without ``--``."""
    overrides: str | None = None
    """The option that takes ``--SECTION.FIELD VALUE`` of a run's configuration."""


ANALYZE_USAGE = """\
usage: fullrank analyze NAME [RUN ...] [--OPTION VALUE ...]

Measures something, prints a table and writes NAME.json, NAME.csv, NAME.png and NAME.svg into a new folder.

{analyses}

`fullrank analyze NAME --help` explains one with its options.
"""

SPECTRUM_USAGE = """\
usage: fullrank analyze spectrum RUN [RUN ...] [--base FOLDER] [--threshold 0.1] [--target_modules attn,mlp]
                                 [--output_dir DIR]

How many directions did training change? For each type of matrix the singular values of (trained weights - weights that
training started from): how many are below the threshold, the effective and the numerical rank.

  RUN   a run's folder, a checkpoint in it, or any model's folder; LABEL=FOLDER names it in the results
"""

SPARSITY_USAGE = """\
usage: fullrank analyze sparsity RUN [RUN ...] [--OPTION VALUE ...]
       fullrank analyze sparsity --config RECIPE [--SECTION.FIELD VALUE ...] [--OPTION VALUE ...]
       fullrank analyze sparsity MODEL [MODEL ...] --config RECIPE [--SECTION.FIELD VALUE ...] [--OPTION VALUE ...]

How few entries hold the norm of the gradient, as SIFT assumes? For each type of weight and over all: the share of the
L2 norm, of the squares and of the L1 norm in the largest entries.

  RUN                    a run's folder or a checkpoint in it: its weights, on the data of its configuration;
                         LABEL=FOLDER names it in the results
  --config RECIPE        a packaged recipe (`fullrank recipes`) or a YAML file: the model as such a run starts, on its
                         data; with a MODEL, a folder or hub name, that model on these data
  --SECTION.FIELD VALUE  a setting of such a run (--data.name, --model.name, --seed, ...), or of the RUNs' data
"""


SIMILARITY_USAGE = """\
usage: fullrank analyze similarity --config RECIPE [--SECTION.FIELD VALUE ...] [--full.FIELD VALUE ...]
                                   [--trace_every 20] [--num_columns 100] [--output_dir DIR]
       fullrank analyze similarity LOW_RUN FULL_RUN [--output_dir DIR]

Are the scaling factors of low-rank training those of full-rank training, as Fira assumes? Trains the recipe's low-rank
method and full-rank AdamW alike, compares the factors of matrices and of columns by rank correlation, and prints them
below the published table. Stopped (Ctrl-C) and called again it goes on.

  --config RECIPE        a packaged recipe (`fullrank recipes`) or a YAML file of fira, galore or apollo
  --SECTION.FIELD VALUE  a setting of both runs (--trainer.max_steps, --seed, ...); of `method`, of the low-rank one
  LOW_RUN FULL_RUN       instead: folders of two runs that hold a trace.jsonl
"""


LIMITER_USAGE = """\
usage: fullrank analyze limiter --config RECIPE [--SECTION.FIELD VALUE ...] [--OPTION VALUE ...]
       fullrank analyze limiter RUN [RUN_WITHOUT] [--OPTION VALUE ...]

What does the norm-growth limiter of Fira do? Trains with it and without it, all else the same: how often and how much
it acts in each type of matrix, the losses and their spikes. Stopped (Ctrl-C) and called again it goes on.

  --config RECIPE        a packaged recipe (`fullrank recipes`) or a YAML file of fira or apollo
  --SECTION.FIELD VALUE  a setting of both runs (--trainer.max_steps, --method.limiter_gamma, --seed, ...)
  RUN RUN_WITHOUT        instead: folders of runs that hold a trace.jsonl; the one without may be left out
"""


def _spectrum() -> Parts:
    from fullrank.analysis.spectrum_run import SpectrumOptions, analyze_spectrum

    return SpectrumOptions, analyze_spectrum


def _sparsity() -> Parts:
    from fullrank.analysis.sparsity_run import SparsityOptions, analyze_sparsity

    return SparsityOptions, analyze_sparsity


def _similarity() -> Parts:
    from fullrank.analysis.similarity_run import SimilarityOptions, analyze_similarity

    return SimilarityOptions, analyze_similarity


def _limiter() -> Parts:
    from fullrank.analysis.limiter_run import LimiterOptions, analyze_limiter

    return LimiterOptions, analyze_limiter


ANALYSES = {
    "similarity": Analysis(
        "are low-rank scaling factors those of full-rank training: what Fira assumes",
        SIMILARITY_USAGE,
        _similarity,
        overrides="overrides",
    ),
    "limiter": Analysis(
        "what the norm-growth limiter does, and what happens without it: Fira's loss spikes",
        LIMITER_USAGE,
        _limiter,
        overrides="overrides",
    ),
    "spectrum": Analysis(
        "how many directions did training change: singular values of the update", SPECTRUM_USAGE, _spectrum
    ),
    "sparsity": Analysis(
        "how few entries hold the gradient's norm: what SIFT assumes", SPARSITY_USAGE, _sparsity, overrides="overrides"
    ),
}
"""Name -> analysis, in the order they are listed in."""


def analyze(arguments: list[str]) -> int:
    """``fullrank analyze NAME ...``."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(ANALYZE_USAGE.format(analyses=describe_analyses()))
        return 0
    run, options = read_analysis(arguments)
    if options is None:
        return 0
    if (found := run(options)) is None:
        return 130
    print(found)
    return 0


def read_analysis(arguments: list[str]) -> tuple[Callable[[Any], Findings | None], Any]:
    """The analysis that a command line names and its options, which are None if help was asked for and printed.

    Raises:
        ConfigError: If there is no such analysis, or an option of it is unknown or of the wrong type.
    """
    from fullrank.train.recipes import nearest

    name = arguments[0] if arguments else "nothing"
    if name not in ANALYSES:
        raise ConfigError(
            f"analyze can measure: {', '.join(ANALYSES)}. Got {name!r}.{nearest(name, ANALYSES)} `fullrank analyze "
            "--help` says what each is."
        )
    chosen = ANALYSES[name]
    kind, run = chosen.load()
    options = read_options(
        kind,
        arguments[1:],
        command=f"analyze {name}",
        usage=chosen.usage,
        words=chosen.words,
        overrides=chosen.overrides,
    )
    return run, options


def describe_analyses() -> str:
    """A line for each analysis: its name, and what it says."""
    width = max(map(len, ANALYSES))
    return "\n".join(f"  {name:<{width}}  {analysis.about}" for name, analysis in ANALYSES.items())
