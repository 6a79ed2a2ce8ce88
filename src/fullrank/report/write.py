"""A comparison as files: numbers, tables, figures and a page."""

from __future__ import annotations

import json
from pathlib import Path

from fullrank.report import figures, published, table
from fullrank.report.comparison import Comparison
from fullrank.report.page import page
from fullrank.train.report import write_whole


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.json``, ``compare.csv``, ``compare.md``, the figures and ``report.html``.

    Each file is written whole or not at all; those of an earlier report are replaced.

    Args:
        comparison: What to report.
        folder: Folder for the files; made if need be.

    Returns:
        The files.
    """
    content = comparison.to_dict()
    if papers := published.section(comparison):
        content["published"] = papers
    texts = {
        "compare.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "compare.csv": table.csv_text(comparison),
        "compare.md": table.markdown(comparison),
        "report.html": page(comparison),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [*(folder / name for name in texts), *figures.draw(comparison, folder)]
