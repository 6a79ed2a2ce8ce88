"""docs/performance.md says what the committed results say; and how its benchmark takes turns and counts refreshes."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


def test_runs_take_turns_a_step_each(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own, that only their work moves on: a run's time holds nothing of the other's."""
    turns: ModuleType = benchmark("turns")
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name: str, seconds: float) -> Any:
        def run(turn: Any) -> None:
            while True:
                order.append(name)
                now[0] += seconds
                if turn.end():
                    return

        return run

    def refused(turn: Any) -> None:
        raise ConfigError("no such option. Leave it out.")

    works = {"a": work("a", 2.0), "b": work("b", 0.5), "never": refused}
    times, left_out = turns.step_times(works, num_steps=5, device=torch.device("cpu"))
    assert left_out == {"never": "no such option. Leave it out."}
    assert times == {"a": [2.0] * 5, "b": [0.5] * 5}
    assert [set(order[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "b"}] * 5


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


def test_throughput_is_refused_before_it_is_measured(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    throughput: ModuleType = benchmark("throughput")
    assert throughput.parse_arguments(["--overhead-steps", "11", "--steps", "6"]).overhead_steps == 11
    for words, said in (
        (["--overhead-steps", "10"], "--overhead-steps 10 leaves none to count: the first 10 warm up"),
        (["--steps", "4"], "--steps 4 less --warmup 3 leaves full less than two steps"),
        (["--timed-gap", "1"], "leaves fira less than two steps without a refresh"),
        (["--cases", "full", "lora"], "--cases needs fira"),
    ):
        with pytest.raises(SystemExit):
            throughput.parse_arguments(words)
        assert said in capsys.readouterr().err


def test_what_is_measured_is_written_at_once(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput: ModuleType = benchmark("throughput")
    monkeypatch.setattr(throughput, "measure_size", lambda size, *_: {"size": size})
    monkeypatch.setattr(throughput, "overhead", lambda *_: 1 / 0)
    file = tmp_path / "result.json"
    with pytest.raises(ZeroDivisionError):
        throughput.measure_all({"settings": {}}, Namespace(sizes=["20m", "60m"]), torch.device("cpu"), file)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written == {"settings": {}, "sizes": [{"size": "20m"}, {"size": "60m"}], "overhead": []}


@pytest.mark.parametrize("name", ["precision", "convergence"])
def test_the_example_of_a_benchmark_names_all_that_it_needs(benchmark: Any, name: str) -> None:
    benchmark("grid").add_arguments(parser := argparse.ArgumentParser(), steps=1, work="work")
    shown = benchmark(name).__doc__.split("\n\n")[1].replace("\\\n", " ")
    assert parser.parse_args(shlex.split(shown)[2:]).output.name == f"{name}_HARDWARE_YYYYMM.json"


def test_a_step_is_shown_beside_adamw_of_both_types_and_beside_every_package(benchmark: Any) -> None:
    """From times alone, not from the ratios that the file brings."""
    tables: ModuleType = benchmark("performance_tables")
    report = next(tables.reports("step_time"))

    def seconds(case: str, basis: str, scope: str) -> float:
        wanted = {"size": "60M", "dtype": "bfloat16", "case": case, "basis": basis, "scope": scope}
        return next(row["amortised_s"] for row in report["rows"] if wanted.items() <= row.items())

    for scope in ("matrices", "model"):
        ours, exact = (seconds("fullrank FiraAdamW", basis, scope) for basis in ("power", "svd"))
        both = [ours / seconds(f"torch AdamW fused{more}", "", scope) for more in ("", ", float32")]
        line = next(row for row in tables.step_time().splitlines() if f"60M, {scope}, bfloat16" in row)
        assert line.endswith(f"| {both[0]:.2f}x | {both[1]:.2f}x |")
        for package, optimizer in (("fira", "FiraAdamW"), ("pytorch_optimizer", "Fira")):
            theirs = seconds(f"{package} {optimizer}", "svd", scope)
            start = f"| 60M, {scope}, bfloat16 | 128 | `{package}`, `{optimizer}` |"
            line = next(row for row in tables.peers().splitlines() if row.startswith(start))
            assert line.endswith(f"| {theirs / ours:.2f}x | {theirs / exact:.2f}x |")


def test_time_is_counted_to_its_phase(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that this test moves on, through the calls of a Trainer's step of two micro-batches."""
    runs: ModuleType = benchmark("throughput_runs")
    now = [0.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(torch.nn.Module):
        def forward(self, seconds: float) -> None:
            now[0] += seconds

    def end() -> bool:
        now[0] += 1000.0  # the turn of another
        return False

    model, control = Slow(), SimpleNamespace()
    phases = runs.Phases(SimpleNamespace(device=torch.device("cpu"), end=end))
    phases.on_train_begin(None, None, control, model=model)
    for step in range(3):
        state = SimpleNamespace(global_step=step)
        now[0] += 1.0
        phases.on_step_begin(None, state, control)
        for _ in range(2):
            model(2.0)
            now[0] += 4.0
        phases.on_pre_optimizer_step(None, state, control)
        now[0] += 8.0
        phases.on_optimizer_step(None, state, control)
        now[0] += 16.0
        phases.on_step_end(None, state, control)
    usual = dict(zip(runs.Phases.NAMES, (1.0, 4.0, 8.0, 8.0, 16.0), strict=True))
    assert phases.rows == [usual | {"data": 0.0}, usual, usual]


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
