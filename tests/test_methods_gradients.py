"""Every method on hard gradients (half precision, zero, broken, sparse, sharded), and at its refreshes."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import ApolloAdamW, ConfigError, UnsupportedError
from fullrank.ops import subspace
from fullrank.projected import ProjectedOptimizer, is_projected
from tests.cases import OptimizerCase
from tests.cases.harness import each_class, every, feed, ours, parameter, saved_and_read
from tests.cases.tiny import TARGETS, TinyModel, gradients_at, train, weights_of
from tests.problems import SHAPES, make_gradients

# Half precision and gradients that are not numbers.


@ours
def test_grad_scaler_skips_overflow(case: OptimizerCase) -> None:
    """Under torch's GradScaler a step with an infinite gradient changes no weight and no state."""
    model = TinyModel()
    optimizer = case.on(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        overflow = step in (0, 3)
        gradients = gradients_at(model, step)
        loss = sum((model.get_parameter(name) * gradient).sum() for name, gradient in gradients.items())
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) == overflow, (step, name)
        if overflow:
            assert scaler.get_scale() < scale
            after = optimizer.state_dict()["state"]
            assert after.keys() == state.keys()
            assert all(torch.equal(after[i][key], value) for i in state for key, value in state[i].items())


@ours
def test_half_precision_weights(case: OptimizerCase) -> None:
    """float16 matrices with float32 moments are near the float32 run; epsilon is above what float16 rounds off."""
    half, single = TinyModel(torch.float16), TinyModel()
    start = weights_of(single)
    train(half, case.on(half, eps=1e-4), range(3))
    train(single, case.on(single, eps=1e-4), range(3))
    for name, weight in single.named_parameters():
        found = half.get_parameter(name).detach().float()
        moved = (weight.detach() - start[name]).norm()
        assert found.isfinite().all()
        if weight.ndim >= 2 and any(target in name for target in TARGETS):
            assert (found - weight.detach()).norm() < 0.1 * moved, name


@ours
def test_half_precision_state(case: OptimizerCase) -> None:
    """Low-rank moments in float16, plain ones in float32, with an epsilon that float16 can hold.

    A step that overflowed is left out by hand.
    """
    model = TinyModel(torch.float16)
    optimizer = case.on(model, state_dtype=None, eps=1e-4)
    moments = set(optimizer.moments) if isinstance(optimizer, ProjectedOptimizer) else set()
    for step in range(5):
        gradients = gradients_at(model, step)
        if step == 2:
            gradients["norm"][0] = float("inf")
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
        if all(gradient.isfinite().all() for gradient in gradients.values()):
            optimizer.step()
    for _, weight, group in optimizer.named() if isinstance(optimizer, ProjectedOptimizer) else ():
        assert weight.isfinite().all()
        assert weight.dtype == torch.float16
        expected = torch.float16 if is_projected(weight, group) else torch.float32
        assert {optimizer.state[weight][key].dtype for key in moments} == {expected}


@every
def test_zero_gradients(case: OptimizerCase) -> None:
    """Zero gradients from the first step on move nothing; training afterwards is finite and moves again."""
    model = TinyModel()
    start = weights_of(model)
    optimizer = case.on(model, weight_decay=0.0)
    for _ in range(5):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, start[name]), name
    train(model, optimizer, range(5))
    for name, weight in model.named_parameters():
        assert weight.isfinite().all()
        assert not torch.equal(weight, start[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis", ["svd", "power", "random", "plain"])
@each_class
def test_a_broken_gradient_stays_with_its_weight(case: OptimizerCase, basis: str, bad: float) -> None:
    """NaN or inf, at a refresh or between two, breaks its own weight as in AdamW and no other; never raises."""
    options: dict[str, Any] = {"rank": None} if basis == "plain" else {"basis": basis}
    for broken_step in (0, 1, 3):
        clean, broken = ([parameter(seed=i) for i in range(3)] for _ in range(2))
        for weights in (clean, broken):
            with pytest.warns() if basis == "plain" else nullcontext():
                optimizer = case.of(weights, **options)
            for step, gradient in enumerate(make_gradients(SHAPES["tall"], 7, dtype=torch.float32)):
                for weight in weights:
                    weight.grad = gradient.clone()
                if weights is broken and step == broken_step:
                    broken[1].grad[0, 0] = bad
                optimizer.step()
        assert not broken[1].isfinite().all()
        assert torch.equal(broken[0], clean[0])
        assert torch.equal(broken[2], clean[2])


@ours
def test_sparse_gradients_are_refused(case: OptimizerCase) -> None:
    """By shape, with the remedy, and before anything moved."""
    embedding = nn.Embedding(7, 5, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = case.of([embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"\(7, 5\).*sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


# Refreshing the basis.


def refreshes(
    monkeypatch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range
) -> list[int]:
    """How many bases each step renewed."""
    counts: list[int] = []
    original = subspace.power_basis

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        counts[-1] += 1
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(subspace, "power_basis", counted)
        for step in steps:
            counts.append(0)
            for i, weight in enumerate(weights):
                weight.grad = make_gradients(SHAPES["tall"], 1, seed=100 * step + i, dtype=weight.dtype)[0]
            optimizer.step()
    return counts


@each_class
def test_staggered_refreshes(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step the refreshes of six weights spread over the gap, and a resumed run keeps the beat."""
    options = {"basis": "power", "update_proj_gap": 8}
    weights = [parameter(seed=i) for i in range(6)]
    together = refreshes(monkeypatch, case.of(weights, **options), weights, range(20))
    assert together == [6 if step % 8 == 0 else 0 for step in range(20)]

    options["stagger_refresh"] = True
    optimizer = case.of(weights, **options)
    first = refreshes(monkeypatch, optimizer, weights, range(6))
    other = copy.deepcopy(weights)
    resumed = case.of(other, **options)
    resumed.load_state_dict(saved_and_read(optimizer))
    rest = refreshes(monkeypatch, optimizer, weights, range(6, 25))
    assert refreshes(monkeypatch, resumed, other, range(6, 25)) == rest
    counts = first + rest
    assert counts[0] == 6
    assert sum(counts[1:9]) == sum(counts[9:17]) == sum(counts[17:25]) == 6
    assert max(counts[1:]) <= 2
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("basis", ["svd", "power", "random"])
@each_class
def test_rotated_moments(case: OptimizerCase, basis: str, proj_type: str) -> None:
    """Rotation acts at refreshes only, keeps second moments non-negative and the state its spec."""
    if case.kind is ApolloAdamW and basis == "random":
        with pytest.raises(ConfigError, match="rotate_moments needs an orthonormal basis"):
            case.of([parameter()], basis=basis, rotate_moments=True)
        return
    runs, final = [], []
    gradients = make_gradients(SHAPES["tall"], 7)
    for rotate in (False, True):
        weight = parameter(dtype=torch.float64)
        optimizer = case.of([weight], basis=basis, proj_type=proj_type, rotate_moments=rotate)
        runs.append(feed(optimizer, weight, gradients))
        final.append(optimizer.state[weight])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))
    moment = next(key for key in ("exp_avg", "square_avg") if key in final[0])
    assert not torch.equal(final[0][moment], final[1][moment])
    assert {k: v.shape for k, v in final[0].items()} == {k: v.shape for k, v in final[1].items()}
    second = final[1].get("exp_avg_sq", final[1].get("square_avg"))
    assert (second >= 0).all()


@pytest.mark.parametrize("basis", ["svd", "power", "random"])
@each_class
def test_refresh_at_every_step(case: OptimizerCase, basis: str) -> None:
    """update_proj_gap=1 renews the basis at each step and still trains."""
    weight = parameter()
    optimizer = case.of([weight], basis=basis, update_proj_gap=1)
    bases = []
    for gradient in make_gradients(SHAPES["tall"], 5):
        feed(optimizer, weight, [gradient])
        bases.append(optimizer.state[weight]["basis"].clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(bases))
    assert weight.isfinite().all()


@pytest.mark.parametrize("basis", ["svd", "power"])
@each_class
def test_one_enormous_gradient_is_survived(case: OptimizerCase, basis: str) -> None:
    """A finite spike whose squares overflow float32 leaves finite weights and a limiter that still works."""
    weight = parameter(dtype=torch.float32)
    optimizer = case.of([weight], basis=basis)
    for number, gradient in enumerate(make_gradients(SHAPES["tall"], 8, dtype=torch.float32)):
        weight.grad = gradient * (1e19 if number == 3 else 1.0)
        optimizer.step()
        assert weight.isfinite().all()
    assert all(value.isfinite().all() for key, value in optimizer.state[weight].items() if key == "limiter_norm")
