"""One HTML file that holds a whole comparison: it opens from a disk, loads nothing from elsewhere, its charts answer.

plotly.js lies in the file, packed by gzip and written as base64 (2 MB instead of 5), and the page unpacks it; a
browser that cannot shows everything but the charts. The file depends on the comparison and the installed versions
alone: the same comparison gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fullrank.analysis.table import finite
from fullrank.report.comparison import Comparison, Row, rate_key
from fullrank.report.page_tables import (
    EDGE,
    EDGE_WORDS,
    better,
    grid_table,
    metric_name,
    papers_table,
    results_table,
    runs_table,
)
from fullrank.report.page_words import cards, facts, summary
from fullrank.report.published import differences
from fullrank.report.runs import Curve, Run
from fullrank.report.settings import common_settings, own_settings, surroundings
from fullrank.report.table import AS_THEY_ARE, csv_text

FOLDER = Path(__file__).parent
DIGITS = 5
"""Significant digits of a point in a chart."""


def page(comparison: Comparison) -> str:
    """The HTML of a comparison.

    Labels, titles and notes come from users and are text wherever they stand: the template escapes them, and what the
    scripts read is JSON without ``<``.
    """
    comparison = replace(comparison, rows=[Row(**finite(vars(row))) for row in comparison.rows])
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    papers = papers_table(comparison)
    return environment.get_template("page.html").render(
        comparison=comparison,
        version=version("fullrank"),
        facts=facts(comparison),
        sections=_sections(papers=papers is not None),
        summary=summary(comparison),
        cards=cards(comparison),
        metric_title=metric_name(comparison),
        better_corner=f"Best is at the {'top' if comparison.greater_is_better else 'bottom'} left.",
        results=results_table(comparison),
        results_legend=[f"{EDGE} {EDGE_WORDS}"] if any(row.at_edge for row in comparison.rows) else [],
        better=better(comparison),
        grid=grid_table(comparison),
        runs=runs_table(comparison),
        papers=papers,
        differences=differences(comparison),
        common=common_settings(comparison.runs),
        owned=own_settings(comparison.runs),
        surroundings=surroundings(comparison.runs),
        csv=base64.b64encode(csv_text(comparison).encode()).decode(),
        data=Markup(_json(chart_data(comparison))),
        style=_asset("page.css"),
        theme_script=_asset("page_theme.js"),
        script=_asset("page.js") + _asset("page_charts.js"),
        plotly=Markup(_packed_plotly()),
        plotly_version=_plotly_version(),
    )


def chart_data(comparison: Comparison) -> dict[str, Any]:
    """What the charts are drawn from, ready for JSON."""
    unit = " (nats per token)" if comparison.metric == "perplexity" else ""
    best = {row.label: row.lr for row in comparison.rows}
    scale = 1 if comparison.metric in AS_THEY_ARE else 100  # per cent
    return {
        "metric": metric_name(comparison).lower(),
        "digits": 4 if comparison.metric == "loss" else 2,
        "baseline": comparison.baseline,
        "labels": list(dict.fromkeys(run.label for run in comparison.runs)),
        "seeds": len({run.seed for run in comparison.runs}),
        "loss": {"train": f"training loss{unit}", "validation": f"validation loss{unit}"},
        "rows": [
            {
                "label": row.label,
                "lr": row.lr,
                "score": _scaled(row.score, scale),
                "scores": [[seed, _scaled(found, scale)] for seed, found in sorted(row.scores.items())],
                "memory": row.model_memory_bytes,
                "grid": [[float(key), _scaled(found, scale)] for key, found in row.grid.items()],
            }
            for row in comparison.rows
        ],
        "runs": [_run_data(run, best[run.label]) for run in comparison.runs],
    }


def _run_data(run: Run, best: float | None) -> dict[str, Any]:
    return {
        "label": run.label,
        "lr": run.lr,
        "seed": run.seed,
        "outcome": run.outcome,
        "best": best is not None and run.result is not None and rate_key(run.lr) == rate_key(best),
        "train": _points(run.train),
        "validation": _points(run.validation),
    }


def _points(curve: Curve) -> dict[str, list[float]]:
    """The points of a curve that can be drawn, with no more digits than can be seen."""
    pairs = zip(curve.tokens, curve.time_s, curve.loss, strict=True)
    drawn = [(tokens, time, loss) for tokens, time, loss in pairs if loss is not None and math.isfinite(loss)]
    return {
        "tokens": [tokens for tokens, _, _ in drawn],
        "time_s": [_rounded(time) for _, time, _ in drawn],
        "loss": [_rounded(loss) for _, _, loss in drawn],
    }


def _scaled(value: float | str | None, scale: int) -> float | str | None:
    """A score in the unit of the tables; the word for a run without one stays."""
    return value * scale if isinstance(value, int | float) else value


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _json(content: Any) -> str:
    """JSON that may stand in a script element: no ``<`` that could close it or open a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sections(*, papers: bool) -> dict[str, str]:
    """Headings of the page by their anchor."""
    return {
        "results": "Results",
        "curves": "Curves",
        **({"papers": "Beside the papers"} if papers else {}),
        "configs": "Settings",
        "environment": "Environment",
        "runs": "All runs",
    }


def _asset(name: str) -> Markup:
    """A style sheet or script of ours, which is no text to escape."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


@functools.cache
def _packed_plotly() -> str:
    """plotly.js as lines of base64 of its gzip; without a time in its head, so that the bytes are always the same."""
    from plotly.offline import get_plotlyjs

    return base64.encodebytes(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode("ascii")


@functools.cache
def _plotly_version() -> str:
    """The version that plotly.js names in its head."""
    from plotly.offline import get_plotlyjs

    found = re.search(r"plotly\.js v([\w.-]+)", get_plotlyjs()[:1000])
    return found[1] if found else ""
