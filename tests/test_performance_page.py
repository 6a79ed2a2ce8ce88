"""docs/performance.md says what the committed results say; and how its benchmark takes turns and counts refreshes."""

from __future__ import annotations

import importlib
import re
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fullrank.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_pages_are_made_from_the_result_files(benchmark: Any) -> None:
    """Run ``python benchmarks/performance_tables.py`` where this fails."""
    tables: ModuleType = benchmark("performance_tables")
    made, used = tables.blocks(), set()
    for name in tables.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        found = [match[2] for match in tables.MADE.finditer(text)]
        assert found, name
        used |= set(found)
        assert tables.filled(text, made) == text, name
    assert used == set(made)


def test_a_number_that_changed_is_found(benchmark: Any) -> None:
    tables: ModuleType = benchmark("performance_tables")
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = tables.blocks()
    other = re.sub(r"\d", "9", made["throughput"])
    assert tables.filled(text, made | {"throughput": other}) != text
    assert tables.filled("<!-- made: a -->old<!-- made --> <!-- made: b --><!-- made -->", {"a": "x", "b": "p\nq"}) == (
        "<!-- made: a -->x<!-- made --> <!-- made: b -->\n\np\nq\n\n<!-- made -->"
    )


def test_runs_take_turns_a_step_each(benchmark: Any) -> None:
    turns: ModuleType = benchmark("turns")
    order: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def run(turn: Any) -> None:
            while True:
                order.append(name)
                time.sleep(seconds)
                if turn.end():
                    return

        return run

    def refused(turn: Any) -> None:
        raise ConfigError("no such option. Leave it out.")

    works = {"a": work("a", 0.02), "b": work("b", 0.0), "never": refused}
    times, left_out = turns.step_times(works, num_steps=5, device=torch.device("cpu"))
    assert left_out == {"never": "no such option. Leave it out."}
    assert {name: len(found) for name, found in times.items()} == {"a": 5, "b": 5}
    assert [set(order[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "b"}] * 5
    assert min(times["a"]) >= 0.02
    assert sorted(times["b"])[2] < 0.02


def test_an_error_of_a_run_is_raised(benchmark: Any) -> None:
    turns: ModuleType = benchmark("turns")

    def broken(turn: Any) -> None:
        turn.end()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        turns.step_times({"broken": broken}, num_steps=3, device=torch.device("cpu"))


def test_refreshes_are_spread_over_the_published_gap(benchmark: Any) -> None:
    """Steps of 1 s, refreshing ones of 21 s every five; 20 more over 200 steps is 0.1 each."""
    throughput: ModuleType = benchmark("throughput")
    assert throughput.event_steps("fira+8bit", 5, 12) == {0, 5, 10}
    assert throughput.event_steps("transformers, galore_adamw", 5, 12) == {0, 5, 10}
    assert throughput.event_steps("transformers, fira package", 5, 12) == {0, 5, 10}
    assert throughput.event_steps("relora", 5, 12) == {4, 9}
    assert throughput.event_steps("sift", 5, 12) == throughput.event_steps("full", 5, 12) == set()
    fira = [21.0 if number % 5 == 0 else 1.0 for number in range(12)]
    options = Namespace(steps=12, warmup=2, gap=200, restart_gap=5000)
    shared = Namespace(gap=5, tokens=1000)
    row = throughput.row_of("fira", {"full": [1.0] * 12, "fira": fira}, shared, options)
    assert (row["step_s"], row["event_extra_s"], row["events_timed"]) == (1.0, 20.0, 2)
    assert row["tokens_per_s"] == pytest.approx(1000 / 1.1)
    assert row["ratio"] == pytest.approx(1 / 1.1)


@pytest.mark.slow
def test_real_runs_are_measured(benchmark: Any) -> None:
    """A network of one layer: ours with an option, and the parts of a step."""
    throughput: ModuleType = benchmark("throughput")
    options = Namespace(
        cases=["full", "fira+checkpointing"],
        peers=False,
        at_once=0,
        steps=7,
        warmup=2,
        gap=200,
        restart_gap=5000,
        rank=4,
        timed_gap=3,
        dtype="float32",
        data="python-docs",
        overhead_steps=12,
    )
    small = throughput.SMALL | {"num_key_value_heads": 2}
    shared = throughput.shared_of("llama-9m", options, torch.device("cpu"), small, batch=2, vocabulary=512)
    assert shared.tokens == 64
    rows, left_out = throughput.measure(shared, options)
    assert [row["case"] for row in rows] == options.cases
    assert not left_out
    assert rows[0]["ratio"] == 1.0
    assert [row["events_timed"] for row in rows] == [0, 2]
    for row in throughput.phases(shared, options):
        parts = [row[name] for name in throughput.Phases.NAMES]
        assert all(part > 0 for part in parts)
        assert row["forward"] + row["backward and clipping"] > row["data"]
