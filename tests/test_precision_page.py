"""The tables of docs/precision.md are those that the benchmark makes of its result file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmarks_precision", ROOT / "benchmarks" / "precision.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.delitem(sys.modules, "grid", raising=False)
    (result,) = (ROOT / "benchmarks" / "results").glob("precision_*.json")
    page = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    lines = benchmark.page_tables(json.loads(result.read_text(encoding="utf-8")))
    for table in "\n".join(lines).split("\n\n"):
        assert table in page
