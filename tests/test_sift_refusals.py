"""What SIFT refuses, before anything has changed, and how it leaves a model again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fullrank import SIFT, CheckpointError, ConfigError, UnsupportedError
from tests.reference.sift import BLOCK, LINEAR, backward, batch, llama, train

granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])
Run = tuple[Any, SIFT, torch.optim.Optimizer]


def start(targets: list[str] = LINEAR, exception: list[str] | None = None, **options: Any) -> Run:
    """A model under SIFT and its optimizer."""
    model = llama()
    sift = SIFT(model, **{"sparse_rate": 0.1, "block_size": BLOCK} | options, sparse_module=targets,
                exception=["lm_head"] if exception is None else exception)  # fmt: skip
    return model, sift, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)


def everything(run: Run) -> dict[str, Any]:
    """All that loading could change."""
    model, sift, optimizer = run
    values = {name: (v.detach().clone(), v.idx) for name, v in sift.sparse_mapping.items()}
    return copy.deepcopy({"model": model.state_dict(), "values": values, "optimizer": optimizer.state_dict()})


def flat(content: Any) -> list[Any]:
    """The leaves of nested containers, tensors as lists."""
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in (key, *flat(value))]
    if isinstance(content, list | tuple):
        return [leaf for value in content for leaf in flat(value)]
    return content.flatten().tolist() if torch.is_tensor(content) else [content]


# States of something else.

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "density": ({"sparse_rate": 0.2}, "density 0.1"),
    "selection": ({"selection": "magnitude"}, "selection 'gradient'"),
    "batches": ({"selection_batches": 2}, "selection_batches 1"),
    "scope": ({"scope": "model"}, "scope 'matrix'"),
    "rows": ({"granularity": "row"}, "granularity 'entry'"),
    "blocks": ({"granularity": "block"}, "granularity 'entry'"),
    "reselection": ({"reselect_every": 5}, "reselect_every None"),
    "seed": ({"seed": 1}, "seed 0"),
    "record": ({"keep_base": False}, "keep_base True"),
    "fewer targets": ({"targets": LINEAR[1:]}, "q_proj"),
    "more targets": ({"targets": [*LINEAR, "norm"]}, "norm"),
    "as many targets": ({"targets": [*LINEAR[:-1], "norm"], "exception": ["embed_tokens"]}, "up_proj"),
    "exceptions": ({"exception": ["lm_head", "norm"]}, "parameters"),
    "no exceptions": ({"exception": []}, "parameters"),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("options", "word"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_sift(options: dict[str, Any], word: str, trained: bool) -> None:
    """Refused with what differs; model, values, choice and optimizer stay as they are."""
    run, other = start(), start(**options)
    train(run[0], run[2], range(2))
    if trained:
        train(other[0], other[2], range(3))
    before = everything(other)
    with pytest.raises(CheckpointError, match=re.escape(word)):
        other[2].load_state_dict(copy.deepcopy(run[2].state_dict()))
    assert flat(everything(other)) == flat(before)
    train(other[0], other[2], range(3, 5))


@pytest.mark.parametrize("how", ["other targets", "another order"])
def test_a_state_of_weights_of_the_same_shapes(how: str) -> None:
    """Values of the query would go into the key."""
    run, other = start(["q_proj"]), start(["k_proj" if how == "other targets" else "q_proj"])
    train(run[0], run[2], range(2))
    if how == "another order":
        other[2].param_groups[0]["params"][:2] = other[2].param_groups[0]["params"][1::-1]
    before = everything(other)
    with pytest.raises(CheckpointError, match="q_proj"):
        other[2].load_state_dict(copy.deepcopy(run[2].state_dict()))
    assert flat(everything(other)) == flat(before)


@pytest.mark.parametrize("targets", [["q_proj"], LINEAR])
def test_a_state_without_sift(targets: list[str]) -> None:
    """Of dense training, of the same number of parameters or of more."""
    plain, run = llama(), start(targets, exception=[])
    count = 2 if targets == ["q_proj"] else None
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.ndim > 1][:count])
    train(plain, optimizer, range(2))
    before = everything(run)
    with pytest.raises(CheckpointError, match="q_proj"):
        run[2].load_state_dict(optimizer.state_dict())
    assert flat(everything(run)) == flat(before)


def damage(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """Change one kept tensor of the first weight, or take it away."""

    def apply(state: dict[str, Any]) -> None:
        state["state"][0][key] = change(state["state"][0][key])

    return apply


DAMAGED = {
    "out of range": damage("sparse_index", lambda index: index + 10_000),
    "negative": damage("sparse_index", lambda index: index - 10_000),
    "shorter": damage("sparse_index", lambda index: index[:-1]),
    "floating point": damage("sparse_index", lambda index: index.float()),
    "fewer values": damage("sparse_values", lambda values: values[:-1]),
    "missing": lambda state: state["state"][0].pop("sparse_values"),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state(change: Callable[[dict[str, Any]], None]) -> None:
    """Refused by the name of the weight, nothing changes."""
    run, other = start(), start()
    train(run[0], run[2], range(2))
    state = copy.deepcopy(run[2].state_dict())
    change(state)
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        other[2].load_state_dict(state)
    assert flat(everything(other)) == flat(before)


def test_a_state_set_past_the_optimizer() -> None:
    """State put into ``optimizer.state`` by hand is noticed at the next step: its choice is another."""
    run, other = start(), start(selection="random")
    for model, _, optimizer in (run, other):
        train(model, optimizer, range(2))
    other[2].state.update(dict(zip(other[2].state, run[2].state.values(), strict=True)))
    with pytest.raises(CheckpointError, match="load_state_dict"):
        train(other[0], other[2], range(2, 3))


# Leaving.


@granularities
@pytest.mark.parametrize("at", [0, 3])
def test_detach(granularity: str, at: int) -> None:
    """The model is a plain one again: its parameters, hooks, forwards and what trained before; trained weights stay."""
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    sift = SIFT(model, 0.1, LINEAR, ["lm_head"], gradient_checkpointing=True, granularity=granularity, block_size=BLOCK)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    train(model, optimizer, range(at))
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    sift.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not any(hooks for key, hooks in vars(module).items() if "hooks" in key), name
    backward(model, 0)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {n for n, w in wanted.items() if w}
    optimizer.step()
    assert torch.equal(
        model.get_parameter("model.layers.1.mlp.up_proj.weight"), trained["model.layers.1.mlp.up_proj.weight"]
    )


def test_a_detached_model_takes_another() -> None:
    """With other settings; the old optimizer's steps do not reach the weights any more."""
    model, sift, old = start(granularity="row")
    train(model, old, range(2))
    sift.detach()
    again = SIFT(model, 0.1, LINEAR)
    optimizer = torch.optim.AdamW(again.parameters_in_optimizer(), lr=1e-2)
    train(model, optimizer, range(2))
    before = {name: value.clone() for name, value in model.state_dict().items() if name in again.sparse_mapping}
    for parameter in old.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    old.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_two_at_once() -> None:
    """A second one on the same model is refused, and the first one trains on."""
    model, _, optimizer = start()
    other = start()
    for targets in (["q_proj"], ["norm", *LINEAR], ["q_proj", "lm_head"]):
        with pytest.raises(ConfigError, match=r"exists already.*detach\(\)"):
            SIFT(model, 0.1, targets)
    for m, o in ((model, optimizer), (other[0], other[2])):
        train(m, o, range(3))
    assert all(torch.equal(value, other[0].state_dict()[name]) for name, value in model.state_dict().items())


# Settings.


def test_all_wrong_settings_at_once() -> None:
    """Each with its name, its value and its bound."""
    wrong = {"selection": "gradeint", "selection_batches": 0, "scope": "layer", "granularity": "column"}
    wrong |= {"block_size": -1, "reselect_every": 0, "seed": "a"}
    with pytest.raises(ConfigError) as error:
        SIFT(llama(), 1.5, LINEAR, **wrong)
    for key, value in {"density": 1.5, **wrong}.items():
        assert re.search(rf"{key}\b[^.]*, got {re.escape(repr(value))}\.", str(error.value)), key


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan"), True, "0.1", None])
def test_wrong_rate(rate: Any) -> None:
    """The message says what is meant by it."""
    with pytest.raises(ConfigError, match=rf"above 0 and at most 1, got {re.escape(repr(rate))}\. 0\.01 is 1%"):
        SIFT(llama(), rate, LINEAR)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no match": ({"sparse_module": ["q_prj"]}, r"'q_prj' matches no.*Near names: .*q_proj"),
    "no match of an exception": ({"exception": ["lm_haed"]}, r"'lm_haed' matches no.*Near names: .*lm_head"),
    "a string": ({"sparse_module": "q_proj"}, r"list.*'q_proj'"),
    "nothing": ({"sparse_module": []}, "at least one pattern"),
    "all excepted": ({"sparse_module": ["q_proj"], "exception": ["self_attn"]}, r"q_proj.*exception"),
    "half a batch": ({"selection_batches": 1.5}, r"selection_batches.*1\.5"),
    "rows within rows": ({"scope": "row", "granularity": "row"}, "scope row.*got granularity 'row'"),
    "rows of the whole model": ({"scope": "model", "granularity": "row"}, "scope model.*granularity entry"),
    "block too large": ({"granularity": "block", "block_size": 7}, r"block_size.*q_proj.weight \(16 x 16\), got 7"),
    "rows of an embedding": ({"sparse_module": ["embed"], "granularity": "row"}, r"embed_tokens\.weight.*Embedding"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    """Refused before the model has changed."""
    model = llama()
    with pytest.raises(ConfigError, match=message):
        SIFT(model, **{"sparse_rate": 0.1, "sparse_module": LINEAR} | options)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in llama().named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(hooks for module in model.modules() for key, hooks in vars(module).items() if "hooks" in key)


# Models that it cannot train.


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_units_of_a_tied_head(granularity: str) -> None:
    """Its gradient comes from the embedding too, so no product of the head alone gives it."""
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is shared by .*lm_head\.weight.*granularity entry"):
        SIFT(llama(tied=True), 0.1, ["lm_head"], granularity=granularity, block_size=BLOCK)


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_units_of_two_linear_layers_that_share_a_weight(granularity: str) -> None:
    """Each would compute its own part, at its own time."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match=r"0\.weight is shared by 0\.weight and 1\.weight"):
        SIFT(model, 0.1, ["weight"], granularity=granularity, block_size=BLOCK)


def test_integer_weights() -> None:
    """Quantised weights have no gradient."""
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"codes.*torch\.int8"):
        SIFT(model, 0.1, ["codes"])


def test_sparse_gradients() -> None:
    """An embedding with sparse=True is told at its first gradient, before anything trains."""
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    SIFT(model, 0.1, ["weight"])
    with pytest.raises(UnsupportedError, match=r"sparse gradients.*0\.weight.*sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by torchrun and not connected: told at the first forward pass that trains; any other passes."""
    model, _, _ = start()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for each in (model, start()[0]):
        with pytest.raises(UnsupportedError, match=r"one of 2, and they are not connected.*init_process_group"):
            each(**batch(each, 0))
        with torch.no_grad():
            each(**batch(each, 0))
        with pytest.raises(UnsupportedError, match="one of 2"):
            each.eval()(**batch(each, 0)).loss.backward()
    monkeypatch.setenv("WORLD_SIZE", "1")
    backward(model.train(), 0)
