"""AdamW in all its routes: torch's fused kernel, the tensors it does not take, and the formula entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.ops import adam, subspace

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "correct_bias": True}


def drawn(seed: int, shape: tuple[int, ...] = (6, 5)) -> Tensor:
    """Normal numbers in float64."""
    return subspace.gaussian(shape[0], shape[1], seed=seed, dtype=torch.float64)


def run(weight: Tensor, moment_layout: Tensor | None = None, **changes: Any) -> list[Tensor]:
    """``adamw_`` on one tensor; weight and moments at the end."""
    options = {"eps": 1e-6} | OPTIONS | changes
    layout = weight if moment_layout is None else moment_layout
    moments = [torch.zeros_like(layout, dtype=weight.dtype) for _ in "mv"]
    for step in range(1, STEPS + 1):
        grad = torch.empty_like(weight).copy_(drawn(step, tuple(weight.shape)))
        adam.adamw_([weight], [grad], [moments[0]], [moments[1]], step=step, **options)
    return [weight, *moments]


def by_entry(weight: Tensor, *, eps: float = 1e-6, correct_bias: bool = True) -> Tensor:
    """The published formula, number by number in Python."""
    beta1, beta2 = OPTIONS["betas"]
    found = weight.clone()
    for place in torch.cartesian_prod(*map(torch.arange, weight.shape)):
        i, j = place.tolist()
        w, m, v = float(weight[i, j]), 0.0, 0.0
        for step in range(1, STEPS + 1):
            g = float(drawn(step, tuple(weight.shape))[i, j])
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if correct_bias else 1.0
            w -= OPTIONS["lr"] * correction * m / (math.sqrt(v) + eps)
            w -= OPTIONS["lr"] * OPTIONS["weight_decay"] * w
        found[i, j] = w
    return found


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_the_formula(eps: float, correct_bias: bool) -> None:
    """Epsilon on the uncorrected root, corrections in the step, decay after the update; to 1e-12."""
    start = drawn(0)
    found = run(start.clone(), eps=eps, correct_bias=correct_bias)[0]
    wanted = by_entry(start, eps=eps, correct_bias=correct_bias)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_torch_adamw_agrees_without_epsilon_and_decay() -> None:
    """What sets us apart from torch is the place of epsilon and of the decay alone."""
    parameter = torch.nn.Parameter(drawn(0))
    found = run(drawn(0), eps=0.0, weight_decay=0.0)[0]
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        parameter.grad = drawn(step)
        optimizer.step()
    torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.04), (torch.float16, 5e-3)])
def test_every_dtype(dtype: torch.dtype, atol: float, correct_bias: bool) -> None:
    """Weights and moments keep their dtype; near the formula to its rounding."""
    start = drawn(0).to(dtype)
    found = run(start.clone(), correct_bias=correct_bias)
    assert [t.dtype for t in found] == [dtype] * 3
    wanted = by_entry(start.double(), correct_bias=correct_bias)
    torch.testing.assert_close(found[0].double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["weight", "state", "strided"])
def test_layouts(layout: str) -> None:
    """A transposed weight, with moments in the same or another memory order, or with gaps: the same numbers."""
    start = drawn(0)
    weight = start.t().contiguous().t()
    if layout == "strided":
        weight = torch.zeros(6, 10, dtype=torch.float64)[:, ::2].copy_(start)
    found = run(weight, torch.empty(6, 5) if layout == "state" else None)[0]
    assert found is weight
    torch.testing.assert_close(weight, by_entry(start), rtol=0, atol=1e-12)


def test_several_tensors_and_none() -> None:
    """Lists of tensors of several dtypes and sizes step as each alone; an empty list is fine."""
    kinds = [((6, 5), torch.float64), ((3, 2), torch.float32), ((4, 4), torch.float64)]
    starts = [drawn(i, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)]
    grads = [drawn(9 + i, shape).to(dtype) for i, (shape, dtype) in enumerate(kinds)]
    together = [start.clone() for start in starts]
    adam.adamw_(
        together,
        [grad.clone() for grad in grads],
        [torch.zeros_like(w) for w in starts],
        [torch.zeros_like(w) for w in starts],
        step=1,
        eps=1e-6,
        **OPTIONS,
    )
    for start, grad, found in zip(starts, grads, together, strict=True):
        zeros = torch.zeros_like(start), torch.zeros_like(start)
        adam.adamw_([start], [grad], [zeros[0]], [zeros[1]], step=1, eps=1e-6, **OPTIONS)
        assert torch.equal(found, start)
    adam.adamw_([], [], [], [], step=1, eps=1e-6, **OPTIONS)


def test_directions() -> None:
    """Adam's and RMSprop's direction; the gradient is read only, the moments change in place."""
    grad = drawn(0)
    copy, m, v = grad.clone(), torch.ones_like(grad), torch.full_like(grad, 2.0)
    found = adam.adam_direction_(m, v, grad, betas=(0.9, 0.99), eps=1e-3)
    torch.testing.assert_close(m, 0.9 + 0.1 * grad)
    torch.testing.assert_close(v, 1.98 + 0.01 * grad * grad)
    torch.testing.assert_close(found, m / (v.sqrt() + 1e-3))
    square = torch.full_like(grad, 2.0)
    found = adam.rmsprop_direction_(square, grad, beta=0.9, eps=1e-3)
    torch.testing.assert_close(square, 1.8 + 0.1 * grad * grad)
    torch.testing.assert_close(found, grad / (square.sqrt() + 1e-3))
    assert torch.equal(grad, copy)


def test_step_size() -> None:
    """Both bias corrections, or the plain rate."""
    assert adam.adam_step_size(0.1, (0.9, 0.999), 1) == pytest.approx(0.1 * math.sqrt(0.001) / 0.1)
    assert adam.adam_step_size(0.1, (0.9, 0.999), 10**6) == pytest.approx(0.1)
    assert adam.adam_step_size(0.1, (0.9, 0.999), 1, correct_bias=False) == 0.1


def test_decay() -> None:
    """W = (1 - lr * weight_decay) W; nothing at all at 0."""
    weight = drawn(0)
    wanted = 0.95 * weight
    adam.decay_([weight], lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(weight, wanted)
    broken = torch.tensor([float("inf")])
    adam.decay_([broken], lr=0.0, weight_decay=0.0)
    adam.decay_([], lr=0.5, weight_decay=0.1)
    assert torch.equal(broken, torch.tensor([float("inf")]))
