"""``fullrank report``: finished runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fullrank.cli.arguments import read_options

if TYPE_CHECKING:
    from fullrank.report.sources import ReportOptions

REPORT_USAGE = """\
usage: fullrank report RUN [RUN ...] [--output_dir DIR] [--title TEXT]

Compares runs: prints a table, and writes it with figures, the papers' numbers and one HTML page. Runs with the same
label are one line, at their best learning rate; what makes the comparison unfair is told.

  RUN  a run's folder, or LABEL=FOLDER; the folder of `fullrank compare`; or the compare.json of an earlier report.
       The label of a run is its method, or in a comparison the name of its variant
"""


def report(arguments: list[str]) -> int:
    """``fullrank report RUN ...``."""
    options = read_report(arguments)
    if options is None:
        return 0
    from fullrank.report.sources import report as run
    from fullrank.report.table import terminal

    comparison, files = run(options)
    print(terminal(comparison))
    print(f"\n{options.output_dir}: {', '.join(file.name for file in files)}")
    return 0


def read_report(arguments: list[str]) -> ReportOptions | None:
    """What ``fullrank report`` is told; None if help was asked for and printed.

    Raises:
        ConfigError: If an option is unknown or of the wrong type.
    """
    from fullrank.report.sources import ReportOptions

    return read_options(ReportOptions, arguments, command="report", usage=REPORT_USAGE, words="runs")
