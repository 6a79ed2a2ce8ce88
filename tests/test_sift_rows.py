"""SIFT with scope row: as many entries of each row, whole vectors, and a state whose tensors have a row for each."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import METHODS, SIFT, CheckpointError, ConfigError, load_adapter
from fullrank.memory import held_state_bytes
from fullrank.methods.sift import SiftConfig
from tests.reference.sift import (
    LINEAR,
    AdamW,
    MaskedTraining,
    backward,
    first_gradients,
    llama,
    num_trained,
    train,
    train_masked,
)

RATE = 0.2
QUERY = "model.layers.0.self_attn.q_proj.weight"
TARGETS = [*LINEAR, "norm"]
Run = tuple[Any, SIFT, torch.optim.Optimizer]


def start(dtype: torch.dtype = torch.float32, *, init: int = 0, **options: Any) -> Run:
    """A model of matrices and vectors under SIFT, a dense head beside, and AdamW."""
    model = llama(dtype, seed=init)
    sift = SIFT(model, RATE, TARGETS, ["lm_head"], **{"scope": "row"} | options)
    return model, sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2, weight_decay=0.1)


def rows_of(tensor: Tensor) -> Tensor:
    """A row for each place of the first dimension."""
    return tensor.reshape(len(tensor), -1)


def largest_of_rows(scores: Tensor) -> Tensor:
    """True at the largest entries of each row."""
    mask = torch.zeros_like(rows_of(scores), dtype=torch.bool)
    for row, place in zip(rows_of(scores).abs().double().tolist(), mask, strict=True):
        order = sorted(range(len(row)), key=lambda column: -row[column])
        place[order[: num_trained(RATE, len(row))]] = True
    return mask.view(scores.shape)


def chosen(sift: SIFT) -> dict[str, Tensor]:
    """Where the chosen entries of each weight are."""
    masks = {}
    for name, values in sift.sparse_mapping.items():
        weight = sift.model.get_parameter(name)
        mask = torch.zeros_like(rows_of(weight), dtype=torch.bool)
        masks[name] = mask.scatter_(1, values.idx.long(), True).view(weight.shape)
    return masks


def assert_same_choice(sift: SIFT, masks: dict[str, Tensor]) -> None:
    """Each weight's chosen entries are these, and its columns are in order."""
    for name, mask in chosen(sift).items():
        assert torch.equal(mask, masks[name]), name
        columns = sift.sparse_mapping[name].idx
        assert torch.equal(columns, columns.sort(1).values)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("reselect_every", [None, 3])
def test_it_follows_the_oracle(reselect_every: int | None, accumulate: int) -> None:
    """The largest first gradients of each row train, vectors train whole, and so again after each third step."""
    model, sift, optimizer = start(torch.float64, reselect_every=reselect_every)
    reference = llama(torch.float64)
    names = [*sift.sparse_mapping, "lm_head.weight"]
    rule = AdamW(lr=1e-2, weight_decay=0.1)
    oracle = MaskedTraining(reference, {name: torch.zeros(()) > 0 for name in names}, rule)
    for step in range(8):
        if step == 0 or (reselect_every is not None and step % reselect_every == 0):
            grads = first_gradients(reference, names, step * accumulate)
            masks = {name: largest_of_rows(grad) for name, grad in grads.items()}
            oracle.choose(masks | {"lm_head.weight": torch.ones_like(grads["lm_head.weight"], dtype=torch.bool)})
        train(model, optimizer, range(step, step + 1), accumulate=accumulate)
        train_masked(oracle, range(step, step + 1), accumulate=accumulate)
        assert_same_choice(sift, masks)
        for name, weight in reference.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-12)
    assert all(masks[name].all() for name in masks if "norm" in name)


def test_a_weight_of_four_dimensions() -> None:
    """A row is all that belongs to one place of the first dimension, in either memory format."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(3, 5, 2)).to(memory_format=memory_format)  # type: ignore[call-overload]
        sift = SIFT(model, RATE, ["weight"], scope="row")
        inputs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        model(inputs).square().sum().backward()
        (weight,) = sift.trainable_parameters()
        plain = copy.deepcopy(nn.Conv2d(3, 5, 2))
        plain.load_state_dict({key.removeprefix("0."): value for key, value in model.state_dict().items()})
        plain(inputs).square().sum().backward()
        assert plain.weight.grad is not None
        assert_same_choice(sift, {"0.weight": largest_of_rows(plain.weight.grad)})
        assert sift.sparse_mapping["0.weight"].shape == (5, num_trained(RATE, 12))
        torch.testing.assert_close(
            sift.sparse_mapping["0.weight"].grad, rows_of(plain.weight.grad).gather(1, sift.weights[0].index.long())
        )
        assert weight.shape == (5, 3, 2, 2)


def test_by_magnitude_and_at_random() -> None:
    """The largest weights of each row; the same random ones for the same seed."""
    model, sift, _ = start(selection="magnitude")
    backward(model, 0)
    assert_same_choice(sift, {n: largest_of_rows(llama().get_parameter(n).detach()) for n in sift.sparse_mapping})
    found = []
    for seed in (0, 0, 1):
        model, sift, _ = start(selection="random", seed=seed)
        backward(model, 0)
        found.append(chosen(sift)[QUERY])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].sum(1).tolist() == [num_trained(RATE, 16)] * 16
    assert len({tuple(row) for row in found[0].tolist()}) > 1


def test_by_hand_and_by_a_function() -> None:
    """The columns of each row, in any order and number."""
    columns = torch.tensor([[5, 2]] * 16)
    model, sift, optimizer = start(selection=lambda name, weight, grad, num: torch.arange(num).expand(len(weight), num))
    sift.sparse_mapping[QUERY].idx = columns
    train(model, optimizer, range(3))
    assert sift.sparse_mapping[QUERY].idx.tolist() == [[2, 5]] * 16
    assert sift.sparse_mapping[QUERY].train_num == 32
    moved = model.get_parameter(QUERY) != llama().get_parameter(QUERY)
    assert moved.any(0).nonzero().flatten().tolist() == [2, 5]
    key = sift.sparse_mapping[QUERY.replace("q_proj", "k_proj")]
    assert key.idx.tolist() == [list(range(num_trained(RATE, 16)))] * 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 1, 2], r"columns of each row \(16 x k\) with scope row, got shape \(3,\)"),
        (torch.zeros(15, 2), r"columns of each row \(16 x k\).*float32"),
        (torch.tensor([[0, 1]] * 15), r"got shape \(15, 2\)"),
        (torch.tensor([[0, 16]] * 16), "columns from 0 to 15, got 0 to 16"),
        (torch.tensor([[3, 3]] * 16), "twice"),
    ],
)
def test_wrong_columns(given: Any, message: str) -> None:
    """Refused with the weight's name and what it needs."""
    model, sift, _ = start()
    sift.sparse_mapping[QUERY].idx = given
    with pytest.raises(ConfigError, match=f"idx of {QUERY} .*{message}"):
        backward(model, 0)


@pytest.mark.parametrize("keep_base", [True, False])
def test_the_state_has_a_row_for_each_row(keep_base: bool) -> None:
    """Values, moments, index and record alike; as many bytes as predicted."""
    model, sift, optimizer = start(torch.bfloat16, keep_base=keep_base)
    what = {"target_modules": TARGETS, "exception": ["lm_head"], "keep_base": keep_base}
    config = SiftConfig(density=RATE, scope="row", **what)  # type: ignore[arg-type]
    predicted = METHODS["sift"].state_bytes(llama(torch.bfloat16), config)
    train(model, optimizer, range(2))
    for name, values in sift.sparse_mapping.items():
        weight = model.get_parameter(name)
        shape = (len(weight), num_trained(RATE, rows_of(weight).shape[1]))
        state = optimizer.state[values]
        keys = {"exp_avg", "exp_avg_sq", "sparse_index", "sparse_values"}
        keys |= {"sparse_base", "sparse_touched"} if keep_base else set()
        assert {key for key, value in state.items() if torch.is_tensor(value) and value.shape == shape} == keys
    assert held_state_bytes(optimizer) == predicted


@pytest.mark.parametrize("reselect_every", [None, 2])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_resume_is_bit_exact(at: int, reselect_every: int | None) -> None:
    """In new objects, over other weights."""
    run = start(torch.bfloat16, reselect_every=reselect_every)
    train(run[0], run[2], range(at))
    file = io.BytesIO()
    torch.save({"model": run[0].state_dict(), "optimizer": run[2].state_dict()}, file)
    train(run[0], run[2], range(at, 5))
    file.seek(0)
    content = torch.load(file, weights_only=True)
    resumed = start(torch.bfloat16, init=7, reselect_every=reselect_every)
    resumed[0].load_state_dict(content["model"])
    resumed[2].load_state_dict(content["optimizer"])
    train(resumed[0], resumed[2], range(at, 5))
    assert all(torch.equal(value, run[0].state_dict()[name]) for name, value in resumed[0].state_dict().items())
    for (_, mine), (_, theirs) in zip(resumed[2].state.items(), run[2].state.items(), strict=True):
        assert all(torch.equal(v, theirs[k]) if torch.is_tensor(v) else v == theirs[k] for k, v in mine.items())


@pytest.mark.parametrize("key", ["sparse_index", "sparse_values"])
def test_a_state_with_other_rows(key: str) -> None:
    """Refused by the weight's name."""
    run, other = start(), start()
    train(run[0], run[2], range(1))
    state = copy.deepcopy(run[2].state_dict())
    state["state"][0][key] = state["state"][0][key][:-1]
    with pytest.raises(CheckpointError, match="q_proj"):
        other[2].load_state_dict(state)


@pytest.mark.parametrize("reselect_every", [None, 2])
def test_adapter(reselect_every: int | None, tmp_path: Path) -> None:
    """On the base it gives the trained weights, those that have left training too."""
    model, sift, optimizer = start(reselect_every=reselect_every)
    train(model, optimizer, range(5))
    sift.save_adapter(tmp_path, dtype="float32")
    base = llama()
    load_adapter(tmp_path).apply(base)
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6)


def test_everything_is_full_training() -> None:
    """At density 1 each row trains whole."""
    model, plain = llama(torch.float64), llama(torch.float64)
    sift = SIFT(model, 1.0, [""], scope="row")
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2), range(4))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), range(4))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)
