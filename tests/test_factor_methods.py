"""Methods lora and relora as the application builds them: what trains, when, in how many bytes, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import METHODS, ConfigError
from fullrank.factors import find_pairs
from fullrank.memory import held_state_bytes
from tests.cases.lora import SIZES, TinyLayers, with_layers
from tests.cases.tiny import TARGETS, train_by_backward
from tests.problems import RANK

NAMES = ["lora", "relora"]
names = pytest.mark.parametrize("name", NAMES)
WARM = 3


def config_of(name: str, **changes: Any) -> Any:
    """Options that fit the tiny model."""
    own = {"restart_every": 4} if name == "relora" else {}
    options = {"rank": RANK, "lora_alpha": 6.0, "target_modules": TARGETS, "restart_warmup_steps": 1} | own | changes
    return METHODS[name].config(**options)


def factors_of(model: nn.Module) -> set[torch.Tensor]:
    return {parameter for pair in find_pairs(model) for parameter in pair.parameters()}


# What trains.


@pytest.mark.parametrize("head", [True, False], ids=["head", ""])
@pytest.mark.parametrize("norms", [True, False], ids=["norms", ""])
@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings", ""])
@names
def test_what_trains_beside_the_factors(name: str, embeddings: bool, norms: bool, head: bool) -> None:
    """Every option by itself; whatever was frozen before; nothing else gets a gradient or a state."""
    config = config_of(name, train_embeddings=embeddings, train_norms=norms, train_head=head)
    model = with_layers(name, config)
    model.requires_grad_(False)
    built = METHODS[name].build(model, config)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {f"{layer}.lora_{side}.default.weight" for layer in SIZES for side in "AB"}
    wanted |= {"table.weight"} if embeddings else set()
    wanted |= {"head.weight"} if head else set()
    biases = {"attn_tall.base_layer.bias", "mlp_square.base_layer.bias"}
    wanted |= {"norm.weight", "norm.bias", *biases} if norms else set()
    assert found == wanted
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_by_backward(model, built, range(3))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == wanted
    assert set(built.optimizer.state) == {model.get_parameter(n) for n in wanted}


@pytest.mark.parametrize(("embeddings", "head"), [(True, False), (False, True), (False, False)])
@names
def test_a_tied_head_trains_if_either_does(name: str, embeddings: bool, head: bool) -> None:
    config = config_of(name, train_embeddings=embeddings, train_head=head)
    model: Any = TinyLayers()
    model.head = nn.Linear(6, 7, bias=False)
    model.head.weight = model.table.weight
    planned = METHODS[name].state_bytes(model, config)
    built = METHODS[name].build(put_on(model, name, config), config)
    assert model.table.weight.requires_grad == (embeddings or head)
    train_by_backward(model, built, range(1))
    assert held_state_bytes(built.optimizer) == planned


def put_on(model: Any, name: str, config: Any) -> Any:
    """The layers that a method asks for on this model."""
    from fullrank.train.adapters import Adapters

    request = METHODS[name].adapters
    assert request is not None
    Adapters(model, request(config))
    return model


@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 weights", "bfloat16 weights"])
def test_factors_and_their_moments_are_of_one_type(dtype: torch.dtype, factor_dtype: str | None) -> None:
    config = config_of("relora", factor_dtype=factor_dtype)
    model = with_layers("relora", config, dtype)
    built = METHODS["relora"].build(model, config)
    wanted = getattr(torch, factor_dtype) if factor_dtype else dtype
    for _ in range(2):
        for pair in find_pairs(model):
            assert (pair.a.dtype, pair.b.dtype, pair.weight.dtype) == (wanted, wanted, dtype)
            moments = [built.optimizer.state[p].get("exp_avg", pair.a) for p in (pair.a, pair.b)]
            assert {moment.dtype for moment in moments} == {wanted}
        train_by_backward(model, built, range(5))
        assert model.get_parameter("head.weight").dtype == dtype


# In how many bytes.


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_scaling": True},
        {"factor_dtype": None},
        {"factor_dtype": "bfloat16", "trainable_scaling": True},
        {"train_embeddings": False, "train_norms": False, "train_head": False},
        {"warm_start_steps": WARM},
        {"warm_start_steps": WARM, "train_embeddings": False, "factor_dtype": None, "trainable_scaling": True},
        {"warm_start_steps": WARM, "target_modules": ["mlp"], "rank": 14},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@names
def test_planned_bytes(name: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """Of a model with its layers and without them, here and on the meta device: the most there are at a time."""
    config, method = config_of(name, **changes), METHODS[name]
    model = with_layers(name, config, dtype)
    planned = method.state_bytes(model, config)
    for other in (with_layers(name, config, dtype, "meta"), TinyLayers(dtype), TinyLayers(dtype, "meta")):
        assert method.state_bytes(other, config) == planned
    built, held = method.build(model, config), []
    for step in range(7):
        train_in_own_shapes(model, built, step)
        held.append(held_state_bytes(built.optimizer))
    assert max(held) == planned
    assert method.state_bytes(model, config) == planned, "it does not depend on what trains now"


def train_in_own_shapes(model: nn.Module, built: Any, step: int) -> None:
    """One step with ones for gradients: a trained scale has no shape to draw a matrix for."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    built.optimizer.step()
    if built.after_step is not None:
        built.after_step(step + 1)


# When.


@names
def test_the_contract_without_a_warm_start(name: str) -> None:
    config = config_of(name)
    built = METHODS[name].build(with_layers(name, config), config)
    assert built.switches == ()
    assert (built.after_step is None) == (name == "lora")
    assert (built.schedule is None) == (name == "lora")


@pytest.mark.parametrize("lr", [None, 2e-3])
@names
def test_the_contract_with_a_warm_start(name: str, lr: float | None) -> None:
    """Which parameters train at a step, whether it is reached by training or by ``at_step``; and the rate there."""
    config = config_of(name, warm_start_steps=WARM, lr=1e-3, warm_start_lr=lr, train_embeddings=False)
    model = with_layers(name, config)
    built = METHODS[name].build(model, config)
    assert built.switches == (WARM,)
    assert built.at_step is not None
    assert built.schedule is not None
    factors = factors_of(model)
    first = {n for n, p in model.named_parameters() if p not in factors}
    later = {n for n in first if n not in ("table.weight", *(f"{layer}.base_layer.weight" for layer in SIZES))}
    later |= {n for n, p in model.named_parameters() if p in factors}
    for step in range(1, 7):
        train_by_backward(model, built, range(step - 1, step))
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trains == (first if step < WARM else later)
        built.at_step(0)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == first
        built.at_step(step)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    rates = [built.schedule(lambda _: 1.0, 0, 20)(step) for step in range(9)]
    ratio = 0.5 if lr is None else 2.0
    assert rates == [ratio] * WARM + [0.0, 1.0, 1.0, 1.0, 0.0 if name == "relora" else 1.0, 1.0]


def test_relora_restarts_through_its_contract() -> None:
    config = config_of("relora", restart_every=2, seed=3)
    model = with_layers("relora", config)
    built = METHODS["relora"].build(model, config)
    pairs, seen = find_pairs(model), []
    for step in range(7):
        before = [pair.weight.detach().clone() for pair in pairs]
        train_by_backward(model, built, range(step, step + 1))
        if any(not torch.equal(pair.weight, weight) for pair, weight in zip(pairs, before, strict=True)):
            seen.append(step + 1)
            assert not any(pair.b.any() for pair in pairs)
    assert seen == [2, 4, 6]


def test_the_seed_is_that_of_every_start() -> None:
    """Of the first factors and of those after a restart."""
    runs = []
    for seed in (0, 0, 1):
        config = config_of("relora", restart_every=2, seed=seed)
        model = with_layers("relora", config)
        first = [pair.a.detach().clone() for pair in find_pairs(model)]
        train_by_backward(model, METHODS["relora"].build(model, config), range(2))
        runs.append((first, [pair.a.detach().clone() for pair in find_pairs(model)]))
    for a, b, other in zip(runs[0], runs[1], runs[2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(a, other, strict=True))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 0.0}, r"lora_alpha must be above 0 and finite, got 0\.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be at least 0 and below 1, got 1\.0"),
        ({"warm_start_lr": 0.0}, r"warm_start_lr must be above 0, got 0\.0\. null is half of lr"),
        ({"warm_start_steps": -1}, r"warm_start_steps must be a whole number of optimizer steps, at least 0, got -1"),
        ({"restart_warmup_steps": -1}, r"restart_warmup_steps must be a whole number"),
        ({"lr": -1.0, "eps": -1.0}, r"lr must be a number, at least 0, got -1\.0\..*eps must be"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1"),
    ],
    ids=str,
)
@names
def test_options_out_of_bounds(name: str, changes: dict[str, Any], message: str) -> None:
    good = config_of(name)
    model = with_layers(name, good)
    with pytest.raises(ConfigError, match=message):
        METHODS[name].build(model, dataclasses.replace(good, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart_every": 0}, r"restart_every must be a whole number of optimizer steps, at least 1, got 0"),
        ({"restart_warmup_steps": 4}, r"restart_warmup_steps must be below restart_every \(4\), got 4"),
        ({"adjust_step": 2, "warm_start_steps": 2}, r"goes without warm_start_steps \(2\), got 2"),
        ({"reset": "half"}, r"reset must be one of zero, magnitude, random, keep, got 'half'"),
        ({"reset_ratio": 0}, r"reset_ratio must be above 0 and at most 1, got 0\."),
        ({"merge_rounding": "up", "lora_alpha": -1.0}, r"lora_alpha must be above 0.*merge_rounding must be one of"),
    ],
    ids=str,
)
def test_options_of_restarts_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    good = config_of("relora")
    with pytest.raises(ConfigError, match=message):
        METHODS["relora"].build(with_layers("relora", good), dataclasses.replace(good, **changes))


@names
def test_a_model_without_its_layers(name: str) -> None:
    with pytest.raises(ConfigError, match="this model has no LoRA layers"):
        METHODS[name].build(TinyLayers(), config_of(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 11}, r"(?s)rank must be between 1 and 10 .*attn_tall.*got 11"),
        (
            {"target_modules": ["attn", "table"]},
            r"pattern .table. matches weights of this model, but none of a linear",
        ),
        ({"target_modules": ["ffn"]}, r"ffn"),
    ],
    ids=str,
)
@names
def test_layers_that_cannot_be_put_on(name: str, changes: dict[str, Any], message: str) -> None:
    """The same words from the plan and from who puts them on; the model stays as it was."""
    config = config_of(name, **changes)
    with pytest.raises(ConfigError, match=message):
        METHODS[name].state_bytes(TinyLayers(device="meta"), config)
    model = TinyLayers()
    with pytest.raises(ConfigError, match=message):
        put_on(model, name, config)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in TinyLayers().named_parameters()]
