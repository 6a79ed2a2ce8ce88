"""What every method promises, checked on every optimizer class of ``tests/cases``.

Here: every kind of parameter, and the contract of ``torch.optim.Optimizer``. State and checkpoints are
in ``test_methods_state.py``, hard gradients and refreshes in ``test_methods_gradients.py``. That the
numbers are the paper's is shown by the parity tests.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import fullrank
from fullrank import METHODS
from fullrank.optimizer import MethodOptimizer
from tests.cases import ALL, CASES, OptimizerCase
from tests.cases.harness import dtypes, every, feed, moves, ours, parameter
from tests.cases.tiny import TinyModel, assert_same, assert_same_state, gradients_at, train, weights_of
from tests.problems import SHAPES, make_gradients


def test_every_method_has_a_case() -> None:
    """A method without a case in tests/cases would go untested."""
    assert CASES.keys() == METHODS.keys()
    for name, case in CASES.items():
        assert isinstance(case.config(), METHODS[name].config)


def test_every_exported_optimizer_has_a_case() -> None:
    """So would an optimizer class."""
    public = [getattr(fullrank, name) for name in fullrank.__all__]
    classes = {kind for kind in public if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert classes == {case.kind for case in ALL if issubclass(case.kind, MethodOptimizer)}


# Parameters of every kind.


@dtypes
@every
def test_every_parameter_moves_and_keeps_its_layout(case: OptimizerCase, dtype: torch.dtype) -> None:
    """Tall, wide, square, 4-D, 1-D, transposed, channels_last: all change in place and stay finite."""
    model = TinyModel(dtype)
    before, places = weights_of(model), {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    train(model, case.on(model), range(4))
    for name, weight in model.named_parameters():
        assert weight.isfinite().all()
        assert (weight != before[name]).float().mean() > 0.5, name
        assert (weight.data_ptr(), weight.stride()) == places[name]


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gradient"])
@ours
def test_layout_does_not_change_the_numbers(case: OptimizerCase, layout: str) -> None:
    """A weight (or only its gradient) in another memory order trains as the contiguous one."""
    shape = "conv" if layout == "channels_last" else "wide"
    plain, other = parameter(shape, dtype=torch.float64), parameter(shape, dtype=torch.float64)

    def turned(tensor: Tensor) -> Tensor:
        if layout == "channels_last":
            return tensor.to(memory_format=torch.channels_last, copy=True)
        return tensor.t().clone(memory_format=torch.contiguous_format).t()

    if layout != "gradient":
        other = nn.Parameter(turned(other.detach()))
        assert not other.is_contiguous()
    first, second = case.of([plain]), case.of([other])
    for gradient in make_gradients(SHAPES[shape], 7):
        plain.grad, other.grad = gradient.clone(), turned(gradient)
        first.step()
        second.step()
        torch.testing.assert_close(other.detach(), plain.detach(), rtol=0, atol=1e-9)


@every
def test_gradients_are_read_only(case: OptimizerCase) -> None:
    """Not a bit of ``p.grad`` changes, nor the tensor that it is."""
    model = TinyModel()
    optimizer = case.on(model)
    train(model, optimizer, range(3))  # the next step refreshes
    for step in (3, 4):
        gradients = gradients_at(model, step)
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
        copies = {name: gradient.clone() for name, gradient in gradients.items()}
        optimizer.step()
        for name, gradient in gradients.items():
            assert model.get_parameter(name).grad is gradient
            assert torch.equal(gradient, copies[name])


@pytest.mark.parametrize("shape", ["tall", "vector"])
@every
def test_no_gradient_no_step_and_no_state(case: OptimizerCase, shape: str) -> None:
    """A parameter without a gradient waits; once it has one it starts as a fresh optimizer would."""
    waiting, busy, fresh, start = (parameter(shape) for _ in range(4))
    gradients = make_gradients(SHAPES[shape], 8, dtype=torch.float32)
    optimizer = case.of([waiting, busy])
    feed(optimizer, busy, gradients)
    assert torch.equal(waiting, start)
    assert waiting not in optimizer.state
    busy.grad = None
    kept = busy.detach().clone()
    late = feed(optimizer, waiting, gradients[:4])
    assert torch.equal(busy, kept)
    expected = feed(case.of([fresh, parameter(shape)]), fresh, gradients[:4])
    assert all(torch.equal(a, b) for a, b in zip(late, expected, strict=True))


@every
def test_frozen_parameters_are_left_alone(case: OptimizerCase) -> None:
    """A frozen weight in a group keeps its bits and gets no state."""
    frozen, weight = parameter().requires_grad_(False), parameter()
    start = frozen.detach().clone()
    optimizer = case.of([frozen, weight], weight_decay=0.1)
    feed(optimizer, weight, make_gradients(SHAPES["tall"], 3))
    assert torch.equal(frozen, start)
    assert frozen not in optimizer.state


@every
def test_tied_parameters_are_stepped_once(case: OptimizerCase) -> None:
    """A weight that two modules share moves as a weight that one module has."""
    tied, single = TinyModel(), TinyModel()
    tied.register_parameter("attn_again", tied.attn_tall)
    train(tied, case.on(tied), range(5))
    train(single, case.on(single), range(5))
    assert torch.equal(tied.attn_again, single.attn_tall)


# The contract of torch.optim.Optimizer.


@every
def test_closure(case: OptimizerCase) -> None:
    """The closure runs once, with gradients enabled, before the step; its loss is returned."""
    weight, other = parameter(), parameter()
    target = torch.zeros_like(weight)
    optimizer, plain = case.of([weight]), case.of([other])
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(weight, target)
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        plain.zero_grad()
        expected = nn.functional.mse_loss(other, target)
        expected.backward()
        assert plain.step() is None
        assert torch.equal(loss, expected)
        assert torch.equal(weight, other)
    assert calls == 3


@pytest.mark.parametrize("shape", ["tall", "vector"])
@every
def test_groups_have_their_own_learning_rate(case: OptimizerCase, shape: str) -> None:
    """Half the rate in a group, and the other groups' rate elsewhere: every update is half as long."""
    fast, slow = parameter(shape, dtype=torch.float64), parameter(shape, dtype=torch.float64)
    optimizer = case.of([fast], **({"basis": "svd"} if case.projected else {}))  # nothing random by position
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "lr")}
    optimizer.add_param_group({"params": [slow], "lr": 5e-3, **group})
    start = fast.detach().clone()
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for gradient in make_gradients(SHAPES[shape], 6):
        fast.grad, slow.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        for weight, history in zip((fast, slow), seen, strict=True):
            history.append(weight.detach().clone())
    for a, b in zip(moves(seen[0], start), moves(seen[1], start), strict=True):
        torch.testing.assert_close(b, a / 2, rtol=1e-9, atol=1e-12)


@ours
def test_groups_override_options(case: OptimizerCase) -> None:
    """Options in a group beat the optimizer's: such a weight trains as under an optimizer with those options."""
    override = {"rank": 2, "basis": "svd", "update_proj_gap": 2, "proj_type": "reverse_std", "alpha": 0.5, "eps": 1e-4}
    mixed, alone, beside = parameter(), parameter(), parameter("wide")
    optimizer = case.of([beside])
    optimizer.add_param_group({"params": [mixed], **override})
    gradients = make_gradients(SHAPES["tall"], 6)
    found = feed(optimizer, mixed, gradients)
    expected = feed(case.of([alone], **override), alone, gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["lambda", "cosine"])
@every
def test_learning_rate_schedules(case: OptimizerCase, kind: str) -> None:
    """torch's schedulers drive the rate: updates shrink by the factor, and nothing else changes."""
    factors = [1.0, 0.5, 0.25, 0.8, 0.1, 2.0] if kind == "lambda" else []
    runs: list[list[Tensor]] = []
    for scheduled in (False, True):
        weight = parameter(dtype=torch.float64)
        optimizer = case.of([weight])
        scheduler: LRScheduler | None = None
        if scheduled:
            by_table = LambdaLR(optimizer, lambda step: factors[min(step, 5)] if factors else 1.0)
            scheduler = by_table if kind == "lambda" else CosineAnnealingLR(optimizer, T_max=6)
        history = [weight.detach().clone()]
        for gradient in make_gradients(SHAPES["tall"], 6):
            if scheduled and kind == "cosine":
                factors.append(optimizer.param_groups[0]["lr"] / 1e-2)
            history += feed(optimizer, weight, [gradient])
            if scheduler is not None:
                scheduler.step()
        runs.append([b - a for a, b in itertools.pairwise(history)])
    for factor, constant, scheduled_move in zip(factors, *runs, strict=True):
        torch.testing.assert_close(scheduled_move, factor * constant, rtol=1e-9, atol=1e-12)


@every
def test_same_seed_same_bits(case: OptimizerCase) -> None:
    """Two runs give the same weights and state, whatever the global random state is."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = TinyModel()
        optimizer = case.on(model)
        train(model, optimizer, range(7))
        runs.append((model, optimizer))
    assert_same(runs[0][0], runs[1][0])
    assert_same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("shape", ["tall", "wide", "vector"])
@ours
def test_weight_decay_follows_the_update(case: OptimizerCase, shape: str) -> None:
    """p -= lr wd p after the update, projected and plain, when gradients do not depend on the weight."""
    free, decayed = parameter(shape, dtype=torch.float64), parameter(shape, dtype=torch.float64)
    start = free.detach().clone()
    gradients = make_gradients(SHAPES[shape], 6)
    updates = moves(feed(case.of([free]), free, gradients), start)
    found = feed(case.of([decayed], weight_decay=0.5), decayed, gradients)
    for update, weight in zip(updates, found, strict=True):
        start = start + update
        start -= 1e-2 * 0.5 * start
        torch.testing.assert_close(weight, start, rtol=0, atol=1e-12)


@every
def test_converges(case: OptimizerCase) -> None:
    """Fits a full-rank matrix: the loss of a least-squares problem falls by a factor of 100."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(64, 8, generator=generator), torch.randn(12, 8, generator=generator)
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = case.of([weight], lr=0.2 / case.options.get("alpha", 1.0))
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = ((weight - target) @ inputs.t()).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 1e-2 * losses[0]
