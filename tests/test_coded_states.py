"""States of models whose layers are kept as codes: what is loaded is whole, and what cannot be codes is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fullrank import SIFT, CheckpointError, ConfigError
from fullrank.coded import accept_states, layers_with_codes, read_codes
from fullrank.factors.quantize import Quantization, dequantize_
from fullrank.train.export import export

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*_check_is_size")
kinds = pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
LOADED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4-in-bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.float32,
    },
}
loaded_by_transformers = pytest.mark.parametrize("options", LOADED.values(), ids=LOADED)


def net(kind: Any, seed: int = 0) -> nn.Sequential:
    """Two layers, as codes if a kind is given, under a plain head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 3))
    if kind is not None:
        Quantization(kind, torch.device("cpu")).apply_(model, keep={"2"})
    return model


def decoded(model: nn.Module) -> dict[str, Tensor]:
    return {name: read_codes(layer) for name, layer in layers_with_codes(model).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@kinds
@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_are_refused_by_a_layer_of_codes(kind: str, strict: bool) -> None:
    model = net(kind)
    before = decoded(model)
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in net(None, seed=1).state_dict().items()}
        with pytest.raises(CheckpointError, match=r"0\.weight is kept as codes.*dequantize_"):
            model.load_state_dict(state, strict=strict)
    assert_same(decoded(model), before)


@kinds
def test_codes_are_never_taken_without_what_decodes_them(kind: Any) -> None:
    model, other = net(kind), net(kind, seed=1)
    before, state = decoded(model), other.state_dict()
    statistics = [name for name in state if name.startswith("0.") and name not in ("0.weight", "0.bias")]
    statistics = [name for name in statistics if not name.endswith("weight_format")]
    without = {name: tensor for name, tensor in state.items() if name not in statistics}
    with pytest.raises(RuntimeError, match=f"Missing key.*{statistics[-1]}"):
        model.load_state_dict(without)
    assert torch.equal(decoded(model)["0.weight"], before["0.weight"])
    missing = model.load_state_dict({"0.weight": state["0.weight"]}, strict=False).missing_keys
    assert set(statistics) <= set(missing)
    assert "0.weight" not in missing
    assert torch.equal(decoded(model)["0.weight"], before["0.weight"])
    model.load_state_dict({name: state[name] for name in statistics}, strict=False)  # the other file
    assert torch.equal(decoded(model)["0.weight"], decoded(other)["0.weight"])


@kinds
def test_a_whole_state_forgets_what_was_left_of_others(kind: Any) -> None:
    """Codes whose scales never came stay out of every later state."""
    model, first, second = net(kind), net(kind, seed=1).state_dict(), net(kind, seed=2)
    model.load_state_dict({"0.weight": first["0.weight"]}, strict=False)
    model.load_state_dict(second.state_dict())
    statistics = [name for name in first if name.startswith("0.") and name not in ("0.weight", "0.bias")]
    model.load_state_dict({name: first[name] for name in statistics}, strict=False)
    assert_same(decoded(model), decoded(second))


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_the_models_own(kind: Any, assign: bool) -> None:
    """A forward pass moves the codes of 8 bits elsewhere; a state comes back before and after it."""
    model, other = net(kind), net(kind, seed=1)
    state = copy.deepcopy(other.state_dict())
    for _ in range(2):
        model.load_state_dict(state, assign=assign)
        assert_same(decoded(model), decoded(other))
        model(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
        model.load_state_dict(net(kind).state_dict())


def test_codes_of_another_size_are_refused() -> None:
    model = net("nf4")
    wide = nn.Sequential(nn.Linear(128, 128))
    Quantization("nf4", torch.device("cpu")).apply_(wide)
    with pytest.raises(CheckpointError, match=r"0\.weight is kept as codes"):
        model.load_state_dict(wide.state_dict(), strict=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(path)
    return path


def loaded(folder: Path, options: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def train(model: Any) -> SIFT:
    sift = SIFT(model, 0.05, ["mlp"])
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=0.01)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return sift


IDS = torch.arange(8).view(1, 8)


@loaded_by_transformers
def test_models_of_transformers_load_their_states(options: dict[str, Any], folder: Path) -> None:
    """Of all layers, though SIFT trains some: with its entries, or with the codes alone."""
    model, other = loaded(folder, options), loaded(folder, options)
    codes = copy.deepcopy(other.state_dict())
    train(model)
    SIFT(other, 0.05, ["mlp"])
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    other.eval()
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    untrained = loaded(folder, options)
    accept_states(untrained)
    untrained.load_state_dict(codes)


@loaded_by_transformers
def test_a_decoded_model_of_transformers_is_a_plain_one(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, options)
    train(model).detach()
    dequantize_(model, torch.float32)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {type(module) for module in again.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.to(torch.float64)  # transformers forbids it of a quantized one


def test_an_adapter_on_a_checkpoint_of_codes_is_refused(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, LOADED["nf4"])
    sift = train(model)
    sift.save_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "fullrank.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint.* keeps its weights in parts.*without an adapter"):
        export(str(tmp_path / "checkpoint"), str(tmp_path / "out"), adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()
