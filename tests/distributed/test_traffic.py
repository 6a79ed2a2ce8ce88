"""What the optimizers send in a step, counted, is what ``fullrank.communication`` says; never a whole gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import ApolloAdamW, FiraAdamW, GaLoreAdamW
from fullrank.communication import Collective, Layout, Matrix, partition_traffic, payload, refresh_traffic, step_traffic
from tests.distributed.case import Case, Place, each, named
from tests.distributed.loop import DEVICE, DTYPES

pytestmark = pytest.mark.slow

RANK = 4
PLAIN = (50, 20)
"""Of a weight that is not projected."""
SHAPES = [(129, 61), (61, 129), (95, 95), (2, 40), (40, 2)]
"""Of the projected weights: tall, wide, square; then without a row for a third process, and of rank 2."""
OPTIMIZERS: dict[str, Any] = {"fira": FiraAdamW, "galore": GaLoreAdamW, "apollo": ApolloAdamW}
STEPS = 4
"""With a gap of 3 the first and the last find new bases."""


class Weights(nn.Module):
    """Weights to project, the same ones several times over, and a plain one."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.mlp = nn.ParameterList([nn.Parameter(torch.randn(shape)) for _ in range(times) for shape in SHAPES[:3]])
        self.narrow = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES[3:]])
        self.embed = nn.Parameter(torch.randn(PLAIN))


def groups(model: Weights) -> list[dict[str, Any]]:
    """Of rank 4, and of rank 2 where a side is so short."""
    return [
        {"params": [model.embed]},
        {"params": list(model.mlp), "rank": RANK},
        {"params": list(model.narrow), "rank": 2},
    ]


@dataclass(frozen=True)
class Sent:
    """Who sends."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    way: str = "fsdp2"
    dtype: str = "float32"
    times: int = 1
    """How often the larger matrices are there."""

    def case(self, name: str) -> Case:
        """Three processes, or four where they hold two copies."""
        return Case(f"sent-{name}", functools.partial(count, sent=self), (4,) if self.way == "hsdp" else (3,))


def count(place: Place, *, sent: Sent) -> dict[str, Any]:
    """Numbers, bytes and calls by kind for every step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tests.distributed.counting import Counting

    torch.manual_seed(0)
    model = Weights(sent.times).to(DEVICE, DTYPES[sent.dtype])
    if sent.way == "fsdp2":
        fully_shard(model)
    elif sent.way == "hsdp":
        fully_shard(model, mesh=init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("copies", "shards")))
    optimizer = OPTIMIZERS[sent.method](groups(model), lr=1e-2, update_proj_gap=3, **sent.options)
    found: dict[str, Any] = {"numbers": [], "bytes": [], "calls": []}
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with Counting() as counting:
            optimizer.step()
        for key, counts in found.items():
            counts.append(dict(getattr(counting, key)))
    return found


SENT = {
    "galore": Sent("galore"),
    "galore-rotated": Sent("galore", {"rotate_moments": True}),
    "fira": Sent("fira"),
    "fira-bfloat16": Sent("fira", dtype="bfloat16"),
    "fira-random": Sent("fira", {"basis": "random"}),
    "fira-free": Sent("fira", {"limiter_gamma": None}),
    "fira-matrix": Sent("fira", {"scaling": "matrix"}),
    "fira-matrix-free": Sent("fira", {"scaling": "matrix", "limiter_gamma": None}),
    "fira-copies": Sent("fira", way="hsdp"),
    "apollo": Sent("apollo"),
    "apollo-power": Sent("apollo", {"basis": "power"}),
    "apollo-free": Sent("apollo", {"limiter_gamma": None}),
    "apollo-tensor": Sent("apollo", {"scaling": "tensor"}),
    "apollo-tensor-free": Sent("apollo", {"scaling": "tensor", "limiter_gamma": None}),
    "fira-ddp": Sent("fira", way="ddp"),
    "fira-partitioned": Sent("fira", {"partition_states": True}, way="ddp"),
}
BY_FORMULA = {f"sent-{name}": sent.case(name) for name, sent in SENT.items()}
MANY = {f"sent-{name}-many": replace(SENT[name], times=3).case(f"{name}-many") for name in ("galore", "fira", "apollo")}


def expected(sent: Sent, world: int, step: int) -> list[Collective]:
    """What the formulas say."""
    options = sent.options
    if sent.way == "ddp":
        layout = Layout(world, partition_states=options.get("partition_states", False))
        numels = [rows * columns for rows, columns in [*SHAPES, PLAIN]]
        return partition_traffic(layout, numels, itemsize=4, first=step == 0)
    layout = Layout(world, "fsdp2", 2 if sent.way == "hsdp" else None)
    matrices = [Matrix(*shape, min(RANK, *shape)) for shape in SHAPES]
    refreshes = step in (0, 3)
    found = step_traffic(
        sent.method,  # type: ignore[arg-type]
        matrices,
        layout,
        by_row=options.get("scaling", "column") == "column",
        limiter=options.get("limiter_gamma", 1.01) is not None,
        refreshes=refreshes,
        gradient_itemsize=DTYPES[sent.dtype].itemsize,
    )
    if refreshes:
        basis = options.get("basis", "random" if sent.method == "apollo" else "power")
        rotated = options.get("rotate_moments", False)
        found += refresh_traffic(matrices, layout, basis=basis, first=step == 0, rotate_moments=rotated)
    return found


@each(BY_FORMULA.values())
def test_as_the_formulas_say(case: Case, world: int, outcome: Any) -> None:
    sent = SENT[case.name.removeprefix("sent-")]
    for found in outcome(case, world):
        for step in range(STEPS):
            traffic = expected(sent, world, step)
            assert found.values["numbers"][step] == payload(traffic), f"step {step}"
            if step in (0, 3) and sent.way != "ddp":
                continue  # a refresh may wait together with the rest, and its maxima have the gradient's dtype
            assert sum(found.values["bytes"][step].values()) == sum(one.payload_bytes for one in traffic)
            assert sum(found.values["calls"][step].values()) == sum(one.calls for one in traffic)


@each([case for name, case in BY_FORMULA.items() if "-ddp" not in name and "-partitioned" not in name])
def test_less_than_a_whole_gradient(case: Case, world: int, outcome: Any) -> None:
    """All that is sent for all matrices in a step is less than one of their gradients, refreshes included."""
    for numbers in outcome(case, world)[0].values["numbers"]:
        assert sum(numbers.values()) < 129 * 61


@each(MANY.values())
def test_calls_do_not_grow_with_the_matrices(case: Case, world: int, outcome: Any) -> None:
    few = BY_FORMULA[case.name.removesuffix("-many")]
    assert outcome(case, world)[0].values["calls"] == outcome(few, world)[0].values["calls"]


CASES = named(*BY_FORMULA.values(), *MANY.values())
