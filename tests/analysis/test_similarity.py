"""Similarity of scaling factors: known numbers, the published rows, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank.analysis.similarity import PUBLISHED, correlate, p_value, similarity, table
from fullrank.errors import ConfigError
from tests.analysis.traces import write_trace

# Spearman and Kendall of (1, 2, 3, 4, 5) and (5, 6, 7, 8, 7), as scipy's documentation prints them.
KNOWN = {"spearman": 0.8207826816681233, "spearman_p": 0.08858700531354381}


def row(step: int, mean: list[float | None], columns: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"step": step, "mean": mean, **({} if columns is None else {"columns": columns}), **more}


def test_known_correlations() -> None:
    found = correlate([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])
    assert found.spearman == pytest.approx(KNOWN["spearman"])
    assert found.spearman_p == pytest.approx(KNOWN["spearman_p"])
    # by hand: of ten pairs eight are in the same order, one is in the other, one is tied on one side
    assert found.kendall == pytest.approx((8 - 1) / (10 * 9) ** 0.5)
    assert found.count == 5
    assert correlate([1, 2, 3], [-1, -2, -3]).kendall == pytest.approx(-1)


def test_means_are_over_steps_then_compared(tmp_path: Path) -> None:
    """Factors that change from step to step, columns, and a step without a gradient."""
    low = write_trace(
        tmp_path / "low",
        [
            row(1, [1.0, 5.0, None, 10.0], [[1.0, 3.0, 2.0], [4.0, 5.0, 6.0], None, [9.0, 10.0, 11.0]]),
            row(2, [3.0, 5.0, 8.0, 10.0], [[1.0, 5.0, 2.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [9.0, 10.0, 12.0]]),
        ],
        columns=[0, 3, 7],
    )
    full = write_trace(
        tmp_path / "full",
        [row(2, [1.0, 4.0, 9.0, 7.0], [[1.0, 1.5, 0.5], [4.5, 4.0, 3.5], [8.0, 9.0, 10.0], [7.0, 6.0, 8.0]])],
        columns=[0, 3, 7],
        optimizer="AdamW",
    )
    found = similarity(low, full)
    assert found.steps == (2,), "only what both have"
    assert [pair.low for pair in found.matrices] == [3.0, 5.0, 8.0, 10.0]
    assert [pair.full for pair in found.matrices] == [1.0, 4.0, 9.0, 7.0]
    assert [pair.kind for pair in found.matrices] == ["q_proj", "v_proj", "up_proj", "q_proj"]
    assert found.matrix.spearman == pytest.approx(0.8)
    assert found.matrix.kendall == pytest.approx(4 / 6)
    assert found.column is not None
    assert found.column.count == 12
    assert [pair.spearman for pair in found.matrices] == pytest.approx([0.5, -1.0, 1.0, 0.5])
    assert found.within == pytest.approx(0.5)
    alone = similarity(low, low)
    assert alone.steps == (1, 2)
    assert [pair.low for pair in alone.matrices] == [2.0, 5.0, 8.0, 10.0]
    assert alone.matrices[0].low_columns == (1.0, 4.0, 2.0)
    assert alone.matrices[2].low_columns == (7.0, 8.0, 9.0)
    assert alone.matrix.spearman == pytest.approx(1.0)
    assert alone.column is not None
    assert alone.column.kendall == pytest.approx(1.0)


def test_without_columns_there_is_the_matrix_level(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0])])
    found = similarity(trace, trace)
    assert found.column is None
    assert found.within is None
    assert table({"ours": found}).splitlines()[-2].split()[-4:] == ["-"] * 4


def test_the_published_rows_are_exact(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0], [[1.0], [2.0], [3.0]])], columns=[0])
    lines = [line.split() for line in table({"ours": similarity(trace, trace)}).splitlines()]
    assert lines[0] == ["matrix", "level", "column", "level"]
    assert lines[1] == ["size", *(["Spearman", "p-value", "Kendall", "p-value"] * 2)]
    assert lines[2:6] == [
        ["60M", "(paper)", "0.9972", "2e-62", "0.9662", "7e-26", "0.9372", "0.0", "0.7942", "0.0"],
        ["130M", "(paper)", "0.9925", "2e-76", "0.9409", "9e-37", "0.8698", "0.0", "0.6830", "0.0"],
        ["350M", "(paper)", "0.9770", "3e-113", "0.8848", "5e-65", "0.9091", "0.0", "0.7400", "0.0"],
        ["1B", "(paper)", "0.9469", "1e-83", "0.8249", "1e-56", "0.8331", "0.0", "0.6513", "0.0"],
    ]
    assert lines[6][0] == "ours"
    assert [published.size for published in PUBLISHED] == ["60M", "130M", "350M", "1B"]


def test_p_values_that_underflow_are_a_bound() -> None:
    assert p_value(0.0) == "< 1e-300"
    assert p_value(3e-310) == "< 1e-300"
    assert p_value(1e-299) == "1e-299"
    assert p_value(0.034) == "3e-02"
    assert p_value(0.0, published=True) == "0.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [row(1, [1.0, 2.0])]}, "1 of 3 matrices are traced in .*low and not in .*full, first layers.0.up"),
        ({"shape": (8, 5)}, r"layers\.0\.q_proj\.weight is \(8, 4\) in .* and \(8, 5\)"),
        ({"rows": [row(2, [1.0, 2.0, 3.0])]}, "no traced step in common"),
        ({"rows": [row(1, [4.0, 4.0, 4.0])]}, "factors of .*full are all 4: there is no order"),
        ({"num_factors": 1}, r"8 scaling factors in .*low and 1 in .*full\. Compare runs with one factor a column"),
        (
            {"columns": [1, 2], "rows": [row(1, [1.0, 2.0, 3.0], [[1.0, 2.0]] * 3)]},
            "other columns of layers.0.q_proj.weight",
        ),
        ({"rows": [row(1, [None, 2.0, 3.0])]}, "q_proj.weight had no gradient, or no finite one"),
    ],
)
def test_what_cannot_be_compared(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    low = write_trace(tmp_path / "low", [row(1, [1.0, 2.0, 3.0])])
    made = {"rows": [row(1, [1.0, 2.0, 3.0])], **change}
    full = write_trace(tmp_path / "full", made.pop("rows"), **made)
    with pytest.raises(ConfigError, match=message):
        similarity(low, full)


def test_too_few_matrices_and_no_trace(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "low", [row(1, [1.0, 2.0])])
    with pytest.raises(ConfigError, match="traces 2 matrices; a rank correlation needs at least 3"):
        similarity(trace, trace)
    with pytest.raises(ConfigError, match=r"holds no trace\.jsonl"):
        similarity(trace, tmp_path)
