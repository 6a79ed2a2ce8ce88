"""A warm start in a plain loop: full-rank training bit for bit, then the weights freeze and their factors wake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fullrank import ConfigError, ReLoRA
from fullrank.factors import WarmStart, find_pairs, train_scaling
from tests.restarting import (
    KINDS,
    Bare,
    output,
    peft_model,
    plain_model,
    through_a_file,
    train,
    train_bare,
    trainable,
)

LR, WARM, EVERY, STEPS = 2e-2, 4, 3, 12
"""Restarts after 7 and 10 steps."""


def others_of(model: nn.Module) -> list[nn.Parameter]:
    """What is neither a factor nor under one: norms, biases, embeddings."""
    taken = {parameter for pair in find_pairs(model) for parameter in (pair.weight, *pair.parameters())}
    return [parameter for parameter in model.parameters() if parameter not in taken]


def pieces(kind: str, *, seed: int = 0, scaling: bool = False, **options: Any) -> tuple[Any, Any, ReLoRA, Any]:
    """Model, optimizer over all parameters, restarts with a warm start, their scheduler."""
    model = peft_model(kind, seed=seed)
    if scaling:
        train_scaling(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    relora = ReLoRA(
        model,
        optimizer,
        restart_every=EVERY,
        restart_warmup_steps=1,
        warm_start_steps=WARM,
        warm_start_only=others_of(model),
        **options,
    )
    return model, optimizer, relora, relora.scheduler(num_training_steps=STEPS, warmup_steps=2)


def under_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@pytest.mark.parametrize("scaling", [False, True], ids=["scale", "trained-scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_start_is_full_training(kind: str, scaling: bool) -> None:
    """Weights, state, losses and rates of a model without factors, bit for bit; the factors are as they were."""
    model, optimizer, relora, scheduler = pieces(kind, scaling=scaling, warm_start_lr_ratio=0.5)
    plain = plain_model(kind)
    dense = torch.optim.AdamW(plain.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(dense, scheduler.lr_lambdas[0])
    factors = {p: p.detach().clone() for pair in relora.pairs for p in pair.parameters()}
    assert train(model, optimizer, range(WARM - 1), relora, scheduler) == train(
        plain, dense, range(WARM - 1), None, schedule
    )
    assert relora.num_steps == WARM - 1
    ours = {under_peft(name): p for name, p in model.named_parameters() if p not in factors}
    assert ours.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name], parameter), name
        assert ours[name].requires_grad
        state = optimizer.state[ours[name]]
        assert all(torch.equal(state[key], value) for key, value in dense.state[parameter].items())
    for factor, start in factors.items():
        assert torch.equal(factor, start)
        assert not factor.requires_grad
        assert factor.grad is None
        assert factor not in optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_switch_weights_freeze_and_factors_wake(kind: str) -> None:
    """The function is that of the trained weights; gradients and states of the weights are gone."""
    model, optimizer, relora, scheduler = pieces(kind)
    train(model, optimizer, range(WARM), relora, scheduler)
    assert relora.last_restart is None, "the switch is not a restart"
    dense = [*(pair.weight for pair in relora.pairs), *others_of(model)]
    factors = [parameter for pair in relora.pairs for parameter in pair.parameters()]
    assert set(dense) | set(factors) == set(model.parameters())
    assert all(p.grad is None and p not in optimizer.state and not p.requires_grad for p in dense)
    assert all(p.requires_grad for p in factors)
    assert not optimizer.state
    before = {p: p.detach().clone() for p in (*dense, *factors)}
    plain = plain_model(kind)
    plain.load_state_dict({under_peft(n): p for n, p in model.state_dict().items() if "lora_" not in n}, strict=False)
    assert torch.equal(output(model), output(plain)), "the factors start from nothing"
    assert optimizer.param_groups[0]["lr"] == 0.0
    train(model, optimizer, range(WARM, WARM + 2), relora, scheduler)
    assert all(torch.equal(p, before[p]) for p in dense)
    assert not any(torch.equal(p, before[p]) for p in factors)
    assert set(optimizer.state) == set(factors)


def test_restarts_are_counted_from_its_end() -> None:
    model, optimizer, relora, scheduler = pieces("linear")
    seen = []
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        weights = [pair.weight.detach().clone() for pair in relora.pairs]
        restart = relora.step()
        scheduler.step()
        moved = any(not torch.equal(pair.weight, w) for pair, w in zip(relora.pairs, weights, strict=True))
        assert moved == (restart is not None)
        seen += [restart.step] if restart else []
    assert seen == [7, 10]


def test_factors_do_not_sleep_without_a_warm_start() -> None:
    """Nor is what trains touched: a model may have frozen and thawed what it likes."""
    model = peft_model("linear")
    model.base_model.model.norm.weight.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model))
    relora = ReLoRA(model, optimizer, restart_every=3, restart_warmup_steps=1)
    train(model, optimizer, range(3), relora)
    assert relora.last_restart is not None
    relora.load_state_dict({"num_steps": 2})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("reset", ["zero", "magnitude"])
@pytest.mark.parametrize("saved_after", [2, WARM, WARM + 1, 7, 8], ids=lambda step: f"after{step}")
def test_a_resumed_run_is_the_uninterrupted_one(saved_after: int, reset: str) -> None:
    """In the warm start, at its end, after it, at a restart and after that."""
    whole = pieces("linear", reset=reset)
    train(whole[0], whole[1], range(saved_after), *whole[2:])
    saved = through_a_file([part.state_dict() for part in whole])
    losses = train(whole[0], whole[1], range(saved_after, STEPS), *whole[2:])
    resumed = pieces("linear", seed=4, reset=reset)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    trains = {name for name, p in resumed[0].named_parameters() if p.requires_grad}
    assert all(("lora_" in name) == (saved_after >= WARM) for name in trains)
    assert train(resumed[0], resumed[1], range(saved_after, STEPS), *resumed[2:]) == losses
    weights = whole[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed[0].state_dict().items())


@pytest.mark.parametrize("scale", [1.5, None], ids=["scale", "trained-scale"])
def test_a_bare_pair_is_warm_started(scale: float | None) -> None:
    """With torch alone: the weight of one's own layer trains first."""
    model, dense = Bare(scale=scale), Bare(scale=scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    relora = ReLoRA([model.pair()], optimizer, restart_every=EVERY, restart_warmup_steps=1, warm_start_steps=WARM)
    dense.weight.requires_grad_(True)
    other = torch.optim.AdamW([dense.weight], lr=LR)
    train_bare(model, optimizer, WARM - 1, relora)
    train_bare(dense, other, WARM - 1)
    assert torch.equal(model.weight, dense.weight)
    assert not torch.equal(model.weight, Bare().weight)
    train_bare(model, optimizer, 1, relora)
    assert (model.weight.requires_grad, model.a.requires_grad, model.b.requires_grad) == (False, True, True)
    assert model.weight.grad is None
    assert not optimizer.state
    frozen = model.weight.detach().clone()
    train_bare(model, optimizer, 2, relora)
    assert torch.equal(model.weight, frozen)
    assert model.b.any()
    train_bare(model, optimizer, 1, relora)
    assert relora.last_restart is not None
    assert relora.last_restart.step == WARM + EVERY
    assert not torch.equal(model.weight, frozen)


def test_a_weight_that_the_optimizer_does_not_hold() -> None:
    model = peft_model("linear")
    optimizer = torch.optim.AdamW(trainable(model))
    message = (
        r"warm_start_steps is 2, and the optimizer does not hold the weight of .*up\. Give it model\.parameters\(\)"
    )
    with pytest.raises(ConfigError, match=message):
        ReLoRA(model, optimizer, restart_every=5, restart_warmup_steps=1, warm_start_steps=2)
    pairs = find_pairs(model)
    WarmStart(pairs, optimizer, 0).at_step(0)
    assert all(parameter.requires_grad for pair in pairs for parameter in pair.parameters())
