"""SIFT's state: the model saves as the plain one, a resumed run is the uninterrupted one, a copy goes on by itself."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from fullrank import SIFT, FiraAdamW, UnsupportedError
from tests.reference.sift import BLOCK, LINEAR, backward, batch, llama, train

pytestmark = pytest.mark.filterwarnings("ignore:no parameter group has a rank:UserWarning")  # of FiraAdamW
granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "fira": lambda p: FiraAdamW(p, lr=1e-2, weight_decay=0.1),
}
Run = tuple[Any, SIFT, torch.optim.Optimizer]


def start(dtype: torch.dtype = torch.float32, *, init: int = 0, optimizer: str = "adamw", **options: Any) -> Run:
    """A model under SIFT, a dense head beside, and its optimizer."""
    model = llama(dtype, seed=init)
    sift = SIFT(model, 0.1, LINEAR, ["lm_head"], **{"block_size": BLOCK} | options)
    return model, sift, OPTIMIZERS[optimizer](sift.parameters_in_optimizer())


def saved(run: Run) -> dict[str, Any]:
    """Model and optimizer as a file gives them back, read without trusting the file."""
    model, _, optimizer = run
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def load(run: Run, content: dict[str, Any], *, first: str = "model") -> None:
    """Load both parts, this one first."""
    for part in sorted(content, reverse=first == "optimizer"):
        {"model": run[0], "optimizer": run[2]}[part].load_state_dict(content[part])


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Every weight of the two, bit for bit."""
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def assert_same(run: Run, other: Run) -> None:
    """Weights, values, indices and everything in the optimizer's state, bit for bit and in the same dtypes."""
    assert_same_weights(run[0], other[0])
    for name, values in run[1].sparse_mapping.items():
        theirs = other[1].sparse_mapping[name]
        assert torch.equal(values, theirs), name
        assert (values.idx is None) == (theirs.idx is None)
        assert values.idx is None or torch.equal(values.idx, theirs.idx), name
    states = [list(r[2].state_dict()["state"].items()) for r in (run, other)]
    assert [(number, state.keys()) for number, state in states[0]] == [(n, s.keys()) for n, s in states[1]]
    for (_, mine), (_, yours) in zip(*states, strict=True):
        for key, value in mine.items():
            assert type(value) is type(yours[key]), key
            same = torch.equal(value, yours[key]) if torch.is_tensor(value) else value == yours[key]
            assert same, key
            assert not torch.is_tensor(value) or value.dtype == yours[key].dtype, key


# The model's own state.


@granularities
def test_the_state_of_the_model_is_the_plain_one(granularity: str, tmp_path: Path) -> None:
    """Same keys, current weights, strict loading both ways, and transformers' own files."""
    model, _, optimizer = start(granularity=granularity)
    for _ in range(2):  # before the choice, and in the middle of training
        assert model.state_dict().keys() == llama().state_dict().keys()
        assert model.model.layers[1].state_dict().keys() == llama().model.layers[1].state_dict().keys()
        plain = llama(seed=3)
        plain.load_state_dict(model.state_dict())
        assert_same_weights(plain, model)
        model.save_pretrained(tmp_path)
        assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model)
        model.load_state_dict(plain.state_dict())
        train(model, optimizer, range(3))


def test_missing_and_unexpected_keys_are_still_told() -> None:
    """Strict loading is as strict as before."""
    model, _, optimizer = start()
    train(model, optimizer, range(1))
    state = llama().state_dict()
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head"):
        model.load_state_dict(state)
    state = llama().state_dict() | {"model.extra": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict(state)


@pytest.mark.parametrize("part", ["", "model.layers.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@granularities
def test_values_follow_loaded_weights(granularity: str, dtype: torch.dtype, part: str) -> None:
    """Other weights in the model, or in a submodule of it: training goes on from these."""
    model, sift, optimizer = start(dtype, granularity=granularity)
    train(model, optimizer, range(2))
    other = llama(dtype, seed=5)
    model.get_submodule(part).load_state_dict(other.get_submodule(part).state_dict())
    loaded = {name: value.clone() for name, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2, 3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded[name]), name
        if name in sift.sparse_mapping and name.startswith(part):
            assert torch.equal(value, other.get_parameter(name)), name


def test_loading_its_own_weights_keeps_the_full_precision() -> None:
    """Values under bfloat16 weights are not rounded when the model reads back what they round to."""
    run = start(torch.bfloat16)
    train(run[0], run[2], range(3))
    values = {name: v.detach().clone() for name, v in run[1].sparse_mapping.items()}
    assert any(not torch.equal(v, v.bfloat16().float()) for v in values.values())
    run[0].load_state_dict(saved(run)["model"])
    assert all(torch.equal(v, values[name]) for name, v in run[1].sparse_mapping.items())


def test_replacing_the_weights_is_refused() -> None:
    """load_state_dict(assign=True) would leave SIFT with weights that are no longer the model's."""
    model, _, optimizer = start()
    train(model, optimizer, range(1))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight was replaced"):
        model.load_state_dict(llama(seed=1).state_dict(), assign=True)


# Resume.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("dtype", "granularity"),
    [(torch.float32, "entry"), (torch.bfloat16, "entry"), (torch.bfloat16, "row"), (torch.float32, "block")],
)
def test_resume_is_bit_exact(dtype: torch.dtype, granularity: str, optimizer: str) -> None:
    """Into a fresh process's objects, over a model with other weights, in either order."""
    options = {"optimizer": optimizer, "granularity": granularity}
    run = start(dtype, **options)
    train(run[0], run[2], range(3), accumulate=2)
    content, halfway = saved(run), copy.deepcopy(run)
    train(run[0], run[2], range(3, 5), accumulate=2)
    for first in ("model", "optimizer"):
        resumed = start(dtype, init=7, **options)
        load(resumed, copy.deepcopy(content), first=first)
        assert_same(resumed, halfway)
        train(resumed[0], resumed[2], range(3, 5), accumulate=2)
        assert_same(resumed, run)


def test_the_optimizer_state_brings_the_trained_entries() -> None:
    """Loaded alone, over the base model, it writes them into the weights."""
    run, resumed = start(torch.bfloat16), start(torch.bfloat16)
    train(run[0], run[2], range(3))
    resumed[2].load_state_dict(saved(run)["optimizer"])
    for name in run[1].sparse_mapping:
        assert torch.equal(resumed[0].get_parameter(name), run[0].get_parameter(name))


OPEN = {
    "before the choice": {"selection_batches": 6},
    "choosing again": {"reselect_every": 2},
    "choosing again in the middle": {"reselect_every": 3, "selection_batches": 3},
    "choosing rows again": {"reselect_every": 2, "granularity": "row"},
    "choosing blocks again in the middle": {"reselect_every": 3, "selection_batches": 3, "granularity": "block"},
    "whole model": {"scope": "model", "reselect_every": 2},
    "at random": {"selection": "random", "seed": 3, "reselect_every": 2},
}


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("options", OPEN.values(), ids=OPEN)
def test_resume_around_a_choice(options: dict[str, Any], at: int) -> None:
    """At every step before, at and after a choice, into new objects and back into those that went on."""
    run = start(torch.bfloat16, **options)
    train(run[0], run[2], range(at))
    content = saved(run)
    train(run[0], run[2], range(at, 7))
    expected = copy.deepcopy(run)
    for resumed in (start(torch.bfloat16, init=7, **options), run):
        load(resumed, copy.deepcopy(content))
        train(resumed[0], resumed[2], range(at, 7))
        assert_same(resumed, expected)


def test_back_to_before_the_choice() -> None:
    """What was chosen and trained since is forgotten: the next choice is made, and trains, as in a fresh run."""
    run, resumed = start(selection_batches=3), start(init=7, selection_batches=3)
    train(run[0], run[2], range(2))
    content = saved(run)
    train(run[0], run[2], range(50, 54))
    for again in (run, resumed):
        load(again, copy.deepcopy(content))
        assert all(values.idx is None for values in again[1].sparse_mapping.values())
        train(again[0], again[2], range(2, 5))
    assert_same(run, resumed)


@pytest.mark.parametrize("scope", ["matrix", "model"])
def test_saved_between_a_choice_and_its_step(scope: str) -> None:
    """As an interrupted run may be: the loaded weights are the model's, and train on."""
    run, resumed = start(reselect_every=2, scope=scope), start(init=7, reselect_every=2, scope=scope)
    train(run[0], run[2], range(2))
    backward(run[0], 2)
    content = saved(run)
    load(resumed, content)
    assert_same_weights(resumed[0], run[0])
    train(resumed[0], resumed[2], range(2, 4))


def test_a_choice_by_hand_resumes() -> None:
    """It is still a choice by hand afterwards, of whatever size: a due re-selection passes it over."""
    name = "model.layers.0.self_attn.q_proj.weight"
    run, resumed = start(reselect_every=2), start(init=7, reselect_every=2)
    run[1].sparse_mapping[name].idx = [4, 2, 9]
    train(run[0], run[2], range(3))
    load(resumed, saved(run))
    for model, _, optimizer in (run, resumed):
        train(model, optimizer, range(3, 6))
    assert_same(resumed, run)
    assert resumed[1].sparse_mapping[name].idx.tolist() == [2, 4, 9]


@pytest.mark.parametrize("at", [2, 3])
def test_loading_shares_nothing_with_the_saved_state(at: int) -> None:
    """Training on leaves the parts of a loaded dict that are ours as they were, those of an open choice too."""
    run = start(reselect_every=2, selection_batches=2)
    train(run[0], run[2], range(at))
    content = saved(run)
    kept = copy.deepcopy(content)
    resumed = start(init=7, reselect_every=2, selection_batches=2)
    load(resumed, content)
    train(resumed[0], resumed[2], range(at, 6))
    for number, state in kept["optimizer"]["state"].items():
        ours = [key for key in state if key.startswith("sparse_") and torch.is_tensor(state[key])]
        assert all(torch.equal(content["optimizer"]["state"][number][key], state[key]) for key in ours)
    waiting = [c["optimizer"]["param_groups"][0]["sift"]["waiting"] for c in (content, kept)]
    assert waiting[0].keys() == waiting[1].keys()
    assert bool(waiting[1]) == (at == 3)
    for name, (pending, *counts) in waiting[1].items():
        assert torch.equal(waiting[0][name][0], pending)
        assert list(waiting[0][name][1:]) == counts


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_resume_through_trainer(granularity: str, tmp_path: Path) -> None:
    """From the checkpoint of step 5 of 10, in a fresh model: the same bits as without a break."""

    def run(folder: str, init: int, checkpoint: str | None) -> tuple[Run, Trainer]:
        model, sift, optimizer = start(torch.bfloat16, init=init, granularity=granularity, reselect_every=4)
        rows = [{key: value[i] for key, value in batch(model, n).items()} for n in range(8) for i in range(3)]
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=10,
            save_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint)
        return (model, sift, optimizer), trainer

    whole, trainer = run("whole", 0, None)
    resumed, other = run("resumed", 7, str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(resumed, whole)
    assert trainer.state.global_step == other.state.global_step == 10
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-10", dtype=torch.bfloat16)
    assert_same_weights(plain, whole[0])
    assert not torch.equal(plain.lm_head.weight, llama(torch.bfloat16).lm_head.weight)


# Copies.


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("options", [{}, *OPEN.values()], ids=["plain", *OPEN])
def test_deepcopy_trains_on(options: dict[str, Any], at: int) -> None:
    """Model, SIFT and optimizer copied together go on by themselves as the originals do."""
    run = start(**options)
    train(run[0], run[2], range(at))
    twin: Run = copy.deepcopy(run)
    before = {name: value.clone() for name, value in run[0].state_dict().items()}
    train(twin[0], twin[2], range(at, 6))
    assert_same_weights_to(run[0], before)
    train(run[0], run[2], range(at, 6))
    assert_same(twin, run)
    assert twin[1].get_trainable_num() == run[1].get_trainable_num()


def assert_same_weights_to(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every weight is still what it was."""
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_deepcopy_keeps_a_choice_by_hand() -> None:
    """Also one that was not used yet."""
    name = "model.layers.0.self_attn.q_proj.weight"
    run = start()
    run[1].sparse_mapping[name].idx = [7, 3]
    twin: Run = copy.deepcopy(run)
    for model, _, optimizer in (run, twin):
        train(model, optimizer, range(2))
    assert twin[1].sparse_mapping[name].idx.tolist() == [3, 7]
    assert_same(twin, run)


@granularities
def test_a_copy_of_the_model_alone(granularity: str) -> None:
    """It computes the same, and its original trains on as if there were none."""
    run, other = start(granularity=granularity), start(granularity=granularity)
    train(run[0], run[2], range(2))
    train(other[0], other[2], range(2))
    twin = copy.deepcopy(run[0])
    assert torch.equal(twin(**batch(twin, 0)).logits, run[0](**batch(run[0], 0)).logits)
    backward(twin, 5)
    assert all(p.grad is None for p in run[0].parameters())
    for model, _, optimizer in (run, other):
        train(model, optimizer, range(2, 4))
    assert_same(run, other)
