"""Moments in every type: what they cost, how close they train, how they resume, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import (
    METHODS,
    AdamW,
    ApolloAdamW,
    CheckpointError,
    ConfigError,
    FiraAdamW,
    FiraRMSprop,
    GaLoreAdamW,
    moments,
)
from fullrank.memory import held_state_bytes
from fullrank.moments import read
from fullrank.optimizer import MethodOptimizer
from fullrank.scaling import scaling_factors
from tests.cases import CASES
from tests.cases.harness import saved_and_read
from tests.cases.tiny import assert_same_state, train_by_backward
from tests.problems import relative_error

KINDS: list[type[MethodOptimizer]] = [FiraAdamW, FiraRMSprop, GaLoreAdamW, ApolloAdamW]
kinds = pytest.mark.parametrize("kind", [*KINDS, AdamW], ids=lambda kind: kind.__name__)
state_dtypes = pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16", "8bit"])
weights = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
ROWS, COLUMNS, RANK = 96, 160, 24


class Regression(nn.Module):
    """An embedding, a projected matrix, a bias and a head; the loss against a fixed one of the same form."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype))

        self.embed = weight(64, COLUMNS)
        self.attn = weight(ROWS, COLUMNS)
        self.attn_bias = nn.Parameter(torch.zeros(ROWS, dtype=dtype))
        self.head = weight(48, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.linear(self.embed[tokens], self.attn, self.attn_bias).tanh()
        return hidden @ self.head.t()


TARGET = Regression(seed=1)


@kinds
@state_dtypes
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:no parameter group has a rank", "ignore:weight_rounding", "ignore:.*float16")
def test_scalars_train(kind: type[MethodOptimizer], state_dtype: str | None, rounding: str, dtype: torch.dtype) -> None:
    """A gate or a temperature of shape () is stepped as a vector of one number is."""
    found = []
    for shape in ((), (1,)):
        gate = nn.Parameter(torch.full(shape, 2.0, dtype=dtype))
        optimizer = kind([gate], lr=0.01, state_dtype=state_dtype, weight_rounding=rounding)
        for _ in range(5):
            gate.grad = gate.detach().clone()
            optimizer.step()
        found.append(gate.item())
    assert found[0] == found[1] < 2.0


def make(kind: type[MethodOptimizer], model: Regression, **options: Any) -> MethodOptimizer:
    """The optimizer, with the matrix projected where it projects."""
    plain = [model.embed, model.attn_bias, model.head]
    projects = {"rank": RANK, "update_proj_gap": 7} if kind is not AdamW else {}
    groups = [{"params": plain}, {"params": [model.attn], **projects}]
    return kind(groups, **{"lr": 3e-3, "weight_decay": 0.0} | options)


def loss_of(model: Regression, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (48,), generator=generator)
    with torch.no_grad():
        wanted = TARGET(tokens)
    return nn.functional.mse_loss(model(tokens).float(), wanted)


def go(model: Regression, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# What they cost.


@weights
@state_dtypes
@kinds
def test_planned_bytes_are_the_held_ones(kind: type[MethodOptimizer], state_dtype: str, dtype: torch.dtype) -> None:
    model = Regression(dtype)
    optimizer = make(kind, model, state_dtype=state_dtype)
    planned = optimizer.planned_state_bytes()
    go(model, optimizer, range(1))
    assert held_state_bytes(optimizer) == planned
    with torch.device("meta"):
        empty = Regression(dtype)
    assert make(kind, empty.to("meta"), state_dtype=state_dtype).planned_state_bytes() == planned


def test_eight_bits_are_a_byte_and_a_scale_for_each_block() -> None:
    """Vectors, and parameters of less than 4096 numbers, stay in float32."""
    model = Regression(torch.bfloat16)
    found = make(FiraAdamW, model, state_dtype="8bit").planned_state_bytes()
    embed = 2 * 64 * (COLUMNS + 4 * 3) + 4  # rows of 160 numbers: three blocks of 64
    head = 2 * 48 * (ROWS + 4) + 4
    bias = 2 * 4 * ROWS + 4
    matrix = 2 * COLUMNS * (RANK + 4) + 4 * ROWS * RANK + 4 + 4  # moments, basis, limiter, step
    assert found == embed + head + bias + matrix
    model.head = nn.Parameter(model.head.detach()[:40])  # 3840 numbers
    assert make(FiraAdamW, model, state_dtype="8bit").planned_state_bytes() == found - head + 2 * 4 * 40 * ROWS + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rank", "size"),
    [(1, 4), (2, 3), (4, 2), (8, 1.5), (16, 1.25), (64, 1.0625), (130, 1 + 12 / 130), (256, 1 + 4 / 256)],
)
def test_bytes_of_a_low_rank_number(rank: int, size: float, dtype: torch.dtype) -> None:
    """A code, and a scale for each row and block; rank 1 stays in float32, which is smaller."""
    weight = nn.Parameter(torch.ones(300, 256, dtype=dtype))
    for kind in (GaLoreAdamW, ApolloAdamW):
        optimizer = kind([{"params": [weight], "rank": rank}], basis="random", state_dtype="8bit")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        expected = round(2 * 300 * rank * size)
        rest = 4 + 4 * 256 * rank + 4 * (kind is ApolloAdamW)  # step, basis, limiter
        assert held_state_bytes(optimizer) == optimizer.planned_state_bytes() == expected + rest
        assert optimizer.state[weight]["exp_avg"].dtype == (torch.float32 if rank == 1 else torch.uint8)


def test_at_rank_1_eight_bits_are_of_what_is_not_projected() -> None:
    """Bytes as planned, a resume bit for bit; codes that were saved there are refused."""
    method = METHODS["apollo"]
    config = method.config(rank=1, scaling="tensor", state_dtype="8bit", target_modules=["attn"])
    models = [Regression(torch.bfloat16) for _ in range(2)]
    built, resumed = (method.build(model, config).optimizer for model in models)
    assert isinstance(built, ApolloAdamW)
    go(models[0], built, range(2))
    assert held_state_bytes(built) == method.state_bytes(models[0], config)
    state = built.state
    assert state[models[0].embed]["exp_avg"].dtype == torch.uint8
    assert state[models[0].attn]["exp_avg"].dtype == torch.float32
    models[1].load_state_dict(models[0].state_dict())
    saved = saved_and_read(built)
    resumed.load_state_dict(saved)
    assert go(models[0], built, range(2, 6)) == go(models[1], resumed, range(2, 6))
    matrix = next(entry for entry in saved["state"].values() if "basis" in entry)
    for key in ("exp_avg", "exp_avg_sq"):
        matrix |= moments.coded(key, matrix[key], flat=False)
    with pytest.raises(CheckpointError, match=r"exp_avg \[160, 1\] uint8, .* expected .* exp_avg \[160, 1\] float32"):
        resumed.load_state_dict(saved)


@pytest.mark.parametrize("plain", [None, "float32", "bfloat16", "8bit"])
def test_plain_moments_have_a_type_of_their_own(plain: str | None) -> None:
    model = Regression(torch.bfloat16)
    optimizer = make(GaLoreAdamW, model, state_dtype="float32", plain_state_dtype=plain)
    go(model, optimizer, range(1))
    wanted = {"float32": torch.float32, "8bit": torch.uint8}.get(plain or "", torch.bfloat16)
    assert {optimizer.state[p]["exp_avg"].dtype for p in (model.embed, model.head)} == {wanted}
    assert optimizer.state[model.attn]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@state_dtypes
@pytest.mark.parametrize("name", METHODS)
def test_a_method_knows_its_bytes(name: str, state_dtype: str | None, dtype: torch.dtype) -> None:
    case, method = CASES[name], METHODS[name]
    config = dataclasses.replace(case.config(), state_dtype=state_dtype)
    model = case.model(dtype)
    planned = method.state_bytes(case.model(dtype, device="meta"), config)
    assert planned == method.state_bytes(model, config)
    built = method.build(model, config)
    train_by_backward(model, built, range(3))
    assert held_state_bytes(built.optimizer) == planned


# How they train.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
def test_eight_bits_train_as_float32(kind: type[MethodOptimizer], dtype: torch.dtype) -> None:
    """The same loss within 6% and weights near the same place; rounding of bfloat16 weights parts them more."""
    start, exact, rough = (Regression(dtype) for _ in range(3))
    wanted = go(exact, make(kind, exact, state_dtype="float32", plain_state_dtype="float32") if kind is not AdamW
                else make(kind, exact, state_dtype="float32"), range(60))  # fmt: skip
    found = go(rough, make(kind, rough, state_dtype="8bit"), range(60))
    assert wanted[-1] < 0.5 * wanted[0]
    assert sum(found[-10:]) == pytest.approx(sum(wanted[-10:]), rel=0.06 if dtype == torch.float32 else 0.4)
    for name, parameter in rough.named_parameters():
        off = relative_error(parameter, exact.get_parameter(name), start.get_parameter(name))
        assert off < 0.5, (name, off)


def test_float64_weights_may_have_eight_bits() -> None:
    exact, rough = Regression(torch.float64), Regression(torch.float64)
    wanted = go(exact, make(AdamW, exact), range(40))
    found = go(rough, make(AdamW, rough, state_dtype="8bit"), range(40))
    assert found[-1] == pytest.approx(wanted[-1], rel=0.05)


@kinds
def test_a_gradient_that_is_not_finite_reaches_the_weights(kind: type[MethodOptimizer]) -> None:
    """As it does with numbers; here with all of its block."""
    model = Regression()
    optimizer = make(kind, model, state_dtype="8bit")
    loss_of(model, 0).backward()
    assert model.embed.grad is not None
    model.embed.grad[5, 7] = torch.nan
    optimizer.step()
    assert model.embed[5].isnan().any()
    assert model.embed[6:].isfinite().all()
    go(model, optimizer, range(1, 2))
    key = optimizer_keys(optimizer)[0]
    state = optimizer.state[model.embed]
    assert read(state, key)[5].isnan().any()


def optimizer_keys(optimizer: MethodOptimizer) -> list[str]:
    return [key for key in ("exp_avg", "exp_avg_sq", "square_avg") if key in next(iter(optimizer.state.values()))]


def test_a_zero_gradient_leaves_a_weight_where_it_is() -> None:
    model = Regression()
    optimizer = make(AdamW, model, state_dtype="8bit")
    before = model.embed.detach().clone()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(model.embed, before)
    assert not read(optimizer.state[model.embed], "exp_avg_sq").any()


def test_scaling_factors_are_read_off_codes() -> None:
    """Within the codes' error of those of float32 moments after the same gradients."""
    found = {}
    for state_dtype in ("float32", "8bit"):
        model = Regression()
        optimizer = make(FiraAdamW, model, state_dtype=state_dtype)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        (factors,) = scaling_factors(optimizer).values()
        found[state_dtype] = factors.values
    assert relative_error(found["8bit"], found["float32"]) < 0.03


# How they resume.


@weights
@kinds
def test_resume_is_bit_exact(kind: type[MethodOptimizer], dtype: torch.dtype) -> None:
    """Codes of plain and of low-rank moments, rounding at random, through a file that is not trusted."""
    options = {"state_dtype": "8bit", "weight_rounding": "stochastic" if dtype == torch.bfloat16 else "nearest"}
    model = Regression(dtype)
    optimizer = make(kind, model, **options)
    go(model, optimizer, range(9))
    other = copy.deepcopy(model)
    resumed = make(kind, other, **options)
    resumed.load_state_dict(saved_and_read(optimizer))
    assert_same_state(resumed, optimizer)
    assert go(other, resumed, range(9, 20)) == go(model, optimizer, range(9, 20))
    assert_same_state(resumed, optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("saved", "loaded"), [("8bit", "float32"), ("float32", "8bit"), ("8bit", None)])
@kinds
def test_moments_of_another_type_are_refused(kind: type[MethodOptimizer], saved: str, loaded: str | None) -> None:
    model = Regression()
    optimizer = make(kind, model, state_dtype=saved)
    go(model, optimizer, range(1))
    with pytest.raises(CheckpointError, match="state_dtype"):
        make(kind, Regression(), state_dtype=loaded).load_state_dict(saved_and_read(optimizer))


@pytest.mark.parametrize("plain", ["float32", "8bit"])
def test_plain_moments_of_another_type_are_refused(plain: str) -> None:
    model = Regression(torch.bfloat16)
    optimizer = make(FiraAdamW, model)
    go(model, optimizer, range(1))
    other = make(FiraAdamW, Regression(torch.bfloat16), plain_state_dtype=plain)
    with pytest.raises(CheckpointError, match="exp_avg"):
        other.load_state_dict(saved_and_read(optimizer))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_state_from_before_the_options_is_loaded(kind: type[MethodOptimizer]) -> None:
    model = Regression()
    optimizer = make(kind, model)
    go(model, optimizer, range(3))
    saved = saved_and_read(optimizer)
    for group in saved["param_groups"]:
        del group["plain_state_dtype"], group["weight_rounding"]
    other = copy.deepcopy(model)
    resumed = make(kind, other)
    resumed.load_state_dict(saved)
    assert go(other, resumed, range(3, 6)) == go(model, optimizer, range(3, 6))


# What is refused.


@kinds
def test_without_the_library_the_extra_is_named(kind: type[MethodOptimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the optimizer is made; on the meta device, where nothing will ever be coded, bytes are still known."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*fullrank\[quant\]"):
        make(kind, Regression(), state_dtype="8bit")
    assert make(kind, Regression().to("meta"), state_dtype="8bit").planned_state_bytes()
    make(kind, Regression(), state_dtype="float32")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_before_it_changes_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = case.model()
    before = [key for key, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match="quant"):
        METHODS[name].build(model, dataclasses.replace(case.config(), state_dtype="8bit"))
    assert [key for key, _ in model.named_parameters()] == before


@kinds
def test_bad_options_are_listed_together(kind: type[MethodOptimizer]) -> None:
    with pytest.raises(ConfigError) as error:
        make(kind, Regression(), state_dtype="int8", weight_rounding="up")
    for words in (
        "state_dtype must be one of float32, bfloat16, float64, 8bit or None, got 'int8'.",
        "weight_rounding must be one of nearest, stochastic, got 'up'.",
    ):
        assert words in str(error.value)


def test_blocks_are_rows_or_flat() -> None:
    with pytest.raises(ConfigError, match="blocks must be one of rows, flat, got 'columns'"):
        AdamW([nn.Parameter(torch.ones(2))], blocks="columns")


@kinds
def test_rounding_without_effect_warns(kind: type[MethodOptimizer]) -> None:
    with pytest.warns(UserWarning, match="weight_rounding stochastic has no effect") as seen:
        make(kind, Regression(), weight_rounding="stochastic")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(kind, Regression(torch.bfloat16), weight_rounding="stochastic")
        make(kind, Regression())


@pytest.mark.parametrize("kind", [AdamW, FiraAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_be_stepped_a_few_at_a_time(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the whole, to rounding: no block of codes straddles rows."""

    def stepped(piece: int) -> tuple[Tensor, dict[str, Tensor]]:
        monkeypatch.setattr(moments, "PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(70, 130, generator=generator).to(dtype))
        groups: list[dict[str, Any]] = [{"params": [weight]}]
        groups += [{"params": [nn.Parameter(torch.ones(8, 8))], "rank": 2}] if kind is FiraAdamW else []
        optimizer = kind(groups, lr=1e-2, weight_decay=0.1, state_dtype="8bit")
        for _ in range(3):
            weight.grad = torch.randn(70, 130, generator=generator).to(dtype)
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    (whole, state), (parts, other) = stepped(1 << 22), stepped(1000)
    assert state["exp_avg"].dtype == torch.uint8
    assert (whole != parts).float().mean() < 0.01
    assert (whole - parts).abs().max() < (1e-6 if dtype == torch.float32 else 0.02)
    for key in ("exp_avg", "exp_avg_sq"):
        assert relative_error(read(state, key), read(other, key)) < 1e-3
