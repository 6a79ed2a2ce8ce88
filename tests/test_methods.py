"""What every method promises, checked on every optimizer class of ``tests/cases``.

State and checkpoints, every kind of parameter, gradients that are missing, dead, broken or sparse,
groups, schedulers, scalers, refreshes. That the numbers are the paper's is shown by the parity tests.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import fullrank
from fullrank import METHODS, ApolloAdamW, CheckpointError, ConfigError, UnsupportedError
from fullrank.memory import adamw_state_bytes, held_state_bytes, planned_state_bytes
from fullrank.ops import subspace
from fullrank.optimizer import MethodOptimizer
from fullrank.projected import ProjectedOptimizer
from tests.cases import ALL, CASES, OURS, OptimizerCase
from tests.cases.tiny import (
    TinyModel,
    assert_same,
    assert_same_state,
    gradients_at,
    train,
    weights_of,
)
from tests.problems import RANK, SHAPES, make_gradients, make_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every = pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
ours = pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
plainest = {case.kind: case for case in reversed(OURS)}
each_class = pytest.mark.parametrize("case", list(plainest.values())[::-1], ids=lambda case: case.id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def saved_and_read(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as a file gives it back, read without trusting the file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def copied(model: TinyModel) -> TinyModel:
    """Another model with the same weights in the same layouts."""
    return copy.deepcopy(model)


def parameter(shape: str = "tall", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A bare weight of a named shape."""
    return nn.Parameter(make_weight(SHAPES[shape], seed=seed, dtype=dtype))


def feed(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """Step through gradients of one weight; the weight after each step."""
    seen = []
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype, copy=True)
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


# The cases are complete.


def test_every_method_has_a_case() -> None:
    """A method without a case in tests/cases would go untested."""
    assert CASES.keys() == METHODS.keys()
    for name, case in CASES.items():
        assert isinstance(case.config(), METHODS[name].config)


def test_every_exported_optimizer_has_a_case() -> None:
    """So would an optimizer class."""
    public = [getattr(fullrank, name) for name in fullrank.__all__]
    classes = {kind for kind in public if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert classes == {case.kind for case in OURS}


# Checkpoints: a resumed run is the uninterrupted one.


@dtypes
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", None])
@ours
def test_resume_is_bit_exact(case: OptimizerCase, state_dtype: str | None, dtype: torch.dtype) -> None:
    """Saved in the middle of a refresh period, read with weights_only, continued over two refreshes."""
    model = TinyModel(dtype)
    optimizer = case.on(model, state_dtype=state_dtype, weight_decay=0.1)
    train(model, optimizer, range(4))
    other = copied(model)
    resumed = case.on(other, state_dtype=state_dtype)
    resumed.load_state_dict(saved_and_read(optimizer))
    assert_same_state(resumed, optimizer)
    train(model, optimizer, range(4, 10))
    train(other, resumed, range(4, 10))
    assert_same(other, model)
    assert_same_state(resumed, optimizer)


@dtypes
@pytest.mark.parametrize("name", METHODS)
def test_a_built_method_resumes_bit_exact(name: str, dtype: torch.dtype) -> None:
    """The same through ``Method.build``, as the application makes an optimizer."""
    config, build = CASES[name].config(), METHODS[name].build
    model = TinyModel(dtype)
    optimizer = build(model, config).optimizer
    train(model, optimizer, range(4))
    other = copied(model)
    resumed = build(other, config).optimizer
    resumed.load_state_dict(saved_and_read(optimizer))
    assert_same_state(resumed, optimizer)
    train(model, optimizer, range(4, 8))
    train(other, resumed, range(4, 8))
    assert_same(other, model)


@every
def test_deepcopy_continues_identically(case: OptimizerCase) -> None:
    """Model and optimizer copied together go on by themselves, as the originals do."""
    model = TinyModel()
    optimizer = case.on(model)
    train(model, optimizer, range(4))
    other, twin = copy.deepcopy((model, optimizer))
    train(other, twin, range(4, 8))
    assert not torch.equal(other.attn_tall, model.attn_tall)
    train(model, optimizer, range(4, 8))
    assert_same(other, model)
    assert_same_state(twin, optimizer)


@ours
def test_loading_does_not_alias_the_saved_state(case: OptimizerCase) -> None:
    """Training on after a load leaves the loaded dict as it was, and the two optimizers share nothing."""
    model = TinyModel()
    optimizer = case.on(model)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other = copied(model)
    resumed = case.on(other)
    resumed.load_state_dict(saved)
    train(other, resumed, range(4, 8))
    for index, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][index][key]) for key, value in state.items())


def refused_load(loader: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Require a CheckpointError that leaves state and groups alone."""
    before = copy.deepcopy(loader.state_dict())
    with pytest.raises(CheckpointError):
        loader.load_state_dict(saved)
    after = loader.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize("steps", [1, 0], ids=["trained", "fresh"])
@pytest.mark.parametrize(
    ("saver", "loader"), list(itertools.permutations(plainest.values(), 2)), ids=lambda case: case.kind.__name__
)
def test_state_of_another_class_is_refused(saver: OptimizerCase, loader: OptimizerCase, steps: int) -> None:
    """Moments of one method mean nothing to another, even where their shapes agree."""
    model = TinyModel()
    optimizer = saver.on(model)
    train(model, optimizer, range(1))
    other = copied(model)
    loading = loader.on(other)
    train(other, loading, range(steps))
    refused_load(loading, saved_and_read(optimizer))


@pytest.mark.parametrize("change", [{"rank": 2}, {"proj_type": "reverse_std"}, {"state_dtype": "bfloat16"}])
@ours
def test_state_of_another_setting_is_refused(case: OptimizerCase, change: dict[str, Any]) -> None:
    """Rank, projected side and dtype of the state must be those it was saved with."""
    model = TinyModel()
    optimizer = case.on(model)
    train(model, optimizer, range(2))
    other = copied(model)
    loading = case.on(other, **change)
    train(other, loading, range(2))
    refused_load(loading, saved_and_read(optimizer))


@each_class
def test_a_state_without_a_step_cannot_switch_projection_off(case: OptimizerCase) -> None:
    """AdamW's state before its first step holds no tensor; loading it must not make ours run as AdamW."""
    weight = parameter()
    loading = case.of([weight])
    refused_load(loading, torch.optim.AdamW([weight]).state_dict())
    assert loading.param_groups[0]["rank"] == RANK


# State: known before training, complete after one step.


@dtypes
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", None])
@ours
def test_state_is_the_spec_after_one_step(case: OptimizerCase, state_dtype: str | None, dtype: torch.dtype) -> None:
    """Every key, shape and dtype of ``state_spec`` is there after the first step and stays; nothing else."""
    model = TinyModel(dtype)
    optimizer = case.on(model, state_dtype=state_dtype)
    assert isinstance(optimizer, MethodOptimizer)
    for steps in (range(1), range(1, 8)):
        train(model, optimizer, steps)
        for _, weight, group in optimizer.named_trainable():
            held = {key: (tuple(value.shape), value.dtype) for key, value in optimizer.state[weight].items()}
            assert held == optimizer.state_spec(weight, group)
    assert optimizer.planned_state_bytes() == held_state_bytes(optimizer)


@dtypes
@pytest.mark.parametrize("name", METHODS)
def test_planned_bytes_are_the_held_ones(name: str, dtype: torch.dtype) -> None:
    """The prediction, on the meta device too, is what a trained optimizer holds."""
    config = CASES[name].config()
    on_meta = TinyModel(dtype, device="meta")
    METHODS[name].build(on_meta, config)
    planned = planned_state_bytes(on_meta, name, config)
    model = TinyModel(dtype)
    for frozen in ("norm", "attn_wide"):
        model.get_parameter(frozen).requires_grad_(False)
        on_meta.get_parameter(frozen).requires_grad_(False)
    assert planned > planned_state_bytes(on_meta, name, config), "frozen parameters have no state"
    optimizer = METHODS[name].build(model, config).optimizer
    for step in range(4):
        for key, gradient in gradients_at(model, step).items():
            if model.get_parameter(key).requires_grad:
                model.get_parameter(key).grad = gradient
        optimizer.step()
    assert held_state_bytes(optimizer) == METHODS[name].state_bytes(model, config)
    assert held_state_bytes(optimizer) == planned_state_bytes(on_meta, name, config)


def test_the_yardstick_is_full_rank_adamw() -> None:
    """``adamw_state_bytes`` is what torch.optim.AdamW holds."""
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, range(1))
    assert adamw_state_bytes(model) == held_state_bytes(optimizer)


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


def moves(weights: list[Tensor], start: Tensor) -> list[Tensor]:
    """What each step changed."""
    return [after - before for before, after in itertools.pairwise([start, *weights])]


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
    """float16 weights with float32 moments: finite, and near the float32 run."""
    half, single = TinyModel(torch.float16), TinyModel()
    start = weights_of(single)
    train(half, case.on(half), range(3))
    train(single, case.on(single), range(3))
    for name, weight in single.named_parameters():
        found = half.get_parameter(name).detach().float()
        moved = (weight.detach() - start[name]).norm()
        assert (found - weight.detach()).norm() < 0.1 * moved, name


@ours
def test_half_precision_state(case: OptimizerCase) -> None:
    """float16 moments too, with an epsilon that float16 can hold; a step that overflowed is left out by hand."""
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
    for weight in model.parameters():
        assert weight.isfinite().all()
        assert weight.dtype == torch.float16
        assert {optimizer.state[weight][key].dtype for key in moments} == {torch.float16}


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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@each_class
def test_sharded_parameters_are_refused(case: OptimizerCase) -> None:
    """A DTensor raises, with its shape and what to use instead, and does not move."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(make_weight((8, 6)), mesh, [Shard(0)]))
    before = weight.detach().full_tensor().clone()
    optimizer = case.of([weight])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(UnsupportedError, match=r"\(8, 6\).*DistributedDataParallel"):
        optimizer.step()
    assert torch.equal(weight.detach().full_tensor(), before)


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
    assert not torch.equal(runs[0][3], runs[1][3])
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
