"""The page on planning says what ``benchmarks/memory.py`` has found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plan.md"
PAGE_OF_BASES = ROOT / "docs" / "quantized.md"
VARIANTS = ("plain", "checkpointing", "fused", "both")
NAMES = {
    "2410.01623": "Fira, Table 3",
    "2403.03507": "GaLore",
    "2412.05270": "APOLLO",
    "2312.11875": "SIFT",
}


def result(name: str = "memory") -> dict[str, Any]:
    (path,) = (ROOT / "benchmarks" / "results").glob(f"{name}_amd-*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def peak_cell(row: dict[str, Any]) -> str:
    """A measured peak in MiB, and what the plan is off by; nothing has a sign that rounds to none."""
    off = round(row["ratio"] - 1, 4)
    return f"{row['measured']['peak'] / 2**20:.1f} ({f'{off:+.2%}' if off else '0.00%'})"


def accuracy() -> list[str]:
    """A line for each size and method: states, and the measured peak of each variant with what the plan is off by."""
    rows = result()["rows"]
    lines = []
    for size, method in dict.fromkeys((row["size"], row["method"]) for row in rows):
        own = {row["variant"]: row for row in rows if (row["size"], row["method"]) == (size, method)}
        states = own["plain"]["measured"]["states"] / 2**20
        cells = [peak_cell(own[name]) if name in own else "-" for name in VARIANTS]
        lines.append(f"| {size} | `{method}` | {states:.1f} | {' | '.join(cells)} |")
    return lines


def bases() -> list[str]:
    """A line for each size and base under LoRA: its weights, and the measured peaks with what the plan is off by."""
    rows = [row for row in result("memory_bases")["rows"] if row["method"] == "lora"]
    lines = []
    for size, kind in dict.fromkeys((row["size"], row["quantization"]) for row in rows):
        own = [row for row in rows if (row["size"], row["quantization"]) == (size, kind)]
        cells = [peak_cell(row) for row in own]
        name = "null" if kind is None else f"`{kind}`"
        lines.append(f"| {size} | {name} | {own[0]['measured']['weights'] / 2**20:.1f} | {' | '.join(cells)} |")
    return lines


def published() -> list[str]:
    """A line for each paper and method: its numbers, ours with its types, ours with our defaults."""
    papers = result()["papers"]
    lines = []
    for key in dict.fromkeys((one["paper"], one["counts"], one["method"]) for one in papers):
        own = [one for one in papers if (one["paper"], one["counts"], one["method"]) == key]
        texts = [", ".join(f"{one['published']:g}" for one in own)]
        texts += [", ".join(f"{one[part] / 2**30:.2f}" for one in own) for part in ("as_published", "ours")]
        sizes = ", ".join(one["size"].upper() for one in own)
        lines.append(f"| {NAMES[key[0]]} | {key[1]} | `{key[2]}` | {sizes} | {' | '.join(texts)} |")
    return lines


@pytest.mark.parametrize("line", accuracy() + published())
def test_line_is_on_the_page(line: str) -> None:
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("line", bases())
def test_line_is_on_the_page_of_bases(line: str) -> None:
    assert line in PAGE_OF_BASES.read_text(encoding="utf-8").splitlines()


def test_bases_of_codes_are_planned_as_they_are() -> None:
    rows = result("memory_bases")["rows"]
    for row in rows:
        assert row["predicted"]["source"] == "traced"
        assert row["predicted"]["states"] == row["measured"]["states"]
        # the codes' tables of a first model are made once, and one number stands for all weights
        assert row["predicted"]["weights"] == pytest.approx(row["measured"]["weights"], abs=2000)
        assert row["ratio"] == pytest.approx(1.0, abs=0.02)
    worst = max(abs(row["ratio"] - 1) for row in rows)
    assert f"within {math.ceil(worst * 1e4) / 1e4:.2%}" in PAGE_OF_BASES.read_text(encoding="utf-8")


def test_states_are_exact_and_peaks_within_a_tenth() -> None:
    for row in result()["rows"]:
        assert row["predicted"]["source"] == "traced"
        assert row["predicted"]["states"] == row["measured"]["states"]
        assert row["predicted"]["weights"] == row["measured"]["weights"]
        assert row["ratio"] == pytest.approx(1.0, abs=0.1)
    worst = max(abs(row["ratio"] - 1) for row in result()["rows"])
    assert f"{worst:.2%}" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print("\n".join([*accuracy(), "", *published(), "", *bases()]))
