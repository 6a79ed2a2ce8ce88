"""SIFT on weights that are kept as codes: it trains what SIFT on the decoded weights trains, and nothing is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullrank import SIFT, CheckpointError, ConfigError, FusedBackward, UnsupportedError, load_adapter, memory
from fullrank.coded import is_quantized, layers_with_codes, read_codes
from fullrank.factors.quantize import Quantization, dequantize_

pytest.importorskip("bitsandbytes")
KINDS = ("int8", "nf4", "nf4-double")
kinds = pytest.mark.parametrize("kind", KINDS)
RATE = 0.05
CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "entry": {},
    "row": {"granularity": "row"},
    "block": {"granularity": "block", "block_size": 16},
    "per row": {"scope": "row"},
    "model": {"scope": "model", "selection_batches": 2},
    "magnitude": {"selection": "magnitude", "selection_batches": 3},
    "random": {"selection": "random"},
}


class Net(nn.Module):
    """Two layers of which one has a bias, under a head that trains densely; checkpointed or not."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 5)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x)


def pair(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, Net]:
    """A network of codes, and the plain one that it decodes to."""
    coded = Net(**options).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    quantization = Quantization(kind, CPU)
    assert quantization.apply_(coded, keep={"head"}) == ["up", "down"]
    quantization.unmark_(coded)
    coded.to(dtype)
    plain = copy.deepcopy(coded)
    dequantize_(plain, dtype)
    return coded, plain


def sift_on(model: nn.Module, **settings: Any) -> SIFT:
    return SIFT(model, RATE, ["up", "down"], ["head"], **settings)


def adamw(sift: SIFT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(sift.parameters_in_optimizer(), lr=0.01, weight_decay=0.1)


def batch(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(number)).to(dtype).requires_grad_()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range = range(4),
    *,
    dtype: torch.dtype = torch.float32,
    accumulation: int = 1,
    autocast: bool = False,
) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(batch(step * accumulation + micro, dtype)).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_alike(coded: SIFT, plain: SIFT, tolerance: float) -> None:
    """The same entries with the same values, and nothing else has moved."""
    for name, values in plain.sparse_mapping.items():
        found = coded.sparse_mapping[name]
        assert torch.equal(found.idx, values.idx)
        assert found.dtype == values.dtype
        torch.testing.assert_close(found.detach(), values.detach(), rtol=0, atol=tolerance)
    assert all(part.delta()[1].abs().max() > 0.01 for part in coded.weights)
    for name, weight in plain.dense.items():
        torch.testing.assert_close(coded.dense[name].detach(), weight.detach(), rtol=0, atol=tolerance)


@kinds
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_as_on_the_decoded_weights(kind: str, settings: dict[str, Any]) -> None:
    """The same choice, losses, values and gradients of inputs in float64; afterwards the very same plain model."""
    coded, plain = pair(kind, torch.float64)
    before = {name: read_codes(layer) for name, layer in layers_with_codes(coded).items()}
    sifts = sift_on(coded, **settings), sift_on(plain, **settings)
    losses = [train(model, adamw(sift), dtype=torch.float64) for model, sift in zip((coded, plain), sifts, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_alike(*sifts, 1e-9)
    assert all(torch.equal(read_codes(layer), before[name]) for name, layer in layers_with_codes(coded).items())
    inputs = batch(9, torch.float64), batch(9, torch.float64)
    for model, x in zip((coded, plain), inputs, strict=True):
        model(x).square().mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-9)
    with torch.no_grad():
        output = coded(inputs[0])
    for sift in sifts:
        sift.detach()
    assert [type(layer) for layer in (coded.up, coded.down)] == [nn.Linear] * 2
    assert coded.state_dict().keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(coded.state_dict()[name], weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(coded(inputs[0]), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", ["entry", "row"])
@pytest.mark.parametrize(
    ("reentrant", "accumulation", "autocast"),
    [(None, 2, False), (False, 2, False), (True, 2, False), (None, 1, True), (False, 1, True)],
)
def test_ways_of_training(granularity: str, reentrant: bool | None, accumulation: int, autocast: bool) -> None:
    """Under accumulation, checkpointing of both kinds and autocast."""
    found = []
    for model in pair("nf4", reentrant=reentrant):
        sift = sift_on(model, granularity=granularity, gradient_checkpointing=reentrant is True)
        losses = train(model, adamw(sift), accumulation=accumulation, autocast=autocast)
        found.append((sift, losses))
    tolerance = 0.02 if autocast else 1e-4
    assert found[0][1] == pytest.approx(found[1][1], rel=tolerance)
    assert_alike(found[0][0], found[1][0], tolerance)


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_what_is_held(granularity: str) -> None:
    """Between the passes the inputs of a layer alone; after them the values' gradients alone."""
    coded, _ = pair("nf4")
    sift = sift_on(coded, granularity=granularity)
    train(coded, adamw(sift), range(1))
    kept: list[Tensor] = []
    saving = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with saving:
        loss = coded.up(batch(1)).sum()
    others = {values.untyped_storage().data_ptr() for values in sift.sparse_mapping.values()}
    others |= {values.idx.untyped_storage().data_ptr() for values in sift.sparse_mapping.values()}
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in others]
    assert [tuple(tensor.shape) for tensor in new] == [(2, 3, 64)]
    loss.backward()
    assert sift.weights[0].leaf.grad is None
    assert sift.weights[0].leaf.untyped_storage().nbytes() == 4
    assert coded.up.weight.grad is None
    grads = [p.grad for p in coded.parameters() if p.grad is not None]
    assert sum(grad.numel() for grad in grads) == sift.weights[0].values.numel() + sift.weights[1].values.numel()


@kinds
def test_the_sum_of_bytes(kind: Any) -> None:
    """States are those of plain weights; of the weights the codes and values count."""
    coded, plain = pair(kind)
    found = []
    for model in (coded, plain):
        weights = memory.weight_bytes(model)
        sift = sift_on(model)
        optimizer = adamw(sift)
        train(model, optimizer, range(1))
        values = sum(4 * part.values.numel() for part in sift.weights)
        found.append((memory.held_state_bytes(optimizer), memory.weight_bytes(model) - weights - values))
    assert found[0] == (found[1][0], 0)


@kinds
@pytest.mark.parametrize("granularity", ["entry", "block"])
def test_resume(kind: Any, granularity: str) -> None:
    """Bit for bit, from a state dict of the model and one of the optimizer; one of the model alone has it all too."""
    settings = SETTINGS[granularity]

    def make() -> tuple[Net, SIFT, Any]:
        model, _ = pair(kind)
        sift = sift_on(model, **settings)
        return model, sift, adamw(sift)

    model, sift, optimizer = make()
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(2, 5))
    other, other_sift, other_optimizer = make()
    with torch.no_grad():
        other.head.weight.zero_()
    names = sorted(saved[0])
    for part in (names[::2], names[1::2]):  # as from two files
        other.load_state_dict({name: saved[0][name].clone() for name in part}, strict=False)
    x = batch(20)
    restored, _, _ = make()
    assert restored.load_state_dict(saved[0]) is not None
    assert torch.equal(other(x), restored(x))
    assert not torch.equal(other(x), model(x))
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, range(2, 5))
    assert torch.equal(other(x), model(x))
    for name, values in sift.sparse_mapping.items():
        assert torch.equal(values, other_sift.sparse_mapping[name])
    model.load_state_dict(saved[0])  # the best model of a run comes back so
    assert torch.equal(model(x), restored(x))


def test_a_state_of_another_choice_is_refused() -> None:
    """Codes cannot hold it; a state from before any choice takes back what was trained."""
    models = [pair("int8")[0] for _ in range(2)]
    sifts = [sift_on(model, selection="random", seed=seed) for seed, model in enumerate(models)]
    first = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    x = batch(3)
    output = models[0](x)
    for model, sift in zip(models, sifts, strict=True):
        train(model, adamw(sift), range(1))
    with pytest.raises(CheckpointError, match=r"at other entries of up\.weight than those that train here"):
        models[0].load_state_dict(models[1].state_dict())
    models[0].load_state_dict(first)
    torch.testing.assert_close(models[0](x), output)
    rows = sift_on(pair("int8")[0], granularity="row")
    with pytest.raises(
        CheckpointError, match=r"entries of up\.weight by entry of \(128, 64\), this SIFT has them by row"
    ):
        rows.model.load_state_dict(models[1].state_dict())


def test_a_copy_trains_by_itself() -> None:
    model, _ = pair("nf4-double")
    sift = sift_on(model)
    optimizer = adamw(sift)
    train(model, optimizer, range(2))
    twin, twin_sift, twin_optimizer = copy.deepcopy((model, sift, optimizer))
    x = batch(7)
    before = model(x)
    assert torch.equal(twin(x), before)
    train(twin, twin_optimizer, range(2, 4))
    assert torch.equal(model(x), before)
    train(model, optimizer, range(2, 4))
    assert torch.equal(model(x), twin(x))
    for name, values in sift.sparse_mapping.items():
        assert torch.equal(values, twin_sift.sparse_mapping[name])


def test_update_during_backward() -> None:
    losses = []
    for is_fused in (False, True):
        model, _ = pair("int8")
        optimizer = adamw(sift_on(model))
        if is_fused:
            FusedBackward(optimizer, model=model)
        losses.append(train(model, optimizer))
    assert losses[0] == losses[1]


def test_by_hand_and_by_a_function() -> None:
    """A function is shown the decoded weight."""
    coded, plain = pair("nf4")
    seen: list[Tensor] = []

    def choose(name: str, weight: Tensor, grad: Tensor, num: int) -> Tensor:
        seen.append(weight)
        assert weight.shape == grad.shape
        return torch.arange(num)

    sift = sift_on(coded, selection=choose)
    sift.sparse_mapping["down.weight"].idx = [5, 3, 77]
    train(coded, adamw(sift), range(2))
    assert sift.sparse_mapping["down.weight"].idx.tolist() == [3, 5, 77]
    assert torch.equal(seen[0], plain.up.weight)
    assert len(sift.sparse_mapping["up.weight"]) == int(RATE * 128 * 64) + 1


def test_adapters_fit_the_base_as_it_was(tmp_path: Path) -> None:
    """The differences to the decoded weights, under the fingerprint of the weights before they became codes."""
    base = Net()
    model, plain = pair("int8")
    sift = sift_on(model)
    train(model, adamw(sift))
    sift.save_adapter(tmp_path, dtype="float32")
    sift.detach()
    adapter = load_adapter(tmp_path)
    before = base.up.weight.detach().clone()
    adapter.apply(base)
    change = model.up.weight - plain.up.weight
    torch.testing.assert_close(base.up.weight - before, change, rtol=0, atol=1e-6)
    assert (change != 0).sum() == int(RATE * 128 * 64) + 1
    with pytest.raises(ConfigError, match="trained from another base"):
        load_adapter(tmp_path).apply(plain)


def test_numbers_that_are_told() -> None:
    coded, plain = pair("nf4")
    assert sift_on(coded).describe() == (other := sift_on(plain)).describe()
    assert other.total_num == 128 * 64 * 2 + 128 + 64 * 5 + 5
    half, _ = pair("nf4", torch.bfloat16)
    sift = sift_on(half)
    assert {part.dtype for part in sift.weights} == {torch.bfloat16}
    train(half, adamw(sift), range(1), dtype=torch.bfloat16)
    assert {part.base.dtype for part in sift.weights} == {torch.bfloat16}  # type: ignore[union-attr]
    sift.detach()
    assert half.up.weight.dtype == torch.bfloat16


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"reselect_every": 3}, UnsupportedError, r"reselect_every 3 lets entries leave the choice.*Set it to null"),
    ({"exception": ["head", "down"]}, ConfigError, r"down\.weight is kept as codes, which cannot train densely"),
    ({"granularity": "block", "block_size": 48}, ConfigError, r"block_size must divide both sides of up\.weight"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED)
def test_refused(settings: dict[str, Any], error: Any, message: str) -> None:
    model, _ = pair("int8")
    with pytest.raises(error, match=message):
        SIFT(model, RATE, ["up", "down"], **({"exception": ["head"]} | settings))
    assert not any(name.endswith("_sparse") for name, _ in model.named_parameters())


def test_layers_that_cannot_be_replaced_are_refused() -> None:
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), nn.Linear(64, 2))
    assert is_quantized(model[0].weight)
    with pytest.raises(ConfigError, match=r"0\.weight has no codes yet.*Move the model there"):
        SIFT(model, RATE, ["0"])
    hooked, _ = pair("int8")
    hooked.down.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"the forward pass of down\.weight was replaced already"):
        sift_on(hooked)
    assert not any(name.endswith("_sparse") for name, _ in hooked.named_parameters())
    shared, _ = pair("int8")
    shared.again = shared.up
    with pytest.raises(ConfigError, match=r"up\.weight is kept as codes and in several places"):
        SIFT(shared, RATE, ["up.weight"])


# What a plain weight would hold is here in the values alone.


def trained() -> tuple[Net, SIFT]:
    model, _ = pair("nf4")
    sift = sift_on(model)
    train(model, adamw(sift))
    return model, sift


def test_an_optimizer_state_of_before_any_step_takes_nothing_away() -> None:
    """That of an optimizer for a second phase: moments start anew, what was learned stays."""
    model, sift = trained()
    wanted, second = model(batch(9)), adamw(sift)
    twin, _ = pair("nf4")
    twin_sift = sift_on(twin)
    twin_second = adamw(twin_sift)
    twin.load_state_dict(model.state_dict())
    for optimizer, of in ((twin_second, twin), (second, model)):
        optimizer.load_state_dict(copy.deepcopy(second.state_dict()))
        assert torch.equal(of(batch(9)), wanted)
    losses = [train(of, optimizer) for of, optimizer in ((twin, twin_second), (model, second))]
    assert losses[0] == losses[1]


def test_a_state_without_entries_is_not_all() -> None:
    """Codes of before the choice, under values that were trained, would be neither."""
    before = pair("nf4")[0]
    bare = copy.deepcopy(before.state_dict())
    model, _ = trained()
    with pytest.raises(RuntimeError, match=r"up\.sparse_layout"):
        model.load_state_dict(bare)
    sift = sift_on(before)
    assert before.load_state_dict(bare).missing_keys == []  # nothing is chosen yet
    unchosen = copy.deepcopy(before.state_dict())
    train(before, adamw(sift))
    before.load_state_dict(unchosen)
    torch.testing.assert_close(before(batch(9)), pair("nf4")[0](batch(9)))


def test_parts_of_one_state_are_not_taken_for_those_of_another() -> None:
    model, _ = trained()
    fresh, _ = pair("nf4")
    sift_on(fresh)
    wanted = copy.deepcopy(fresh.state_dict())
    halves = {name: tensor for name, tensor in model.state_dict().items() if "layout" not in name}
    fresh.load_state_dict(halves, strict=False)  # one file of two, and the other never comes
    fresh.load_state_dict(wanted)
    torch.testing.assert_close(fresh(batch(9)), pair("nf4")[0](batch(9)))


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_a_graph_of_before_a_step_is_refused(granularity: str) -> None:
    """Also where a fused kernel has made the step."""
    model, _ = pair("int8")
    sift = sift_on(model, granularity=granularity)
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=0.01, fused=True)
    train(model, optimizer)
    late = model.up(batch(1)).sum()
    model(batch(0)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_two_passes_before_the_choice_under_checkpointing() -> None:
    """The second is computed again when there are entries already."""
    found = []
    for model in pair("nf4", reentrant=False):
        sift = sift_on(model)
        losses = [model(batch(number)).square().mean() for number in range(2)]
        for loss in losses:
            loss.backward()
        found.append(sift)
    for name, values in found[1].sparse_mapping.items():
        assert values.grad is not None
        torch.testing.assert_close(found[0].sparse_mapping[name].grad, values.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_cast_model_stays_one(is_late: bool) -> None:
    """Before the choice it trains on; after it ``detach`` leaves a model of the new type."""
    model, _ = pair("nf4")
    sift = sift_on(model)
    if not is_late:
        model.to(torch.bfloat16)
    train(model, adamw(sift), dtype=torch.float32 if is_late else torch.bfloat16)
    model.to(torch.bfloat16)
    sift.detach()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(batch(0, torch.bfloat16)).isfinite().all()
