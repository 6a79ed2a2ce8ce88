"""A step on the parts of a matrix is the step on the whole: all parts in this process, their requests answered here."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import ApolloAdamW, FiraAdamW, FiraRMSprop, GaLoreAdamW
from fullrank.errors import CheckpointError, ConfigError, UnsupportedError
from fullrank.projected import ProjectedOptimizer
from fullrank.projected.matrix import Cut
from fullrank.sharding import Request, Routine, Split
from tests.problems import make_gradients, make_weight, relative_error

RANK, GAP, STEPS = 3, 3, 8
OPTIONS: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "lr": 1e-2, "weight_decay": 0.1, "alpha": 0.5}
CASES: list[tuple[type[ProjectedOptimizer], dict[str, Any]]] = [
    (FiraAdamW, {}),
    (FiraAdamW, {"rotate_moments": True, "alpha_on": "update"}),
    (FiraAdamW, {"basis": "random", "scaling": "matrix"}),
    (FiraAdamW, {"limiter_gamma": None}),
    (FiraAdamW, {"rank": 8}),  # the residual is formed
    (FiraAdamW, {"proj_type": "full", "rotate_moments": True}),
    (FiraAdamW, {"proj_type": "left"}),
    (FiraAdamW, {"proj_type": "right"}),
    (FiraAdamW, {"proj_type": "reverse_std"}),
    (FiraRMSprop, {}),
    (GaLoreAdamW, {}),
    (GaLoreAdamW, {"proj_type": "full"}),
    (ApolloAdamW, {}),
    (ApolloAdamW, {"scaling": "tensor", "basis": "power"}),
]
SHAPES = {"tall": (22, 10), "wide": (10, 22), "square": (14, 14), "conv": (9, 3, 2, 2), "few": (2, 12)}


@dataclass
class Traffic:
    """What the parts of one matrix asked for in one step."""

    payloads: list[tuple[str, int]] = field(default_factory=list)
    """Kind and numbers of each request, of the whole tensor that is summed or joined."""


def joined(routines: list[Routine], num: int, traffic: Traffic) -> None:
    """Run the routines of all parts to their ends, answering as a group of processes would."""
    answers: list[Tensor | None] = [None] * num
    while True:
        requests: list[Request] = []
        for routine, answer in zip(routines, answers, strict=True):
            try:
                requests.append(next(routine) if answer is None else routine.send(answer))
            except StopIteration:
                continue
        if not requests:
            return
        assert len(requests) == num, "some parts asked and others had ended"
        assert len({request.kind for request in requests}) == 1
        kind, tensors = requests[0].kind, [request.tensor.clone() for request in requests]
        if kind == "all_rows":
            whole = torch.cat(tensors)
            assert len(whole) == requests[0].num_rows
            found = [whole.clone() for _ in range(num)]
        else:
            stack = torch.stack(tensors)
            whole = stack.amax(0) if kind == "max" else stack.sum(0)
            splits = [Split(None, 0, 0, num, part) for part in range(num)]
            found = [split.rows(whole).clone() if kind == "to_rows" else whole.clone() for split in splits]
        traffic.payloads.append((kind, whole.numel()))
        answers = list(found)


class Parts:
    """One weight in ``num`` parts along ``dim``, each with an optimizer of its own, as in so many processes."""

    def __init__(self, kind: type[ProjectedOptimizer], options: dict[str, Any], weight: Tensor, num: int, dim: int):
        self.splits = [Split(None, 0, dim, num, part) for part in range(num)]
        self.shape, self.dim = weight.shape, dim
        self.weights = [nn.Parameter(part.clone()) for part in self.cut(weight)]
        whole = kind([nn.Parameter(weight.clone())], **options)
        self.group = whole.param_groups[0]
        self.optimizers = []
        for split, part in zip(self.splits, self.weights, strict=True):
            optimizer = kind([nn.Parameter(weight.clone())], **options)
            cut = Cut.of(self.shape, split, self.group["proj_type"])
            spec = optimizer.state_spec(optimizer.param_groups[0]["params"][0], self.group)
            for key, (shape, dtype) in spec.items():
                square = key in optimizer.moments and self.group["proj_type"] == "full"
                if cut.side is not None and not square and len(shape) == 2:
                    start, end = split.bounds(shape[0])
                    shape = (end - start, shape[1])
                optimizer.state[part][key] = torch.zeros(shape, dtype=dtype)
            self.optimizers.append(optimizer)

    def cut(self, whole: Tensor) -> list[Tensor]:
        bounds = [split.bounds(whole.shape[self.dim]) for split in self.splits]
        return [whole.narrow(self.dim, start, end - start) for start, end in bounds]

    def step(self, gradient: Tensor) -> Traffic:
        traffic = Traffic()
        routines = []
        for split, optimizer, weight, grad in zip(
            self.splits, self.optimizers, self.weights, self.cut(gradient), strict=True
        ):
            weight.grad = grad.clone()
            cut = Cut.of(self.shape, split, self.group["proj_type"])
            routines.append(optimizer._step_matrix(weight, self.group, cut, seat=(0, 0)))
        with torch.no_grad():
            joined(routines, len(routines), traffic)
        return traffic

    def whole(self) -> Tensor:
        return torch.cat([weight.detach() for weight in self.weights], self.dim)


def ids(case: Any) -> str:
    return "-".join([case[0].__name__, *(f"{key}={value}" for key, value in case[1].items())])


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_parts_step_as_the_whole(case: Any, shape: str, dim: int, num: int) -> None:
    """Uneven and empty parts too, through several refreshes; what is asked for has a side of length r or 1."""
    size = SHAPES[shape]
    kind, options = case[0], OPTIONS | case[1]
    options["rank"] = min(options["rank"], size[0], torch.Size(size[1:]).numel())
    if dim == 1 and len(size) > 2:
        return  # such a cut is refused
    weight = make_weight(size)
    plain = nn.Parameter(weight.clone())
    optimizer = kind([plain], **options)
    parts = Parts(kind, options, weight, num, dim)
    for gradient in make_gradients(size, STEPS):
        plain.grad = gradient.clone()
        optimizer.step()
        traffic = parts.step(gradient)
        side = max(size[0], torch.Size(size[1:]).numel())
        assert all(numbers <= side * options["rank"] for _, numbers in traffic.payloads)
    assert relative_error(parts.whole(), plain, weight) < 1e-9


@pytest.mark.parametrize(
    ("kind", "dim", "expected"),
    [
        # cut along its 22 rows: the basis is joined, the limiter's norm is summed
        (FiraAdamW, 0, [("all_rows", 10 * RANK), ("sum", 1)]),
        (GaLoreAdamW, 0, [("all_rows", 10 * RANK)]),
        (ApolloAdamW, 0, [("all_rows", 10 * RANK), ("sum", 1)]),
        # cut along its 10 columns, the projected side: R and the norms of rows are summed, what comes of them is joined
        (
            FiraAdamW,
            1,
            [("to_rows", 22 * RANK), ("to_rows", 22), ("sum", 1), ("all_rows", 22 * RANK), ("all_rows", 22)],
        ),
        (GaLoreAdamW, 1, [("to_rows", 22 * RANK), ("all_rows", 22 * RANK)]),
        (ApolloAdamW, 1, [("to_rows", 22 * RANK), ("to_rows", 22), ("sum", 1), ("all_rows", 22)]),
    ],
)
def test_what_a_step_asks_for(kind: type[ProjectedOptimizer], dim: int, expected: list[tuple[str, int]]) -> None:
    """A step without a refresh, to the number."""
    parts = Parts(kind, OPTIONS, make_weight((22, 10)), 2, dim)
    first, second = (parts.step(gradient) for gradient in make_gradients((22, 10), 2))
    assert second.payloads == expected
    assert len(first.payloads) >= len(expected) - 1


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(0, [("max", 1), ("sum", 10 * RANK)]), (1, [("sum", 22 * RANK), ("all_rows", 10 * RANK)])],
)
def test_what_a_refresh_asks_for(dim: int, expected: list[tuple[str, int]]) -> None:
    """One power iteration after the first three, to the number."""
    parts = Parts(GaLoreAdamW, OPTIONS, make_weight((22, 10)), 2, dim)
    traffic = [parts.step(gradient) for gradient in make_gradients((22, 10), GAP + 1)]
    iterated = [entry for entry in traffic[GAP].payloads if entry in expected]
    assert [entry for entry in iterated if entry[0] != "all_rows" or dim == 1] == expected
    assert sum(entry == expected[0] for entry in traffic[0].payloads) == 3


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def sharded(weight: Tensor, mesh: Any, dim: int = 0) -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)]))


@pytest.mark.parametrize("kind", [FiraAdamW, GaLoreAdamW, ApolloAdamW, FiraRMSprop])
def test_sharded_parameters(kind: type[ProjectedOptimizer], mesh: Any) -> None:
    """A mesh of one: the same steps; states are DTensors, of parameters without a gradient too, and load from whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = [make_weight((12, 8)), make_weight((9,)), make_weight((8, 12))]
    plain, spread, again = (
        [nn.Parameter(weight.clone()) for weight in weights],
        [sharded(weight, mesh) for weight in weights],
        [sharded(weight, mesh) for weight in weights],
    )
    optimizers = [kind(several, **OPTIONS) for several in (plain, spread, again)]
    gradients = [make_gradients(tuple(weight.shape), 6) for weight in weights]

    def step(number: int, which: int, parameters: list[nn.Parameter]) -> None:
        for parameter, several in zip(parameters[:2], gradients, strict=False):
            whole = several[number].clone()
            grad = distribute_tensor(whole, mesh, parameter.placements) if which else whole  # type: ignore[attr-defined]
            parameter.grad = grad
        optimizers[which].step()

    for number in range(4):
        step(number, 0, plain)
        step(number, 1, spread)
    assert all(
        isinstance(value, DTensor) or key == "step" for p in spread for key, value in optimizers[1].state[p].items()
    )
    assert optimizers[1].state[spread[2]].keys() == optimizers[1].state[spread[0]].keys()
    assert plain[2] not in optimizers[0].state
    optimizers[2].load_state_dict(optimizers[0].state_dict())
    with torch.no_grad():
        for one, other in zip(again, spread, strict=True):
            one.copy_(other)
    for number in range(4, 6):
        step(number, 0, plain)
        step(number, 1, spread)
        step(number, 2, again)
    for one, two, three in zip(plain, spread, again, strict=True):
        assert torch.equal(one, two.full_tensor())  # type: ignore[attr-defined]
        assert torch.equal(one, three.full_tensor())  # type: ignore[attr-defined]


def test_states_can_be_made_before_the_first_step() -> None:
    weight = nn.Parameter(make_weight((12, 8)))
    optimizer = FiraAdamW([weight], **OPTIONS)
    optimizer.init_states()
    keys = set(optimizer.state[weight])
    weight.grad = make_gradients((12, 8), 1)[0]
    other = FiraAdamW([second := nn.Parameter(weight.detach().clone())], **OPTIONS)
    second.grad = weight.grad.clone()
    optimizer.step()
    other.step()
    assert keys == set(other.state[second])
    assert torch.equal(weight, second)


def test_what_cannot_be_stepped_is_refused_at_once(mesh: Any) -> None:
    """Flat parameters of other engines, a partition of sharded states: before any step."""
    weight = nn.Parameter(make_weight((12, 8)))
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match=r"DeepSpeed ZeRO.*fully_shard"):
        FiraAdamW([weight], **OPTIONS)
    flat = nn.Parameter(make_weight((12, 8)))
    flat._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match=r"FSDP1.*fully_shard"):
        FiraAdamW([flat], **OPTIONS)
    with pytest.raises(ConfigError, match="partition_states is for whole parameters"):
        FiraAdamW([sharded(make_weight((12, 8)), mesh)], **OPTIONS, partition_states=True)


def test_a_sharded_state_is_refused_by_whole_parameters(mesh: Any) -> None:
    """Its parts would be taken for the whole; nothing is changed."""
    part = sharded(make_weight((12, 8)), mesh)
    optimizer = FiraAdamW([part], **OPTIONS)
    optimizer.init_states()
    other = FiraAdamW([weight := nn.Parameter(make_weight((12, 8)))], **OPTIONS)
    with pytest.raises(CheckpointError, match="sharded over processes"):
        other.load_state_dict(optimizer.state_dict())
    assert weight not in other.state


def test_a_rehearsal_makes_states_and_no_step() -> None:
    """torch.distributed.checkpoint steps with zeros to learn what a state is: the first basis is still to be found."""
    weights = [nn.Parameter(make_weight((12, 8))) for _ in range(2)]
    optimizers = [FiraAdamW([weight], **OPTIONS) for weight in weights]
    weights[0].grad = torch.zeros_like(weights[0])
    for rate in (0.0, OPTIONS["lr"]):
        optimizers[0].param_groups[0]["lr"] = rate
        if rate == 0.0:
            optimizers[0].step()
    assert optimizers[0].state[weights[0]]["step"] == 0
    for gradient in make_gradients((12, 8), 4):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights)


def test_groups_gain_nothing_by_a_load() -> None:
    """torch.distributed.checkpoint asks for every option that a group has."""
    optimizers = [FiraAdamW([nn.Parameter(make_weight((12, 8)))], **OPTIONS) for _ in range(2)]
    keys = optimizers[1].param_groups[0].keys()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].param_groups[0].keys() == keys


def test_a_copy_keeps_the_partition() -> None:
    optimizer = FiraAdamW([nn.Parameter(make_weight((12, 8)))], **OPTIONS, partition_states=True)
    assert copy.deepcopy(optimizer).partition_states


def test_an_optimizer_of_parameters_left_behind_warns_once() -> None:
    optimizer = FiraAdamW([nn.Parameter(make_weight((12, 8)))], **OPTIONS)
    with pytest.warns(UserWarning, match="no parameter had a gradient"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_parts_are_those_of_torch() -> None:
    for size in range(12):
        for num in (1, 2, 3, 5):
            chunks = [len(chunk) for chunk in torch.arange(size).chunk(num)] if size else []
            chunks += [0] * (num - len(chunks))
            bounds = [Split(None, 0, 0, num, part).bounds(size) for part in range(num)]
            assert [end - start for start, end in bounds] == chunks
