"""SIFT inside a training loop: what lives between backward and step, and updates that are never late."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fullrank import SIFT
from tests.reference.sift import (
    BLOCK,
    LINEAR,
    AdamW,
    MaskedTraining,
    backward,
    batch,
    first_gradients,
    largest,
    llama,
    mask_of,
    train,
    train_masked,
)

granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])


def sparsely(model: nn.Module, rate: float = 0.1, *exception: str, **options: Any) -> tuple[SIFT, torch.optim.AdamW]:
    """SIFT on the authors' modules, and AdamW at a rate whose steps show."""
    sift = SIFT(model, rate, LINEAR, exception, **{"block_size": BLOCK} | options)
    return sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)


def assert_equal(found: nn.Module, wanted: nn.Module) -> None:
    """Every weight of the two, bit for bit."""
    theirs = wanted.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, theirs[name]), name


# Updates.


@granularities
def test_no_update_is_late_or_lost(granularity: str) -> None:
    """A step is in the weight at once: the next forward pass sees it, and the last one is not missing."""
    model, reference = llama(torch.float64), llama(torch.float64)
    sift, optimizer = sparsely(model, granularity=granularity)
    masks: dict[str, Tensor] = {}
    for name, grad in first_gradients(reference, sift.sparse_mapping).items():
        masks[name] = mask_of(grad.shape, largest(grad, 0.1, granularity, BLOCK), granularity, BLOCK)
    oracle = MaskedTraining(reference, masks, AdamW(lr=1e-2, weight_decay=0.01))
    before = model(**batch(model, 0)).loss.item()
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        train_masked(oracle, range(step, step + 1))
        for name in masks:
            torch.testing.assert_close(model.get_parameter(name), reference.get_parameter(name), rtol=0, atol=1e-12)
        found, wanted = (m(**batch(m, 0)).loss.item() for m in (model, reference))
        assert found == pytest.approx(wanted, abs=1e-5)
        if step == 0:
            assert found < before - 0.005


def test_every_step_of_a_schedule_is_obeyed() -> None:
    """A rate of zero is a step that changes nothing, in the very step that it is set for."""
    model = llama()
    _, optimizer = sparsely(model)
    train(model, optimizer, range(1))
    for rate in (0.0, 1e-2, 0.0):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, range(1, 2))
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same == (rate == 0.0)


def test_another_optimizer_does_not_disturb() -> None:
    """Steps of an optimizer that holds none of the values write nothing."""
    model = llama()
    sift, optimizer = sparsely(model)
    train(model, optimizer, range(1))
    backward(model, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [values.grad.clone() for values in sift.parameters_in_optimizer()]
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3)
    torch.optim.AdamW([stranger]).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(v.grad, g) for v, g in zip(sift.parameters_in_optimizer(), grads, strict=True))


# Gradients.


class Census:
    """Counts the dense gradients that are alive whenever a new one has come."""

    def __init__(self, model: nn.Module) -> None:
        self.born: list[StorageWeakRef] = []
        self.most = 0
        for name, weight in model.named_parameters():
            if any(pattern in name for pattern in LINEAR):
                weight.register_post_accumulate_grad_hook(self.note)

    def note(self, weight: Tensor) -> None:
        """One has just been accumulated."""
        assert weight.grad is not None
        self.born.append(StorageWeakRef(weight.grad.untyped_storage()))
        self.most = max(self.most, self.num_alive())

    def num_alive(self) -> int:
        """How many have not been freed."""
        return sum(not storage.expired() for storage in self.born)


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"selection": "random"}], ids=str)
def test_one_dense_gradient_at_a_time(options: dict[str, Any]) -> None:
    """Each is freed before the next one comes, in the batch that decides as in all others; none is left behind."""
    model = llama()
    census = Census(model)
    sift, optimizer = sparsely(model, **options)
    for number in range(3):
        backward(model, number)
        assert census.most == 1
        assert census.num_alive() == 0
        assert all(model.get_parameter(name).grad is None for name in sift.sparse_mapping)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in sift.parameters_in_optimizer())
        optimizer.step()
        optimizer.zero_grad()
    expected = 14 if "granularity" in options else 3 * 14
    assert len(census.born) == expected


def test_the_census_counts() -> None:
    """Dense training holds all of them; a choice over two batches as well, until it is made."""
    plain, waiting = llama(), llama()
    dense, held = Census(plain), Census(waiting)
    sparsely(waiting, selection_batches=2)
    backward(plain, 0)
    assert dense.most == dense.num_alive() == 14
    for number, alive in ((0, 14), (1, 0)):
        backward(waiting, number)
        assert held.num_alive() == alive


@granularities
@pytest.mark.parametrize("owner", ["optimizer", "model"])
def test_gradients_set_to_zero(owner: str, granularity: str) -> None:
    """``zero_grad(set_to_none=False)`` of the model or the optimizer trains as setting them to None does."""
    model, other = llama(), llama()
    _, optimizer = sparsely(model, 0.1, "lm_head", granularity=granularity)
    _, usual = sparsely(other, 0.1, "lm_head", granularity=granularity)
    train(other, usual, range(5), accumulate=2)
    for step in range(5):
        for number in (2 * step, 2 * step + 1):
            backward(model, number, accumulate=2)
        optimizer.step()
        {"optimizer": optimizer, "model": model}[owner].zero_grad(set_to_none=False)
    assert_equal(model, other)


def test_frozen_weights_get_no_gradient() -> None:
    """What no pattern matches takes no work: no gradient at all."""
    model = llama()
    sift, _ = sparsely(model, 0.1, "lm_head")
    backward(model, 0)
    trained = {name for name, _ in sift.named_parameters_in_optimizer()}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


# Checkpointing: transformers' models see to it themselves, others need the flag.


class Recomputed(nn.Module):
    """An embedding before two layers that are computed again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens)
        loss = checkpoint(self.layers, features, use_reentrant=True) if self.reentrant else self.layers(features)
        return loss.square().mean()


def train_recomputed(model: Recomputed, *, flag: bool, granularity: str = "entry") -> None:
    """Four steps on the layers."""
    sift = SIFT(model, 0.1, ["layers"], gradient_checkpointing=flag, granularity=granularity, block_size=4)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    for number in range(4):
        loss = model(torch.arange(6) + number)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@granularities
def test_reentrant_checkpointing_of_any_model(granularity: str) -> None:
    """With the flag, layers behind frozen embeddings train as without checkpointing."""
    model, plain = Recomputed(reentrant=True), Recomputed(reentrant=False)
    train_recomputed(model, flag=True, granularity=granularity)
    train_recomputed(plain, flag=False, granularity=granularity)
    assert_equal(model, plain)
    assert not torch.equal(model.layers[0].weight, Recomputed(reentrant=True).layers[0].weight)
    assert not model.embedding.weight.requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_training_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Without the flag no gradient comes: said once, with what to do."""
    with caplog.at_level(logging.WARNING, logger="fullrank"):
        train_recomputed(Recomputed(reentrant=False), flag=False)
        assert not caplog.records
        train_recomputed(Recomputed(reentrant=True), flag=False)
    assert len(caplog.records) == 1
    assert "gradient_checkpointing=True" in caplog.text
