"""A comparison as a table: for the terminal, as Markdown, and as CSV with plain numbers."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence

from fullrank.report.comparison import Comparison, Row, rate_key
from fullrank.report.published import Published, beside, differences

EDGE = "*"
"""Mark of a best rate at an edge of those tried."""
WIDTH = 110
"""Of notes in the terminal (characters)."""
AS_THEY_ARE = ("perplexity", "loss")
"""Metrics that are no shares; shares and correlations are shown in percent."""
BYTES = {
    "state": "optimizer_state_bytes",
    "gradients": "gradient_bytes",
    "weights": "weight_bytes",
    "peak": "peak_memory_bytes",
}
"""Columns of memory, and where their numbers are."""
NOTHING = "-"


def terminal(comparison: Comparison) -> str:
    """The table in aligned columns, labels without a score in words below it, and the notes."""
    header = _header(comparison)
    scored = [row for row in comparison.rows if row.score is not None]
    lines = [comparison.title, ""]
    if scored:
        cells = [header, *(_cells(comparison, row) for row in scored)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        lines += [_aligned(row, widths) for row in cells]
    lines += [f"{row.label}: {_failed(row)}" for row in comparison.rows if row.score is None]
    if any(row.at_edge for row in scored):
        lines += ["", f"{EDGE} at an edge of the rates that were tried"]
    lines += [""] if comparison.notes else []
    for note in comparison.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """The table, the scores at every rate, the notes and the papers' numbers, as Markdown."""
    scored = [row for row in comparison.rows if row.score is not None]
    failed = [f"- {_escaped(row.label)}: {_failed(row)}" for row in comparison.rows if row.score is None]
    edge = f"{_escaped(EDGE)} at an edge of the rates that were tried."
    parts = [
        f"# {_escaped(comparison.title)}",
        _table(*_all_escaped(_header(comparison), [_cells(comparison, row) for row in scored])) if scored else "",
        edge if any(row.at_edge for row in scored) else "",
        "\n".join(failed),
        f"## Every rate\n\n{_name(comparison.metric)} with the first seed.",
        _grid(comparison),
        "## Notes" if comparison.notes else "",
        "\n".join(f"- {_escaped(note)}" for note in comparison.notes),
        *_published(comparison),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_text(comparison: Comparison) -> str:
    """A line a label: plain numbers, their units in the header; what is not known is empty."""
    seeds = sorted({seed for row in comparison.rows for seed in row.scores})
    metric = comparison.metric
    header = [
        *("label", "method", "learning_rate", "at_edge", f"{metric}_mean"),
        *(f"{metric}_seed_{seed}" for seed in seeds),
        f"relative_to_{comparison.baseline}",
        *("optimizer_state_bytes", "gradient_bytes", "weight_bytes", "model_memory_bytes", "peak_memory_bytes"),
        *("step_time_s", "tokens_per_s"),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in comparison.rows:
        writer.writerow(
            [
                *(row.label, row.method, row.lr, str(row.at_edge).lower(), row.score),
                *(row.scores.get(seed) for seed in seeds),
                row.relative,
                *(row.optimizer_state_bytes, row.gradient_bytes, row.weight_bytes, row.model_memory_bytes),
                *(row.peak_memory_bytes, row.step_time_s, row.tokens_per_s),
            ]
        )
    return text.getvalue()


def score_text(metric: str, value: float) -> str:
    """A score for people: a perplexity as it is, a share or a correlation in percent."""
    if metric == "loss":
        return f"{value:.4f}"
    if metric not in AS_THEY_ARE:
        return f"{100 * value:.2f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _header(comparison: Comparison) -> list[str]:
    unit = _unit(comparison)
    return [
        *("label", "best lr", _name(comparison.metric), f"of {comparison.baseline}"),
        *(f"{name} {unit}" for name in BYTES),
        *("step ms", "tokens/s"),
    ]


def _name(metric: str) -> str:
    """A metric with its unit."""
    return metric if metric in AS_THEY_ARE else f"{metric} %"


def _unit(comparison: Comparison) -> str:
    """One unit for all memory of a table: MB, or GB where most would have five digits."""
    sizes = [size for row in comparison.rows for name in BYTES.values() if (size := getattr(row, name)) is not None]
    return "GB" if max(sizes, default=0) >= 1e10 else "MB"


def _cells(comparison: Comparison, row: Row) -> list[str]:
    """A row with a score, as texts."""
    assert row.score is not None
    assert row.lr is not None
    divisor = {"MB": 1e6, "GB": 1e9}[_unit(comparison)]
    score = score_text(comparison.metric, row.score)
    if len(row.scores) > 1:
        score += f" ({', '.join(score_text(comparison.metric, value) for _, value in sorted(row.scores.items()))})"
    sizes = [getattr(row, name) for name in BYTES.values()]
    digits = 1 if divisor == 1e6 else 2
    return [
        row.label,
        f"{row.lr:g}{EDGE if row.at_edge else ''}",
        score,
        NOTHING if row.relative is None else f"{row.relative:.1%}",
        *(NOTHING if size is None else f"{size / divisor:,.{digits}f}" for size in sizes),
        NOTHING if row.step_time_s is None else _milliseconds(row.step_time_s),
        NOTHING if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.{0 if seconds >= 0.1 else 1}f}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The label to the left, numbers to the right."""
    texts = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *texts])


def _failed(row: Row) -> str:
    """What became of a label without a score, in words."""
    return "; ".join(f"{word} at {rate}" for rate, word in row.grid.items())


def _grid(comparison: Comparison) -> str:
    """Label by rate: the score with the first seed, or what became of the run."""
    rates = sorted({rate for row in comparison.rows for rate in row.grid}, key=float)
    rows = []
    for row in comparison.rows:
        best = "" if row.lr is None or row.score is None else rate_key(row.lr)
        cells = []
        for rate in rates:
            entry = row.grid.get(rate, "")
            text = entry if isinstance(entry, str) else score_text(comparison.metric, entry)
            cells.append(f"**{text}**" if rate == best else text)
        rows.append([_escaped(row.label), *cells])
    return _table(["label", *rates], rows)


def _published(comparison: Comparison) -> list[str]:
    """The section of the papers' numbers; empty without any."""
    shown = beside(comparison)
    if not shown:
        return []
    header = ["label", f"ours ({_name(comparison.metric)})", "published", "model", "tokens", "memory", "source"]
    rows = [
        [row.label, score_text(comparison.metric, row.score or 0.0), *_published_cells(comparison.metric, number)]
        for row, numbers in shown
        for number in numbers
    ]
    return [
        "## Published",
        "Numbers of the papers; what sets them apart from ours stands below.",
        _table(*_all_escaped(header, rows)),
        "\n".join(f"- {_escaped(line)}" for line in differences(comparison)),
    ]


def _published_cells(metric: str, number: Published) -> list[str]:
    memory = NOTHING if number.memory_gb is None else f"{number.memory_gb:g}G ({number.memory_of})"
    return [
        score_text(metric, number.value),
        number.size.upper() if number.size[0].isdigit() else number.size,
        NOTHING if number.tokens is None else f"{number.tokens / 1e9:g}B",
        memory,
        number.source + (f"; {number.setting}" if number.setting else ""),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, columns that begin with a figure to the right; cells are escaped already."""
    numeric = [any(row[column][:1].isdigit() for row in rows) for column in range(len(header))]
    lines = [header, ["---:" if column and right else "---" for column, right in enumerate(numeric)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _all_escaped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    return [_escaped(cell) for cell in header], [[_escaped(cell) for cell in row] for row in rows]


def _escaped(text: str) -> str:
    """Text in which Markdown sees no marks of its own."""
    for mark in "\\|*_`<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
