"""Scaling factors read off an optimizer's state after a step are those that the step used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import (
    ApolloAdamW,
    ConfigError,
    FiraAdamW,
    FiraRMSprop,
    GaLoreAdamW,
    UnsupportedError,
    divide_params,
)
from fullrank.ops import lowrank
from fullrank.ops.subspace import projects_rows
from fullrank.projected import MatrixStep
from fullrank.scaling import matrices, num_factors, sample_columns, scaling_factors
from fullrank.sharding import Routine
from tests.reference.fira import Fira
from tests.reference.projection import Basis, channel_factors

SHAPES = {"attn_tall": (14, 6), "attn_wide": (5, 16), "mlp_square": (8, 8)}
STEPS = 6


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """Gradients that grow and shrink from step to step, so that a limiter acts at some of them."""
    torch.manual_seed(100 + step)
    size = (1.0, 0.2, 5.0, 0.1, 3.0, 1.0)[step % 6]
    for parameter in named.values():
        rows = torch.logspace(-2, 1, parameter.shape[0])[:, None]
        parameter.grad = (size * rows * torch.randn(parameter.shape)).to(parameter.dtype)


class Recorded:
    """What the optimizer itself computed at the last step, by the shape of the parameter."""

    used: dict[tuple[int, ...], dict[str, Tensor]]

    def update_(self, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]) -> Routine:
        whole = group.get("scaling") in ("matrix", "tensor") or matrix.basis_left is not None
        factor = lowrank.norms(matrix.direction, whole=whole) / (lowrank.norms(matrix.low, whole=whole) + 1e-8)
        self.used = getattr(self, "used", {})
        self.used[tuple(matrix.grad.shape)] = {"factor": factor.flatten().clone(), "limiter": torch.ones(())}
        yield from super().update_(matrix, state, group)  # type: ignore[misc]

    def limit_growth_(
        self, norm: Tensor, matrix: MatrixStep, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        before = norm.clone()
        factor: Tensor = super().limit_growth_(norm, matrix, state, group)  # type: ignore[misc]
        self.used[tuple(matrix.grad.shape)] |= {"norm": before, "limiter": factor.clone()}
        return factor


class RecordedFira(Recorded, FiraAdamW):
    pass


class RecordedFiraRMSprop(Recorded, FiraRMSprop):
    pass


class RecordedApollo(Recorded, ApolloAdamW):
    pass


class RecordedGaLore(Recorded, GaLoreAdamW):
    pass


CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (RecordedFira, {"rank": 2}),
    (RecordedFira, {"rank": 4}),  # the residual is formed
    (RecordedFira, {"rank": 2, "alpha": 0.25, "alpha_on": "update", "basis": "svd"}),
    (RecordedFira, {"rank": 4, "alpha": 0.25, "alpha_on": "subspace", "proj_type": "reverse_std"}),
    (RecordedFira, {"rank": 2, "scaling": "matrix", "proj_type": "left"}),
    (RecordedFira, {"rank": 3, "proj_type": "full"}),
    (RecordedFira, {"rank": 2, "limiter_gamma": None}),
    (RecordedFira, {"rank": 2, "limiter_floor": 1e9}),
    (RecordedFiraRMSprop, {"rank": 2}),
    (RecordedApollo, {"rank": 2}),
    (RecordedApollo, {"rank": 1, "scaling": "tensor", "alpha": 128.0}),
    (RecordedGaLore, {"rank": 2}),
]


def oriented_shape(shape: tuple[int, int], proj_type: str) -> tuple[int, int]:
    return shape[::-1] if projects_rows(shape, proj_type) else shape


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_they_are_what_the_optimizer_used(kind: type[Any], options: dict[str, Any]) -> None:
    named = parameters()
    optimizer = kind(
        [{"params": list(named.values()), "param_names": list(named), **options}], lr=1e-2, update_proj_gap=3
    )
    acted = []
    for step in range(STEPS):
        set_gradients(named, step)
        optimizer.step()
        before = {name: parameter.clone() for name, parameter in named.items()}
        found = scaling_factors(optimizer)
        assert list(found) == list(named)
        for name, parameter in named.items():
            assert torch.equal(parameter, before[name]), "it only looks on"
            used = optimizer.used[oriented_shape(SHAPES[name], options.get("proj_type", "std"))]
            torch.testing.assert_close(found[name].values, used["factor"], rtol=1e-5, atol=0)
            assert len(found[name].values) == num_factors(parameter, optimizer.param_groups[0])
            torch.testing.assert_close(found[name].limiter, used["limiter"], rtol=1e-5, atol=0)
            if "norm" in used:
                limited = found[name].limited_norm
                assert limited is not None
                torch.testing.assert_close(limited, used["norm"], rtol=1e-5, atol=0)
            assert found[name].grad_norm == pytest.approx(parameter.grad.norm().item(), rel=1e-6)
            assert found[name].acted == bool(used["limiter"] < 1)
            acted.append(found[name].acted)
    has_limiter = "norm" in used and options.get("limiter_floor") is None
    assert any(acted) == has_limiter
    assert not all(acted)


def test_without_a_limiter_the_norm_is_still_told() -> None:
    norms = []
    for gamma in (1.01, None):
        named = parameters()
        optimizer = FiraAdamW(list(named.values()), rank=2, limiter_gamma=gamma)
        set_gradients(named, 0)
        optimizer.step()
        norms.append([found.limited_norm for found in scaling_factors(optimizer).values()])
    assert norms[0] == norms[1]
    assert all(norm is not None and norm > 0 for norm in norms[0])


def basis_of(optimizer: FiraAdamW, parameter: nn.Parameter) -> Basis:
    """The basis in force; singular vectors have no sign of their own, so the reference is given ours."""
    basis = optimizer.state[parameter]["basis"]
    return Basis(left=basis) if parameter.shape[0] < parameter.shape[1] else Basis(right=basis)


@pytest.mark.parametrize("gamma", [1.01, None])
def test_they_are_those_of_the_plain_algorithm(gamma: float | None) -> None:
    """Factors and limiter against tests/reference, which knows nothing of how the package computes them."""
    named = {name: nn.Parameter(value.double()) for name, value in parameters().items()}
    optimizer = FiraAdamW(list(named.values()), lr=1e-2, rank=2, update_proj_gap=3, basis="svd", limiter_gamma=gamma)
    seen: list[dict[str, Any]] = []

    class Watched(Fira):
        def update(self, grad: Tensor, memory: Any, basis: Any) -> Tensor:
            result = super().update(grad, memory, basis)
            low = basis.down(grad)
            psi = memory.m / (memory.v.sqrt() + self.eps)
            factor = channel_factors(psi, low, basis)
            residual = factor * (grad - basis.up(low))
            seen.append({"factor": factor.flatten(), "norm": residual.norm(), "after": memory.residual_norm})
            return result

    copies = [value.detach().clone() for value in named.values()]
    reference = Watched(copies, lr=1e-2, rank=2, gap=3, gamma=gamma)
    for step in range(STEPS):
        set_gradients(named, step)
        seen.clear()
        optimizer.step()
        reference.step([value.grad for value in named.values()], [basis_of(optimizer, p) for p in named.values()])
        for found, expected in zip(scaling_factors(optimizer).values(), seen, strict=True):
            torch.testing.assert_close(found.values, expected["factor"], rtol=1e-6, atol=0)
            assert found.limited_norm is not None
            torch.testing.assert_close(found.limited_norm, expected["norm"], rtol=1e-6, atol=0)
            torch.testing.assert_close(found.limiter, expected["after"] / expected["norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_full_rank_is_adam_over_the_gradient(fused: bool) -> None:
    named = parameters()
    optimizer = torch.optim.AdamW(list(named.values()), lr=1e-2, betas=(0.9, 0.99), eps=1e-6, fused=fused)
    first = {name: torch.zeros(SHAPES[name]) for name in named}
    second = {name: torch.zeros(SHAPES[name]) for name in named}
    names = {parameter: name for name, parameter in named.items()}
    for step in range(STEPS):
        set_gradients(named, step)
        optimizer.step()
        for name, found in scaling_factors(optimizer, names=names).items():
            grad = named[name].grad
            assert grad is not None
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.99 * second[name] + 0.01 * grad**2
            direction = first[name] / (second[name].sqrt() + 1e-6)
            dim = 1 if SHAPES[name][0] >= SHAPES[name][1] else 0  # one factor for each place along the long side
            expected = direction.norm(dim=dim) / (grad.norm(dim=dim) + 1e-8)
            torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=0)
            assert len(found.values) == max(SHAPES[name])
            assert found.limited_norm is None
            assert not found.acted


def test_a_rank_that_is_full_gives_the_full_ranks_residual_none() -> None:
    named = {"attn": nn.Parameter(torch.randn(6, 6))}
    optimizer = FiraAdamW(list(named.values()), rank=6, basis="svd")
    named["attn"].grad = torch.randn(6, 6)
    optimizer.step()
    (found,) = scaling_factors(optimizer).values()
    assert found.limited_norm is not None
    assert found.limited_norm < 1e-4 * (found.values * named["attn"].grad.norm(dim=1)).norm()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
def test_bfloat16(state_dtype: str) -> None:
    """Weights and states of two bytes: as near as their rounding lets."""
    named = parameters(torch.bfloat16)
    optimizer = RecordedFira(
        [{"params": list(named.values()), "rank": 2}], lr=1e-2, update_proj_gap=3, state_dtype=state_dtype
    )
    for step in range(STEPS):
        set_gradients(named, step)
        optimizer.step()
        for name, found in zip(named, scaling_factors(optimizer).values(), strict=True):
            used = optimizer.used[oriented_shape(SHAPES[name], "std")]
            assert found.values.dtype == torch.float32
            torch.testing.assert_close(found.values, used["factor"], rtol=1e-2, atol=0)
            assert found.limited_norm is not None
            torch.testing.assert_close(found.limited_norm, used["norm"], rtol=1e-2, atol=0)
            torch.testing.assert_close(found.limiter, used["limiter"], rtol=2e-2, atol=0)
            assert found.acted == bool(used["limiter"] < 0.99)


def test_gradients_of_zero_and_of_nothing() -> None:
    named = parameters()
    optimizer = FiraAdamW([{"params": list(named.values()), "param_names": list(named)}], rank=2)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    named["attn_wide"].grad = None
    optimizer.step()
    found = scaling_factors(optimizer)
    assert list(found) == ["attn_tall", "mlp_square"]
    for factors in found.values():
        assert factors.values.eq(0).all()
        assert factors.limiter == 1
        assert factors.limited_norm == 0


def test_a_norm_that_overflowed_was_dropped() -> None:
    named = parameters()
    optimizer = RecordedFira(list(named.values()), rank=2)
    for size in (1.0, 1e20):
        set_gradients(named, 0)
        for parameter in named.values():
            parameter.grad.mul_(size)
        optimizer.step()
    for name, found in zip(named, scaling_factors(optimizer).values(), strict=True):
        used = optimizer.used[oriented_shape(SHAPES[name], "std")]
        assert used["limiter"] == 0
        assert found.limiter == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.attn = nn.Linear(6, 8)
        self.mlp = nn.Conv1d(8, 4, 3)


def test_the_projected_matrices_are_chosen_else_the_targets() -> None:
    model = Net()
    names = {parameter: name for name, parameter in model.named_parameters()}
    fira = FiraAdamW(divide_params(model, ["attn"], rank=2))
    assert [name for name, _, _ in matrices(fira)] == ["attn.weight"]
    full = torch.optim.AdamW(model.parameters())
    chosen = matrices(full, names=names)
    assert [name for name, _, _ in chosen] == ["attn.weight", "mlp.weight"]
    assert [num_factors(parameter, group) for _, parameter, group in chosen] == [8, 24]
    assert [name for name, _, _ in matrices(full, names=names, target_modules=["embed"])] == ["embed.weight"]
    model.attn.weight.requires_grad_(False)
    assert [name for name, _, _ in matrices(full, names=names)] == ["mlp.weight"]


def test_a_convolution_is_a_matrix() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-8)
    model.mlp.weight.grad = torch.randn(4, 8, 3)
    optimizer.step()
    found = scaling_factors(optimizer, names={model.mlp.weight: "mlp"}, target_modules=["mlp"])
    assert found["mlp"].values.shape == (24,)
    # after one step Adam's direction is (1 - 0.9) / sqrt(1 - 0.999) times the gradient's sign
    flat = model.mlp.weight.grad.reshape(4, 24)
    expected = 0.1 / math.sqrt(1e-3) * 2 / flat.norm(dim=0)
    torch.testing.assert_close(found["mlp"].values, expected, rtol=1e-4, atol=0)


def test_what_cannot_be_read_is_refused() -> None:
    named = parameters()
    with pytest.raises(ConfigError, match=r"no trainable matrix .* attn, mlp .* group 0, parameter 0"):
        scaling_factors(torch.optim.AdamW(list(named.values())))
    with pytest.raises(ConfigError, match=r"Use \['attn'\]"):
        matrices(torch.optim.AdamW(list(named.values())), target_modules="attn")
    sgd = torch.optim.SGD(list(named.values()), lr=0.1, momentum=0.9)
    set_gradients(named, 0)
    sgd.step()
    with pytest.raises(UnsupportedError, match=r"no moments exp_avg .* but momentum_buffer"):
        scaling_factors(sgd, names={parameter: name for name, parameter in named.items()})


def test_columns_are_sampled_without_replacement_and_the_same_everywhere() -> None:
    chosen = sample_columns(1000, 100, name="attn", seed=3)
    assert chosen == sample_columns(1000, 100, name="attn", seed=3)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert chosen[-1] < 1000
    assert chosen != sample_columns(1000, 100, name="mlp", seed=3)
    assert chosen != sample_columns(1000, 100, name="attn", seed=4)
    assert sample_columns(7, 100, name="attn") == list(range(7))
    assert sample_columns(7, 0, name="attn") == []
