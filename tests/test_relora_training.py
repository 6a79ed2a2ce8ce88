"""Training with restarts: against the plain reference, against LoRA, and what restarts are for, a high rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from fullrank import ReLoRA
from fullrank.factors import train_scaling
from tests.reference import relora as reference
from tests.restarting import KINDS, Bare, output, peft_model, train, train_bare, trainable

LR = 2e-2


def largest_of(ratio: float) -> Callable[[str, Tensor], Tensor]:
    """Which entries a reset by magnitude keeps."""
    return lambda _, moment: reference.largest(moment, round(ratio * moment.numel()))


# The reference.


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.5, None], ids=["scale", "trained-scale"])
@pytest.mark.parametrize("reset", ["zero", "magnitude"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_training_is_the_reference(fused: bool, reset: str, scale: float | None, weight_decay: float) -> None:
    """Every weight of 30 steps with four restarts and the jagged schedule, to 1e-10 of what training changed."""
    model = Bare(scale=scale)
    factors = model.pair().parameters()
    optimizer = torch.optim.AdamW(factors, lr=LR, weight_decay=weight_decay, fused=fused)
    relora = ReLoRA([model.pair()], optimizer, restart_every=6, restart_warmup_steps=2, reset=reset, reset_ratio=0.7)
    scheduler = relora.scheduler(num_training_steps=30, warmup_steps=3, min_lr_ratio=0.1)
    oracle = reference.ReLoRA(model.weight, model.a.detach(), scale=scale, weight_decay=weight_decay)
    start, num_restarts = model.weight.clone(), 0
    for step in range(30):
        rate = reference.cosine_restarts(step, first_warmup=3, restart_warmup=2, cycle=6, total=30, min_ratio=0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * rate, rel=1e-12, abs=1e-18)
        train_bare(model, optimizer, 1)
        restart = relora.step()
        scheduler.step()
        oracle.update(model.gradient_at, LR * rate)
        if (step + 1) % 6 == 0:
            assert restart is not None
            num_restarts += 1
            oracle.restart(model.a.detach(), largest_of(0.7) if reset == "magnitude" else None)
        moved = (oracle.effective() - start).norm()
        assert (model.effective() - oracle.effective()).norm() <= 1e-10 * moved + 1e-15, step
        assert (model.weight - oracle.weight).norm() <= 1e-10 * moved + 1e-15, step
    assert num_restarts == 5
    assert moved > 0.3


def test_a_peft_layer_trains_as_the_reference() -> None:
    """The layer, its scale and its merge are PEFT's; one linear layer on a linear problem."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    problem = Bare()
    model: Any = nn.Sequential(nn.Linear(12, 9, bias=False, dtype=torch.float64))
    model[0].weight.data.copy_(problem.weight)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.get_base_model()[0]
    optimizer = torch.optim.AdamW(trainable(model), lr=LR, weight_decay=0.0)
    relora = ReLoRA(model, optimizer, restart_every=5, restart_warmup_steps=1)
    scheduler = relora.scheduler(num_training_steps=20)
    pair = relora.pairs[0]
    oracle = reference.ReLoRA(problem.weight, pair.a.detach(), scale=2.0)
    for step in range(20):
        optimizer.zero_grad()
        (model(problem.inputs) - problem.inputs @ problem.target.T).square().mean().backward()
        optimizer.step()
        rate = reference.cosine_restarts(step, first_warmup=0, restart_warmup=1, cycle=5, total=20, min_ratio=0.1)
        oracle.update(problem.gradient_at, LR * rate)
        if relora.step() is not None:
            oracle.restart(pair.a.detach())
        scheduler.step()
        effective = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(effective.detach(), oracle.effective(), rtol=0, atol=1e-11)
    assert relora.last_restart is not None


# LoRA is ReLoRA without restarts.


@pytest.mark.parametrize("every", [None, 9], ids=["never", "too late"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_restart_it_is_lora(kind: str, every: int | None) -> None:
    """Bit for bit: weights, state and rates under a scheduler made jagged."""
    runs = []
    for with_restarts in (False, True):
        model = peft_model(kind)
        optimizer = torch.optim.AdamW(trainable(model), lr=LR)
        scheduler: Any = CosineAnnealingLR(optimizer, T_max=8)
        relora = None
        if with_restarts:
            relora = ReLoRA(model, optimizer, restart_every=every, restart_warmup_steps=2)
            scheduler = relora.jagged(scheduler)
        losses = train(model, optimizer, range(8), relora, scheduler)
        runs.append((losses, model.state_dict(), optimizer.state_dict()["state"]))
    (losses, weights, state), (other_losses, other_weights, other_state) = runs
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert all(torch.equal(state[i][key], other_state[i][key]) for i in state for key in state[i])
    assert losses[-1] != losses[0]


# A high rank.


def test_each_restart_adds_the_rank_of_the_factors() -> None:
    """After k restarts the change of a weight has rank (k + 1) r, exactly, on a problem that asks for all of it."""
    rank = 3
    model = Bare(rows=16, columns=18, rank=rank)
    optimizer = torch.optim.AdamW([model.a, model.b], lr=LR, weight_decay=0.0)
    relora = ReLoRA([model.pair()], optimizer, restart_every=20, restart_warmup_steps=2)
    scheduler = relora.scheduler(num_training_steps=100, min_lr_ratio=1.0)
    start = model.weight.clone()
    for number in range(1, 6):
        train_bare(model, optimizer, 19, relora, scheduler)
        train_bare(model, optimizer, 1)
        sizes = torch.linalg.svdvals(model.effective().detach() - start)
        full = number * rank
        assert sizes[full - 1] > 1e-3 * sizes[0], number
        assert (sizes[full:] < 1e-12 * sizes[0]).all(), number
        relora.step()
        scheduler.step()
    assert relora.last_restart is not None


def test_restarts_fit_what_factors_alone_cannot() -> None:
    """The same steps and rate without restarts stop at the best matrix of their rank."""
    losses = {}
    for every in (None, 60):
        model = Bare(rank=2)
        optimizer = torch.optim.AdamW([model.a, model.b], lr=5e-2, weight_decay=0.0)
        relora = ReLoRA([model.pair()], optimizer, restart_every=every, restart_warmup_steps=5)
        scheduler = relora.scheduler(num_training_steps=480, min_lr_ratio=0.1)
        losses[every] = train_bare(model, optimizer, 480, relora, scheduler)[-1]
    missing = torch.linalg.svdvals(Bare().target - Bare().weight)[2:].square().sum() / 9
    assert losses[None] > 0.5 * missing
    assert losses[60] < 0.1 * losses[None]


# A trained scale.


def with_trained_scale(kind: str) -> tuple[Any, list[Any], torch.optim.Optimizer, ReLoRA]:
    model = peft_model(kind, torch.float64)
    numbers = train_scaling(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=LR)
    return model, numbers, optimizer, ReLoRA(model, optimizer, restart_every=4, restart_warmup_steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_scale_survives_its_restarts(kind: str) -> None:
    """It starts at tanh(1), learns as soon as B is not zero, and does so again after every restart."""
    model, numbers, optimizer, relora = with_trained_scale(kind)
    assert len(numbers) == len(relora.pairs)
    assert {number for pair in relora.pairs for number in pair.parameters()[2:]} == set(numbers)
    assert all(any(number is held for held in optimizer.param_groups[0]["params"]) for number in numbers)
    for cycle in range(3):
        assert all(number.item() == 1.0 for number in numbers)
        train(model, optimizer, range(4 * cycle, 4 * cycle + 3), relora)
        assert all(number.item() != 1.0 for number in numbers)
        assert all(number.grad.item() != 0.0 for number in numbers)
        train(model, optimizer, range(4 * cycle + 3, 4 * cycle + 4))
        before = output(model)
        assert relora.step() is not None
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-12 * before.abs().max().item())


def test_a_trained_scale_is_what_the_layer_multiplies_by() -> None:
    """tanh of the number, at every forward pass; a copy and a saved state have numbers of their own."""
    model, numbers, optimizer, relora = with_trained_scale("linear")
    train(model, optimizer, range(3), relora)
    for pair in relora.pairs:
        layer = model.get_submodule(pair.name)
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(pair.update(), delta.detach(), rtol=0, atol=1e-14)
    scale = torch.stack([number.detach().tanh() for number in numbers])
    assert (scale - torch.ones(()).tanh()).abs().min() > 1e-3
    twin = copy.deepcopy(model)
    kept = output(model)
    with torch.no_grad():
        for number in numbers:
            number.zero_()
    assert not torch.equal(output(model), kept)
    assert torch.equal(output(twin), kept)
    names = [name for name in twin.state_dict() if name.endswith("lora_scaling.default")]
    assert len(names) == len(numbers)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(output(model), kept)


# Other people's loops.


def test_accelerate_wraps_the_optimizer() -> None:
    """Bit for bit the plain loop: ReLoRA gets the wrapper, and its scheduler is made of it."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    runs = []
    for wrapped in (False, True):
        model = peft_model("linear")
        optimizer: Any = torch.optim.AdamW(trainable(model), lr=LR)
        prepared = model
        if wrapped:
            prepared, optimizer = accelerator.prepare(model, optimizer)
            assert type(optimizer).__name__ == "AcceleratedOptimizer"
        relora = ReLoRA(prepared, optimizer, restart_every=4, restart_warmup_steps=2, reset="magnitude")
        scheduler = relora.scheduler(num_training_steps=12)
        losses = train(prepared, optimizer, range(12), relora, scheduler)
        assert relora.last_restart is not None
        assert relora.last_restart.reset.percent == pytest.approx(90, abs=2)
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_a_scheduler_of_two_groups_keeps_their_rates_apart() -> None:
    model = Bare()
    optimizer = torch.optim.AdamW([{"params": [model.a], "lr": 0.1}, {"params": [model.b], "lr": 0.4}])
    relora = ReLoRA([model.pair()], optimizer, restart_every=4, restart_warmup_steps=2)
    scheduler = relora.scheduler(num_training_steps=12, min_lr_ratio=0.0)
    assert isinstance(scheduler, LambdaLR)
    for step in range(12):
        rate = reference.cosine_restarts(step, first_warmup=0, restart_warmup=2, cycle=4, total=12, min_ratio=0.0)
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([0.1 * rate, 0.4 * rate], rel=1e-12, abs=1e-18)
        train_bare(model, optimizer, 1, relora, scheduler)
