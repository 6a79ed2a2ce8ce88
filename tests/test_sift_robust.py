"""SIFT where others touch the same model: optimizers with closures, edits, casts, wrappers, and letting go of it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fullrank import SIFT, ConfigError, UnsupportedError
from tests.reference.sift import BLOCK, LINEAR, backward, batch, llama, train

granularities = pytest.mark.parametrize("granularity", ["entry", "row", "block"])
sliced = pytest.mark.parametrize("granularity", ["row", "block"])
QUERY = "model.layers.0.self_attn.q_proj.weight"


def start(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, SIFT, torch.optim.AdamW]:
    """A model under SIFT, after its choice, and its optimizer."""
    model = llama(dtype)
    sift = SIFT(model, 0.1, LINEAR, **{"block_size": BLOCK} | options)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    train(model, optimizer, range(2))
    return model, sift, optimizer


@granularities
@pytest.mark.parametrize("steps", [0, 2])
def test_everything_is_freed(granularity: str, steps: int) -> None:
    """Without detach(): the model, its SIFT and its weights go when nobody holds them."""
    model = llama()
    sift = SIFT(model, 0.1, LINEAR, granularity=granularity, block_size=BLOCK)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
    train(model, optimizer, range(steps))
    held = [weakref.ref(thing) for thing in (model, sift, optimizer, model.get_parameter(QUERY))]
    del model, sift, optimizer
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


@granularities
def test_the_model_keeps_its_sift(granularity: str) -> None:
    """Training goes on where only model and optimizer are held."""
    model, sift, optimizer = start(granularity=granularity)
    other, same, usual = start(granularity=granularity)
    del sift
    gc.collect()
    train(model, optimizer, range(2, 5))
    train(other, usual, range(2, 5))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert same.get_trainable_num() > 0


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_optimizer_that_evaluates_within_a_step(search: str | None) -> None:
    """L-BFGS at density 1 is dense L-BFGS: every evaluation sees the values as they are then."""
    models = [llama(torch.float64) for _ in range(2)]
    sift = SIFT(models[0], 1.0, LINEAR)
    backward(models[0], 0)  # the choice, which L-BFGS has no use for
    dense = [models[1].get_parameter(name) for name in sift.sparse_mapping]
    losses: list[list[float]] = [[], []]
    for model, parameters, seen in zip(models, (list(sift.parameters_in_optimizer()), dense), losses, strict=True):
        optimizer = torch.optim.LBFGS(parameters, max_iter=5, line_search_fn=search)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(**batch(model, 0)).loss
            loss.backward()
            return loss

        seen += [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1


@granularities
def test_an_edited_weight_is_followed(granularity: str) -> None:
    """Pruning, clamping or copying into a weight between steps is not undone by the next one."""
    model, sift, optimizer = start(granularity=granularity)
    with torch.no_grad():
        model.get_parameter(QUERY).zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(2, 3))
    assert not model.get_parameter(QUERY).any()
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, range(3, 4))
    assert model.get_parameter(QUERY).count_nonzero() == sift.sparse_mapping[QUERY].numel()


def test_a_replaced_weight_is_told() -> None:
    """Tying or resizing makes a new parameter, which SIFT does not train."""
    model, _, optimizer = start()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight was replaced.*detach\(\)"):
        train(model, optimizer, range(2, 3))


def test_a_cast_is_told_where_it_rounds() -> None:
    """After training has begun; before it, the values follow."""
    model, _, _ = start()
    with pytest.raises(UnsupportedError, match=r"values of .*proj\.weight were cast to torch\.bfloat16"):
        model.bfloat16()(**batch(model, 0))
    early = llama()
    sift = SIFT(early, 0.1, LINEAR)
    early.bfloat16()
    train(early, torch.optim.AdamW(sift.parameters_in_optimizer()), range(2))
    assert {values.dtype for values in sift.parameters_in_optimizer()} == {torch.float32}


@sliced
def test_a_lent_weight_is_used(granularity: str) -> None:
    """torch.func.functional_call computes with the weights it is given, as for evaluating an average of them."""
    model, plain = start(granularity=granularity)[0], llama()
    plain.load_state_dict(model.state_dict())
    lent = {QUERY: 2 * model.get_parameter(QUERY).detach()}
    for training in (True, False):
        outputs = [functional_call(m.train(training), lent, (), batch(m, 0)).logits for m in (model, plain)]
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], plain(**batch(plain, 0)).logits)


@sliced
def test_a_replaced_forward_is_told(granularity: str) -> None:
    """Rows and blocks would throw away what offloading or a device map has put in its place."""
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    calls = []
    own = layer.forward
    layer.forward = lambda inputs: calls.append(1) or own(inputs)
    sift = SIFT(model, 0.1, LINEAR, granularity=granularity, block_size=BLOCK)
    backward(model, 0)
    with pytest.raises(UnsupportedError, match=r"forward pass of .*q_proj\.weight was replaced"):
        model(**batch(model, 0))
    sift.detach()
    model(**batch(model, 0))
    assert len(calls) == 2


def test_detach_twice() -> None:
    """The second time does nothing, also to a SIFT that has come since."""
    model, sift, _ = start()
    sift.detach()
    again = SIFT(model, 0.1, LINEAR)
    sift.detach()
    names = {name for name, _ in model.named_parameters()}
    assert {f"{name}_sparse" for name in again.sparse_mapping} <= names
    train(model, torch.optim.AdamW(again.parameters_in_optimizer()), range(2))


def test_without_a_record() -> None:
    """keep_base=False trains the same, keeps less, and cannot write an adapter."""
    model, sift, optimizer = start(reselect_every=2, keep_base=False)
    other, _, usual = start(reselect_every=2)
    train(model, optimizer, range(2, 5))
    train(other, usual, range(2, 5))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    kept = [{key for key in o.state_dict()["state"][0] if key.startswith("sparse_")} for o in (optimizer, usual)]
    assert kept[0] < kept[1]
    assert kept[1] - kept[0] == {"sparse_base", "sparse_touched"}
    with pytest.raises(ConfigError, match="keep_base=True"):
        sift.save_adapter("never")
    resumed = llama(seed=5)
    again = SIFT(resumed, 0.1, LINEAR, block_size=BLOCK, reselect_every=2, keep_base=False)
    stepper = torch.optim.AdamW(again.parameters_in_optimizer(), lr=1e-2)
    resumed.load_state_dict(model.state_dict())
    stepper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, stepper)):
        train(m, o, range(5, 8))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_an_evaluation_on_lent_weights_keeps_the_precision_of_the_values() -> None:
    """Averaged weights swapped in for a score and out again: the float32 values go on where they were."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)).to(torch.bfloat16)
    sift = SIFT(model, 0.5, ["weight"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)
    model(torch.randn(4, 16, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    values, own = sift.sparse_mapping["0.weight"], model[0].weight.detach().clone()
    before = values.detach().clone()
    assert not torch.equal(before, before.bfloat16().float())
    with torch.no_grad():
        model[0].weight.copy_(own * 0.5)
        model(torch.randn(4, 16, dtype=torch.bfloat16))
        model[0].weight.copy_(own)
    model(torch.randn(4, 16, dtype=torch.bfloat16))
    assert torch.equal(values, before)
