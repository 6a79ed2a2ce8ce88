"""Restarts over bitsandbytes' 4-bit and 8-bit weights: what they store is what they compute with, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank import ConfigError, ReLoRA
from fullrank.factors.quantized import QuantizedPair
from tests.restarting import through_a_file, trainable

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*is lost to the weights' type", "ignore:MatMul8bitLt")

ROWS, COLUMNS = 96, 64
"""bitsandbytes' inference on CPUs wants rows in multiples of 32."""
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4-double": {"quant_type": "fp4", "compress_statistics": True},
    "nf4-in-bfloat16": {"quant_type": "nf4", "compress_statistics": False, "quant_storage": torch.bfloat16},
    "int8": {},
}
STEP = {"int8": 0.5 / 127, "nf4": 0.5 * (1 - 0.6962), "fp4": 0.5 / 3}
"""Half the widest gap of each grid, relative to the largest entry of a block."""
formats = pytest.mark.parametrize("form", FORMATS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


class Model(nn.Module):
    """One quantized layer with a bias under a plain one."""

    def __init__(self, form: str, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            plain, self.head = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 4)
        if form == "int8":
            self.is_loaded_in_8bit = True
            self.layer = bitsandbytes.nn.Linear8bitLt(COLUMNS, ROWS, has_fp16_weights=False)
        else:
            self.is_loaded_in_4bit = True
            self.layer = bitsandbytes.nn.Linear4bit(COLUMNS, ROWS, compute_dtype=torch.float32, **FORMATS[form])
        self.layer.load_state_dict(plain.state_dict())
        self.layer = self.layer.to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())


def made(form: str, *, restart_every: int = 5, seed: int = 0) -> tuple[Any, torch.optim.Optimizer, ReLoRA]:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(Model(form, seed), LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]))
    for parameter in model.get_base_model().head.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    return model, optimizer, ReLoRA(model, optimizer, restart_every=restart_every, restart_warmup_steps=1)


def inputs(number: int = 0) -> Tensor:
    return torch.randn(16, COLUMNS, generator=torch.Generator().manual_seed(number))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range, relora: ReLoRA | None = None) -> list[float]:
    """The plain loop on one batch with fixed targets."""
    losses, target = [], torch.randn(16, 4, generator=torch.Generator().manual_seed(5))
    for _ in steps:
        optimizer.zero_grad()
        loss = (model(inputs()) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if relora is not None:
            relora.step()
    return losses


def base_of(relora: ReLoRA) -> Any:
    return relora.pairs[0].layer.get_base_layer()  # type: ignore[attr-defined]


@torch.no_grad()
def weight_of(base: Any) -> Tensor:
    """The weight that a layer computes with: what it makes of the unit vectors, in training mode."""
    was_training = base.training
    base.train()
    columns = base(torch.eye(COLUMNS, requires_grad=True)) - base.bias
    base.train(was_training)
    return columns.t().float()


def block_maxima(weight: Tensor, form: str) -> Tensor:
    """The largest size in each entry's block: 64 entries, or a row of 8-bit weights."""
    if form == "int8":
        return weight.abs().amax(1, keepdim=True).expand_as(weight)
    return weight.reshape(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(weight.shape)


@formats
def test_the_decoded_weight_is_the_layers(form: str) -> None:
    """Before and after the first forward pass, which moves the codes of 8-bit weights."""
    _, _, relora = made(form)
    pair = relora.pairs[0]
    assert isinstance(pair, QuantizedPair)
    assert pair.shape == (ROWS, COLUMNS)
    first = pair.read().clone()
    assert first.shape == (ROWS, COLUMNS)
    assert first.dtype == torch.float32
    torch.testing.assert_close(weight_of(base_of(relora)), first, rtol=0, atol=1e-4)
    assert torch.equal(pair.read(), first)


@modes
@formats
def test_a_merge_is_the_sum_on_the_weights_grid(form: str, training: bool) -> None:
    """Each entry within half a step of it; the layer computes with it; the reported error is the measured one."""
    model, optimizer, relora = made(form)
    pair, base = relora.pairs[0], base_of(relora)
    train(model, optimizer, range(4))
    kept, update = weight_of(base), pair.update()
    model.train(training)
    if not training:
        with torch.no_grad():
            model(inputs())  # in inference bitsandbytes may lay the codes out anew
    restart = relora.after_step(5)
    assert restart is not None
    found, meant = weight_of(base), kept + update
    bound = STEP[form.split("-", maxsplit=1)[0]] * block_maxima(meant, form)
    slack = 1.1 if "double" in form else 1.02  # the scales themselves are rounded
    assert ((found - meant).abs() <= slack * bound + 1e-4).all()
    error = (found - meant).norm().item()
    assert restart.merge.update == pytest.approx(update.norm().item(), rel=1e-5)
    assert restart.merge.error == pytest.approx(error, rel=2e-2)
    assert 0.0 < restart.merge.relative_error < 3.0
    assert (found - meant).norm() < 0.2 * meant.norm()
    torch.testing.assert_close(found, pair.read(), rtol=0, atol=1e-4)
    with torch.no_grad():
        plain = inputs() @ found.t() + base.bias
        model.train()
        torch.testing.assert_close(base(inputs().requires_grad_()), plain, rtol=1e-3, atol=1e-3 * plain.abs().max())


@formats
def test_an_update_of_nothing_changes_nothing(form: str) -> None:
    """Decoding and encoding again is no loss: B is zero right after a restart."""
    model, optimizer, relora = made(form)
    train(model, optimizer, range(5), relora)
    before = weight_of(base_of(relora))
    relora.restart()
    change = (weight_of(base_of(relora)) - before).norm() / before.norm()
    assert change < (1e-6 if "double" not in form else 5e-3)


@formats
def test_training_goes_on_after_restarts(form: str) -> None:
    """The loss falls in every cycle after the first too; factors and head are the only parameters that train."""
    model, optimizer, relora = made(form, restart_every=10)
    parameters = [id(parameter) for parameter in model.parameters()]
    losses = train(model, optimizer, range(45), relora)
    assert relora.num_steps == 45
    assert relora.last_restart is not None
    assert relora.last_restart.step == 40
    for cycle in range(4):
        assert losses[10 * cycle + 9] < losses[10 * cycle + 1]
    assert losses[44] < 0.5 * losses[0]
    pair = relora.pairs[0]
    assert pair.a.grad is not None
    assert pair.b.grad.abs().sum() > 0
    assert not pair.weight.requires_grad
    assert [id(parameter) for parameter in model.parameters()] == parameters


@formats
def test_the_function_moves_by_the_error_alone(form: str) -> None:
    model, optimizer, relora = made(form)
    train(model, optimizer, range(5))
    base = base_of(relora)
    layer = relora.pairs[0].layer  # type: ignore[attr-defined]
    with torch.no_grad():
        before = layer(inputs())
        restart = relora.after_step(5)
        after = layer(inputs())
    assert restart is not None
    moved = (after - before).norm().item()
    longest = torch.linalg.matrix_norm(inputs(), 2).item()
    assert 0 < moved <= restart.merge.error * longest + 1e-3 * before.norm().item()
    assert base.bias is not None


@formats
def test_a_merged_weight_is_saved_and_loaded(form: str) -> None:
    """Through ``state_dict``: another layer then computes the same."""
    model, optimizer, relora = made(form)
    train(model, optimizer, range(7), relora)
    assert relora.last_restart is not None
    wanted = weight_of(base_of(relora))
    state = through_a_file(base_of(relora).state_dict())
    other = Model(form, seed=3).layer
    assert not torch.allclose(weight_of(other), wanted, atol=1e-2)
    fresh = Model(form, seed=3).layer
    if form == "int8":
        fresh.load_state_dict(state)
    else:
        parts = {name.removeprefix("weight."): value for name, value in state.items() if name.startswith("weight.")}
        fresh.weight = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu")
    torch.testing.assert_close(weight_of(fresh), wanted, rtol=0, atol=1e-5)


@modes
@formats
def test_a_stored_weight_is_taken_back(form: str, training: bool) -> None:
    """By another model, before or after its first forward pass; it then goes on as the first one does, bit for bit."""
    model, optimizer, relora = made(form)
    train(model, optimizer, range(7), relora)
    model.train(training)
    with torch.no_grad():
        model(inputs())
    stored = through_a_file(relora.pairs[0].stored())
    other, _, again = made(form, seed=3)
    if not training:
        with torch.no_grad():
            other.eval()(inputs())
    again.pairs[0].restore_(stored)
    wanted = weight_of(base_of(again))
    torch.testing.assert_close(wanted, again.pairs[0].read(), rtol=0, atol=1e-4)
    assert torch.equal(again.pairs[0].read(), relora.pairs[0].read())
    for pair in (relora.pairs[0], again.pairs[0]):
        with torch.no_grad():
            pair.a.fill_(0.01)
            pair.b.fill_(0.1)
        pair.merge_()
    assert torch.equal(again.pairs[0].read(), relora.pairs[0].read())
    merged = weight_of(base_of(again))
    torch.testing.assert_close(merged, weight_of(base_of(relora)), rtol=0, atol=1e-6)
    assert (merged - wanted).norm() > 1e-3


def test_double_quantization_costs_little_more() -> None:
    errors = {}
    for form in ("nf4", "nf4-double", "int8"):
        model, optimizer, relora = made(form)
        train(model, optimizer, range(5), relora)
        assert relora.last_restart is not None
        errors[form] = relora.last_restart.merge.error
    assert errors["int8"] < 0.1 * errors["nf4"]
    assert errors["nf4-double"] == pytest.approx(errors["nf4"], rel=0.1)


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_weight_cannot_be_warm_started(form: str) -> None:
    model, _, _ = made(form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()])
    with pytest.raises(ConfigError, match=r"layer is quantized, so it cannot train full-rank. Set warm_start_steps to"):
        ReLoRA(model, optimizer, restart_every=5, restart_warmup_steps=1, warm_start_steps=2)
