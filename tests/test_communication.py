"""What is sent and kept, as numbers: the formulas of the docs, worked out by hand, and against what optimizers hold."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import ApolloAdamW, ConfigError, FiraAdamW, GaLoreAdamW, divide_params
from fullrank.communication import (
    Collective,
    Layout,
    Matrix,
    gradient_traffic,
    padded,
    partition_traffic,
    payload,
    refresh_traffic,
    restart_traffic,
    sent_bytes,
    sift_traffic,
    state_numbers,
    step_traffic,
)
from fullrank.memory import held_state_bytes
from fullrank.sharding import BUCKET

ROOT = Path(__file__).parents[1]
FOUR = Layout(4, "fsdp2")
TALL, WIDE = Matrix(40, 16, 4), Matrix(16, 40, 4)  # m = 40, n = 16, r = 4


@pytest.mark.parametrize(
    ("kind", "sent"), [("all_reduce", 150.0), ("reduce_scatter", 75.0), ("all_gather", 75.0), ("broadcast", 100.0)]
)
def test_ring_sends(kind: str, sent: float) -> None:
    assert Collective(kind, 50, 2, 4).payload_bytes == 100  # type: ignore[arg-type]
    assert Collective(kind, 50, 2, 4).sent_bytes == sent  # type: ignore[arg-type]
    assert Collective(kind, 50, 2, 1).sent_bytes == 0.0  # type: ignore[arg-type]


def test_layout_of_copies() -> None:
    assert (Layout(8).shards, Layout(8).replicas) == (1, 8)
    assert (Layout(8, "fsdp2").shards, Layout(8, "fsdp2").replicas) == (8, 1)
    layout = Layout(8, "fsdp2", shard_size=2)
    assert (layout.shards, layout.replicas) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 0}, "at least 1 process, got 0"),
        ({"world": 8, "strategy": "fsdp2", "shard_size": 3}, "must divide the 8 processes, got 3"),
        ({"world": 8, "shard_size": 2}, "shard_size is for fsdp2"),
        ({"world": 8, "strategy": "fsdp2", "partition_states": True}, "partition_states is for ddp"),
    ],
)
def test_impossible_layout_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**options)  # type: ignore[arg-type]


def test_sides_follow_the_projection() -> None:
    assert (TALL.is_wide, TALL.m, TALL.n) == (False, 40, 16)
    assert (WIDE.is_wide, WIDE.m, WIDE.n) == (True, 40, 16)
    assert not Matrix(16, 16, 4).is_wide
    turned = Matrix(40, 16, 4, proj_type="reverse_std")
    assert (turned.is_wide, turned.m, turned.n) == (True, 16, 40)


@pytest.mark.parametrize(
    ("method", "tall", "wide"),
    [
        ("galore", {"all_gather": 64}, {"reduce_scatter": 160, "all_gather": 160}),
        ("fira", {"all_gather": 64, "all_reduce": 1}, {"reduce_scatter": 200, "all_reduce": 1, "all_gather": 200}),
        ("apollo", {"all_gather": 64, "all_reduce": 1}, {"reduce_scatter": 200, "all_reduce": 1, "all_gather": 40}),
    ],
)
def test_step_sends_sides_of_length_r_and_1(method: str, tall: dict[str, int], wide: dict[str, int]) -> None:
    """m r = 160, n r = 64, m = 40."""
    assert payload(step_traffic(method, [TALL], FOUR)) == tall  # type: ignore[arg-type]
    assert payload(step_traffic(method, [WIDE], FOUR)) == wide  # type: ignore[arg-type]
    assert step_traffic(method, [TALL, WIDE], Layout(4)) == []  # type: ignore[arg-type]


def test_options_change_what_a_step_sends() -> None:
    both = [TALL, WIDE]
    by_matrix = payload(step_traffic("fira", both, FOUR, by_row=False))
    assert by_matrix == {"reduce_scatter": 160, "all_reduce": 6, "all_gather": 64 + 160}
    by_matrix = payload(step_traffic("apollo", both, FOUR, by_row=False))
    assert by_matrix == {"reduce_scatter": 160, "all_reduce": 6, "all_gather": 64}
    unlimited = payload(step_traffic("apollo", both, FOUR, limiter=False))
    assert unlimited == {"reduce_scatter": 160, "all_gather": 64 + 40}
    assert payload(step_traffic("galore", [TALL], FOUR, refreshes=True)) == {}
    direct = step_traffic("fira", [Matrix(16, 40, 8)], FOUR)  # r = n / 2: R of all rows, too
    assert payload(direct)["all_gather"] == 2 * 320 + 40


def test_refresh_sends_a_side_of_length_r_for_each_iteration() -> None:
    assert payload(refresh_traffic([TALL], FOUR)) == {"all_reduce": 64 + 1, "all_gather": 64}  # the old basis, too
    assert payload(refresh_traffic([WIDE], FOUR)) == {"all_reduce": 160, "all_gather": 64}
    assert payload(refresh_traffic([TALL], FOUR, first=True)) == {"all_reduce": 3 * 65}
    assert payload(refresh_traffic([WIDE], FOUR, rotate_moments=True))["all_reduce"] == 160 + 16
    assert refresh_traffic([TALL, WIDE], FOUR, basis="random") == []
    assert refresh_traffic([TALL, WIDE], Layout(4)) == []


def test_parts_are_padded_to_equal_length() -> None:
    assert [padded(rows, 4) for rows in (1, 4, 5, 40)] == [4, 4, 8, 40]
    assert payload(step_traffic("galore", [Matrix(5, 9, 2)], FOUR)) == {"reduce_scatter": 24, "all_gather": 24}


def test_copies_of_a_model_do_not_exchange_subspaces() -> None:
    copies = Layout(16, "fsdp2", shard_size=4)
    assert payload(step_traffic("fira", [WIDE], copies)) == payload(step_traffic("fira", [WIDE], FOUR))
    assert all(one.processes == 4 for one in step_traffic("fira", [WIDE], copies))


def test_one_collective_for_all_matrices_up_to_a_bucket() -> None:
    several = step_traffic("fira", [WIDE] * 20, FOUR)
    assert {one.kind: one.calls for one in several} == {"reduce_scatter": 2, "all_reduce": 1, "all_gather": 2}
    halves = step_traffic("galore", [TALL, WIDE], FOUR, gradient_itemsize=2)
    assert {(one.numbers, one.itemsize) for one in halves if one.kind == "all_gather"} == {(64, 2), (160, 4)}
    large = Matrix(1024, BUCKET // 512, 512)  # m r is a bucket
    (scattered,) = [one for one in step_traffic("galore", [large] * 3, FOUR) if one.kind == "reduce_scatter"]
    assert scattered.calls == 3


def test_strategies_send_gradients_and_weights() -> None:
    ddp = gradient_traffic(Layout(4), trained=100)
    assert sent_bytes(ddp) == 2 * 200 * 3 / 4
    sharded = gradient_traffic(FOUR, trained=100, whole=100)
    assert sent_bytes(sharded) == 3 * 200 * 3 / 4
    assert payload(gradient_traffic(FOUR, trained=100, whole=100, root=40)) == {
        "all_gather": 2 * 60 + 40,
        "reduce_scatter": 100,
    }
    frozen = payload(gradient_traffic(FOUR, trained=10, whole=100))  # LoRA: the base is gathered all the same
    assert frozen == {"all_gather": 200, "reduce_scatter": 10}
    copies = gradient_traffic(Layout(8, "fsdp2", shard_size=4), trained=100, whole=100)
    assert [one.among for one in copies] == ["shards", "shards", "copies"]
    assert (copies[2].numbers, copies[2].processes) == (25, 2)


def test_partitioned_states_are_paid_by_sending_the_weights_on() -> None:
    layout = Layout(4, partition_states=True)
    assert payload(partition_traffic(layout, [40, 60])) == {"broadcast": 100}
    assert sent_bytes(partition_traffic(layout, [40, 60], itemsize=2)) == 200.0
    assert partition_traffic(Layout(4), [40, 60]) == []


def test_sift_sends_its_share_and_dense_gradients_once() -> None:
    assert payload(sift_traffic(Layout(2), chosen=50, weights=3)) == {"all_reduce": 53}
    choosing = payload(sift_traffic(Layout(2), chosen=50, weights=3, dense=1000))
    assert choosing == {"all_reduce": 53 + 1000 + 3, "broadcast": 56}
    assert sift_traffic(FOUR, chosen=50, weights=3) == []


def test_restart_gathers_factors() -> None:
    assert payload(restart_traffic([TALL, WIDE], FOUR)) == {"all_gather": 2 * 4 * 56, "all_reduce": 4}
    assert restart_traffic([TALL], Layout(4)) == []


@pytest.mark.parametrize(
    ("method", "optimizer"), [("fira", FiraAdamW), ("galore", GaLoreAdamW), ("apollo", ApolloAdamW)]
)
def test_state_is_what_an_optimizer_holds(method: str, optimizer: type[torch.optim.Optimizer]) -> None:
    shapes = [(40, 16), (16, 40), (16, 16)]
    model = nn.ModuleDict({f"mlp{i}": nn.Linear(shape[1], shape[0], bias=False) for i, shape in enumerate(shapes)})
    model["head"] = nn.Linear(16, 3, bias=False)
    built = optimizer(divide_params(model, ["mlp"], rank=4))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    built.step()
    num_steps = len(list(model.parameters()))
    expected = state_numbers(method, [Matrix(*shape, 4) for shape in shapes], Layout(1), plain=[48])  # type: ignore[arg-type]
    assert held_state_bytes(built) == 4 * (expected + num_steps)


def test_state_of_a_process() -> None:
    assert state_numbers("full", [TALL, WIDE], Layout(4)) == 2 * 2 * 640
    assert state_numbers("full", [TALL, WIDE], FOUR) == 2 * 2 * 640 // 4
    assert state_numbers("fira", [TALL], FOUR) == state_numbers("fira", [WIDE], FOUR) == (2 * 160 + 64) // 4 + 1
    assert state_numbers("galore", [TALL] * 3, Layout(2, partition_states=True)) == 2 * 384
    assert state_numbers("galore", [TALL], Layout(2, partition_states=True), plain=[1000]) == 2000


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "scaling_model.json").read_text("utf-8"))
    return found


def table(heading: str) -> list[list[str]]:
    """The rows of the table of docs/distributed-scaling.md that begins so."""
    page = (ROOT / "docs" / "distributed-scaling.md").read_text(encoding="utf-8")
    _, _, rows = page.partition(f"| {heading} |")[2].partition("\n| ---")
    lines = rows.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_table_of_the_projection_is_that_of_the_result() -> None:
    rows = {(row["model"], row["strategy"], row["method"], row["world"]): row for row in committed()["rows"]}
    shown = table("model | strategy | method | step, s")
    assert len(shown) > 20
    for model, strategy, method, *cells in shown:
        found = [rows[model, strategy, method, world] for world in (8, 64, 1024)]
        assert cells == [
            ", ".join(f"{row['step_s']:.3g}" for row in found),
            ", ".join(f"{row['strategy_s']:.2g}" for row in found),
            ", ".join(f"{1000 * (row['method_s'] + row['refresh_s']):.0f}" for row in found),
            ", ".join(f"{row['weights_gb'] + row['gradients_gb'] + row['states_gb']:.3g}" for row in found),
        ], (model, strategy, method)


def test_table_of_the_limits_is_that_of_the_result() -> None:
    limits = committed()["limits"]
    shown = table("strategy | method | 7B: all")
    assert len(shown) == sum(map(len, limits["7B"].values()))
    for strategy, method, *cells in shown:
        found = [limits[model][strategy][method][which] for model in ("7B", "70B") for which in ("all", "own")]
        assert cells == ["-" if world is None else f"{world:,}" for world in found], (strategy, method)


def test_table_of_steps_is_that_of_the_result() -> None:
    file = next((ROOT / "benchmarks" / "results").glob("distributed_*_202611.json"))
    rows = {(r["processes"], r["method"], r["states"]): r for r in json.loads(file.read_text("utf-8"))["rows"]}
    shown = table("method | 1 process | 2, whole")
    assert len(shown) == len({method for _, method, _ in rows})
    for method, *cells in shown:
        found = [rows[1, method, "whole"], *(rows[2, method, how] for how in ("whole", "partitioned", "sharded"))]
        assert cells == [
            f"{row['step_s'] * 1e3:.0f}, {row['refresh_s'] * 1e3:.0f}, {row['state_bytes'] / 1e6:.0f}" for row in found
        ], method


def test_projection_is_what_its_script_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed result has the assumptions and the rows of benchmarks/scaling.py as it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = importlib.import_module("scaling")
    machine, result = scaling.Machine(), committed()
    assert result["assumptions"]["machine"] == dataclasses.asdict(machine)
    made = [{key: scaling.rounded(value) for key, value in row.items()} for row in scaling.rows(machine)]
    assert result["rows"] == made
