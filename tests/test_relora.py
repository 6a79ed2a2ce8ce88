"""What a restart does: the function stays, the factors start again, their moments are reset, nothing else moves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import LowRankPair, ReLoRA
from fullrank.factors import find_pairs
from tests.restarting import (
    ALPHA,
    KINDS,
    RANK,
    Bare,
    output,
    peft_model,
    plain_model,
    through_a_file,
    train,
    train_bare,
    trainable,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", KINDS)


def trained(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, torch.optim.Optimizer, ReLoRA]:
    """A PEFT model two steps into its first cycle of three; its norms and biases train beside the factors."""
    model = peft_model(kind, dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    relora = ReLoRA(model, optimizer, restart_every=3, restart_warmup_steps=1, **options)
    train(model, optimizer, range(2), relora)
    assert relora.last_restart is None
    return model, optimizer, relora


def merged_by_peft(model: Any) -> dict[str, Tensor]:
    """The weights under the factors as PEFT's own merge makes them, in float64."""
    twin = copy.deepcopy(model).double()
    twin.merge_adapter()
    return {pair_name(name): p.detach() for name, p in twin.named_parameters() if name.endswith("base_layer.weight")}


def pair_name(parameter: str) -> str:
    return parameter.removesuffix(".base_layer.weight")


def step_of(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One optimizer step without its restart."""
    train(model, optimizer, range(number, number + 1))


def held(pair: LowRankPair) -> list[Tensor]:
    return [pair.weight, *pair.parameters()]


# The function.


@dtypes
@kinds
def test_a_restart_leaves_the_function_alone(kind: str, dtype: torch.dtype) -> None:
    """To rounding; and the weights are those of PEFT's own merge."""
    model, optimizer, relora = trained(kind, dtype)
    step_of(model, optimizer, 2)
    before, wanted = output(model), merged_by_peft(model)
    assert relora.step() is relora.last_restart is not None
    after, largest = output(model), before.abs().max().item()
    torch.testing.assert_close(after, before, rtol=0, atol=10 * TOLERANCE[dtype] * largest)
    assert {pair.name for pair in relora.pairs} == wanted.keys()
    for pair in relora.pairs:
        torch.testing.assert_close(pair.weight.double(), wanted[pair.name], rtol=0, atol=TOLERANCE[dtype])
    plain = output(plain_model(kind, dtype))
    assert (before - plain).abs().max() > 0.02 * largest, "the factors had learnt something"


@kinds
def test_a_restart_in_bfloat16_rounds_to_a_neighbour(kind: str) -> None:
    """Every entry is next to the exact sum, so the function moves by about as much as the type can show."""
    model, optimizer, relora = trained(kind, torch.bfloat16)
    step_of(model, optimizer, 2)
    before, wanted = output(model).float(), merged_by_peft(model)
    relora.step()
    for pair in relora.pairs:
        assert pair.weight.dtype == torch.bfloat16
        assert pair.a.dtype == pair.b.dtype == torch.float32
        exact = wanted[pair.name]
        gap = torch.finfo(torch.bfloat16).eps * 2.0 ** exact.abs().log2().floor()
        assert ((pair.weight.double() - exact).abs() <= gap * (1 + 1e-3)).all()
    assert (output(model).float() - before).norm() < 0.02 * before.norm()


@dtypes
def test_a_bare_pair(dtype: torch.dtype) -> None:
    """Layers of one's own, with torch alone."""
    model = Bare(dtype=dtype)
    optimizer = torch.optim.AdamW([model.a, model.b], lr=1e-2)
    relora = ReLoRA([model.pair()], optimizer, restart_every=4, restart_warmup_steps=1)
    train_bare(model, optimizer, 3, relora)
    train_bare(model, optimizer, 1)
    before = model.effective().detach().clone()
    assert (before - model.weight).norm() > 0.01
    relora.step()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(model.effective(), model.weight)


def test_a_float64_weight_under_float32_factors_keeps_its_bits() -> None:
    """``factor_dtype`` is float32 by default: an update of zero must not round a float64 weight."""
    pair = LowRankPair(weight=torch.randn(6, 5, dtype=torch.float64), a=torch.randn(2, 5), b=torch.zeros(6, 2))
    before = pair.weight.clone()
    found = pair.merge_()
    assert torch.equal(pair.weight, before)
    assert found.error == 0.0


def test_a_square_weight_stored_transposed() -> None:
    """Whose shape does not say which way round it is."""
    weight = torch.randn(5, 5, dtype=torch.float64)
    pair = LowRankPair(weight=weight.clone(), a=weight.clone(), b=torch.eye(5, dtype=torch.float64), transposed=True)
    pair.merge_()
    torch.testing.assert_close(pair.weight, weight + weight.t(), rtol=0, atol=1e-15)


def test_dropout_plays_no_part_in_a_merge() -> None:
    model = peft_model("linear", torch.float64, lora_dropout=0.5)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    relora = ReLoRA(model, optimizer, restart_every=3, restart_warmup_steps=1)
    train(model, optimizer, range(3))
    before = output(model.eval())
    relora.after_step(3)
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-12)


# The factors, their moments, and everything else.


@dtypes
@kinds
def test_factors_start_again(kind: str, dtype: torch.dtype) -> None:
    """The same Parameters: A new and within its bound, B zero (an embedding's the other way round)."""
    model, optimizer, relora = trained(kind, dtype)
    step_of(model, optimizer, 2)
    parameters = dict(model.named_parameters())
    places = {name: (p.data_ptr(), p.stride(), p.requires_grad) for name, p in parameters.items()}
    old = {pair.name: pair.a.detach().clone() for pair in relora.pairs}
    relora.step()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert (parameter.data_ptr(), parameter.stride(), parameter.requires_grad) == places[name]
    for pair in relora.pairs:
        assert not torch.equal(pair.a, old[pair.name])
        if pair.name.endswith("table"):
            assert not pair.a.any()
            assert 0.5 < pair.b.std() < 1.6
            continue
        assert not pair.b.any()
        bound = 1 / math.sqrt(pair.a[0].numel())
        assert 0.8 * bound < pair.a.abs().max() <= bound
    starts = [pair.a for pair in relora.pairs if not pair.name.endswith("table")]
    for i, a in enumerate(starts):
        assert not any(a.shape == other.shape and torch.equal(a, other) for other in starts[:i]), "of its own each"


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random", "keep"])
@kinds
def test_nothing_else_is_touched(kind: str, reset: str) -> None:
    """Norms, biases, embeddings, and all state but that of the factors: bit for bit."""
    model, optimizer, relora = trained(kind, reset=reset, reset_ratio=0.8)
    step_of(model, optimizer, 2)
    ours = {parameter for pair in relora.pairs for parameter in held(pair)}
    factors = {parameter for pair in relora.pairs for parameter in pair.parameters()}
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if p not in ours}
    gradients = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    states = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    random = torch.get_rng_state()
    restart = relora.step()
    assert restart is not None
    assert torch.equal(torch.get_rng_state(), random), "the global random state"
    assert rest
    for name, value in rest.items():
        assert torch.equal(model.get_parameter(name), value), name
    for parameter, gradient in gradients.items():
        assert torch.equal(parameter.grad, gradient)
    assert optimizer.state.keys() == states.keys()
    for parameter, state in states.items():
        now = optimizer.state[parameter]
        same = all(torch.equal(now[key], value) for key, value in state.items())
        assert same == (parameter not in factors or reset == "keep")
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    total = sum(2 * parameter.numel() for parameter in factors)
    dropped = {
        "zero": total,
        "keep": sum(int((states[p][key] == 0).sum()) for p in factors for key in ("exp_avg", "exp_avg_sq")),
    }.get(reset, sum(2 * round(0.8 * parameter.numel()) for parameter in factors))
    assert (restart.reset.num_zero, restart.reset.num_total) == (dropped, total)
    steps = {float(optimizer.state[parameter]["step"]) for parameter in factors}
    assert steps == {0.0 if reset == "zero" else 3.0}


def test_a_restart_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, relora = trained("linear", torch.float64)
    step_of(model, optimizer, 2)
    before = merged_by_peft(model)
    updates = [before[pair.name] - pair.weight.double() for pair in relora.pairs]
    size = torch.stack([update.norm() for update in updates]).norm().item()
    with caplog.at_level("INFO"):
        restart = relora.step()
    assert restart is not None
    assert (restart.step, restart.num_merged) == (3, 2)
    assert restart.merge.update == pytest.approx(size, rel=1e-9)
    assert restart.merge.error == restart.merge.relative_error == 0.0
    assert restart.reset.percent == 100.0
    assert str(restart) in caplog.text
    assert str(restart) == (
        f"restart after step 3: 2 weights merged (update {size:.4g}, rounding error 0.0%), "
        "100.0% of the factors' moments zero"
    )


def test_the_error_of_a_merge_is_what_rounding_lost() -> None:
    model, optimizer, relora = trained("linear", torch.bfloat16)
    step_of(model, optimizer, 2)
    wanted = merged_by_peft(model)
    restart = relora.step()
    assert restart is not None
    errors = [(pair.weight.double() - wanted[pair.name]).norm() for pair in relora.pairs]
    assert restart.merge.error == pytest.approx(torch.stack(errors).norm().item(), rel=1e-3)
    assert 0 < restart.merge.relative_error < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@kinds
def test_a_stored_weight_is_taken_back(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, into the same Parameter; the factors stay as they are."""
    model, optimizer, relora = trained(kind, dtype)
    step_of(model, optimizer, 2)
    relora.step()
    stored = through_a_file([pair.stored() for pair in relora.pairs])
    other = find_pairs(peft_model(kind, dtype, seed=4))
    factors = [parameter.detach().clone() for pair in other for parameter in pair.parameters()]
    for pair, mine, tensors in zip(other, relora.pairs, stored, strict=True):
        weight = pair.weight
        assert not torch.equal(weight, mine.weight)
        pair.restore_(tensors)
        assert pair.weight is weight
        assert torch.equal(weight, mine.weight)
    after = [parameter for pair in other for parameter in pair.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(factors, after, strict=True))


# When.


def test_restarts_come_every_cycle_and_only_then() -> None:
    model = Bare()
    optimizer = torch.optim.AdamW([model.a, model.b], lr=1e-2)
    relora = ReLoRA([model.pair()], optimizer, restart_every=5, restart_warmup_steps=2)
    found = []
    for _ in range(22):
        train_bare(model, optimizer, 1)
        restart = relora.step()
        assert (relora.last_restart is restart) or restart is None
        found.append(restart.step if restart else 0)
    assert [step for step in found if step] == [5, 10, 15, 20]
    assert [number + 1 for number, step in enumerate(found) if step] == [5, 10, 15, 20]
    assert relora.num_steps == 22


def test_a_loop_that_counts_says_so() -> None:
    """``after_step`` with the number of steps is ``step``, also where a step was skipped."""
    model = Bare()
    optimizer = torch.optim.AdamW([model.a, model.b], lr=1e-2)
    relora = ReLoRA([model.pair()], optimizer, restart_every=5, restart_warmup_steps=2)
    train_bare(model, optimizer, 1)
    assert [step for step in range(1, 12) if relora.after_step(step)] == [5, 10]
    assert relora.num_steps == 11


# Which.


def test_the_named_adapter_restarts_and_the_other_stays() -> None:
    from peft import LoraConfig

    model = peft_model("linear", torch.float64)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up", "down"]))
    pairs = find_pairs(model, adapter="second")
    assert [pair.a.shape[0] for pair in pairs] == [3, 3]
    model.set_adapter("second")
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    relora = ReLoRA(model, optimizer, restart_every=2, restart_warmup_steps=1, adapter="second")
    first = [pair.a.detach().clone() for pair in find_pairs(model, adapter="default")]
    train(model, optimizer, range(2))
    before = output(model)
    relora.after_step(2)
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-12)
    after = [pair.a for pair in find_pairs(model, adapter="default")]
    assert all(torch.equal(a, b) for a, b in zip(first, after, strict=True))
    assert not any(pair.b.any() for pair in pairs)


@kinds
def test_found_pairs_are_the_factors_of_every_target(kind: str) -> None:
    """Scale alpha / r, W + scale B A of the weight's own shape; models without PEFT's wrapper too."""
    model = peft_model(kind)
    pairs = find_pairs(model)
    assert len(pairs) == {"linear": 2, "conv": 2, "embedding": 2, "gpt2": 6}[kind]
    assert {p for pair in pairs for p in pair.parameters()} == set(trainable(model))
    for pair in pairs:
        assert pair.scale == ALPHA / RANK
        assert pair.update().shape == pair.shape
        assert isinstance(model.get_submodule(pair.name).get_base_layer().weight, nn.Parameter)
    inner = find_pairs(model.get_base_model())
    assert [pair.a for pair in inner] == [pair.a for pair in pairs]


@pytest.mark.usefixtures("one_process")
def test_pairs_are_found_under_ddp() -> None:
    model = peft_model("linear")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert [pair.a for pair in find_pairs(wrapped)] == [pair.a for pair in find_pairs(model)]
