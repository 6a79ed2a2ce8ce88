"""Every method's state: known before training, complete after one step, restored bit for bit or refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

import fullrank
from fullrank import METHODS, CheckpointError
from fullrank.memory import adamw_state_bytes, held_state_bytes
from fullrank.optimizer import MethodOptimizer
from tests.cases import CASES, OptimizerCase
from tests.cases.harness import ONE_PER_CLASS, dtypes, each_class, every, feed, ours, parameter, saved_and_read
from tests.cases.tiny import TinyModel, assert_same, assert_same_state, train, train_by_backward
from tests.problems import RANK, SHAPES, make_gradients

# Checkpoints: a resumed run is the uninterrupted one.


@dtypes
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit", None])
@ours
def test_resume_is_bit_exact(case: OptimizerCase, state_dtype: str | None, dtype: torch.dtype) -> None:
    """Saved in the middle of a refresh period, read with weights_only, continued over two refreshes."""
    model = TinyModel(dtype)
    optimizer = case.on(model, state_dtype=state_dtype, weight_decay=0.1)
    train(model, optimizer, range(4))
    other = copy.deepcopy(model)
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
    """The same through ``Method.build``, as the application makes an optimizer and tells it of its steps."""
    case, build = CASES[name], METHODS[name].build
    config, model, other = case.config(), case.model(dtype), case.model(dtype)
    built = build(model, config)
    train_by_backward(model, built, range(4))
    other.load_state_dict(model.state_dict())
    resumed = build(other, config)
    resumed.optimizer.load_state_dict(saved_and_read(built.optimizer))
    if resumed.at_step is not None:
        resumed.at_step(4)
    assert_same_state(resumed.optimizer, built.optimizer)
    train_by_backward(model, built, range(4, 8))
    train_by_backward(other, resumed, range(4, 8))
    assert_same(other, model)
    assert_same_state(resumed.optimizer, built.optimizer)
    assert not torch.equal(model.get_parameter(case.moving), case.model(dtype).get_parameter(case.moving))


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
    other = copy.deepcopy(model)
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
    ("saver", "loader"), list(itertools.permutations(ONE_PER_CLASS, 2)), ids=lambda case: case.kind.__name__
)
def test_state_of_another_class_is_refused(saver: OptimizerCase, loader: OptimizerCase, steps: int) -> None:
    """Moments of one method mean nothing to another, even where their shapes agree."""
    model = TinyModel()
    optimizer = saver.on(model)
    train(model, optimizer, range(1))
    other = copy.deepcopy(model)
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
    other = copy.deepcopy(model)
    loading = case.on(other, **change)
    train(other, loading, range(2))
    refused_load(loading, saved_and_read(optimizer))


@pytest.mark.parametrize("inner", ["AdamW", "RMSprop"])
def test_fira_without_its_limiter_is_not_galore(inner: str) -> None:
    """Without a limiter Fira's state has GaLore's very keys and shapes; it is Fira's all the same."""
    fira, galore = (getattr(fullrank, name + inner) for name in ("Fira", "GaLore"))
    weight = parameter()
    saver = OptimizerCase(fira, {"limiter_gamma": None}).of([weight])
    feed(saver, weight, make_gradients(SHAPES["tall"], 1))
    refused_load(OptimizerCase(galore).of([weight]), saved_and_read(saver))


@pytest.mark.parametrize("source", ["AdamW", "rank 2"])
@each_class
def test_a_state_without_a_step_cannot_switch_the_rank(case: OptimizerCase, source: str) -> None:
    """Before its first step a state holds no tensor to compare; its rank, or the lack of one, still counts."""
    weight = parameter()
    loading = case.of([weight])
    saver = torch.optim.AdamW([weight]) if source == "AdamW" else case.of([weight], rank=2)
    refused_load(loading, saver.state_dict())
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
        for _, weight, group in optimizer.named():
            held = {key: (tuple(value.shape), value.dtype) for key, value in optimizer.state[weight].items()}
            assert held == optimizer.state_spec(weight, group)
            projected = group["rank"] is not None and weight.ndim >= 2
            working = torch.promote_types(dtype, torch.float32)
            moment = working if working == torch.float64 else getattr(torch, state_dtype or "", dtype)
            expected = dict.fromkeys(("basis", "basis_left", "limiter_norm"), working) | {"step": torch.float32}
            for key, (_, found) in held.items():
                assert found == expected.get(key, moment if projected else dtype), key
    assert optimizer.planned_state_bytes() == held_state_bytes(optimizer)


@dtypes
@pytest.mark.parametrize("name", METHODS)
def test_planned_bytes_are_the_held_ones(name: str, dtype: torch.dtype) -> None:
    """The prediction, on the meta device too, is what a trained optimizer holds."""
    case, method = CASES[name], METHODS[name]
    config = case.config()
    method.build(case.model(dtype, device="meta"), config)
    model, on_meta = case.model(dtype), case.model(dtype, device="meta")
    planned = method.state_bytes(on_meta, config)
    for frozen in case.freezable:
        model.get_parameter(frozen).requires_grad_(False)
        on_meta.get_parameter(frozen).requires_grad_(False)
    if not case.decides_what_trains:
        assert planned > method.state_bytes(on_meta, config), "frozen parameters have no state"
    planned = method.state_bytes(on_meta, config)
    assert planned == method.state_bytes(model, config)
    built = method.build(model, config)
    train_by_backward(model, built, range(4))
    assert held_state_bytes(built.optimizer) == planned


def test_the_yardstick_is_full_rank_adamw() -> None:
    """``adamw_state_bytes`` is what torch.optim.AdamW holds."""
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, range(1))
    assert adamw_state_bytes(model) == held_state_bytes(optimizer)
