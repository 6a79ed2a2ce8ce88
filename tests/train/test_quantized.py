"""Runs on a base kept as codes: what is stored, resumed and exported is what the run computed with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fullrank import METHODS, memory
from fullrank.cli import is_news, main
from fullrank.coded import codes_of, keep_codes_, read_codes
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.factors.quantize import Quantization, dequantize_, statistic_bytes
from fullrank.ops.codes import coded_layers, decode, decoded_shape
from fullrank.train import run as runs
from fullrank.train.coded import keep_as_codes
from fullrank.train.load import load_trained
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.weights import read_weights
from tests.train.finetuning import (
    ON_FACTORS,
    classification,
    instructions,
    write_base,
    write_encoder,
    write_rows,
    write_sst2,
)
from tests.train.tiny import assert_same_run, recipe, trajectory, weights, write_text

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is lost to the weights' type", "ignore:MatMul8bitLt", "ignore:.*_check_is_size"
)
KINDS = ("int8", "nf4", "nf4-double")
CPU = torch.device("cpu")
WORST = {"int8": 0.005, "nf4": 0.16, "nf4-double": 0.17}
"""Half the widest gap of each grid, of the largest entry of a row or block, and a little."""


class Two(nn.Module):
    """A layer with a bias under a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.head = nn.Linear(128, 96), nn.Linear(96, 4)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_a_command_is_silent_on_the_cast_of_inputs(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes speaks of it in each pass of each layer (on a CPU in evaluation); what else it says is shown."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.removeFilter(is_news)
    model = coded("int8").bfloat16().eval()
    inputs = torch.ones(2, 128, dtype=torch.bfloat16)
    try:
        model(inputs)
        assert "cast from torch.bfloat16 to float16" in caplog.text
        caplog.clear()
        main(["--version"])
        model(inputs)
        logger.warning("something else")
        assert caplog.messages == ["something else"]
    finally:
        logger.removeFilter(is_news)


def coded(kind: Any) -> Two:
    model = Two()
    quantization = Quantization(kind, CPU)
    assert quantization.apply_(model, keep={"head"}) == ["body"]
    quantization.unmark_(model)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model and rows to fine-tune it on."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = AutoTokenizer.from_pretrained(write_base(folder / "narrow"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base", write_rows(folder / "rows.json")


def content(made: tuple[Path, Path], folder: Path, kind: str, method: str = "lora", **trainer: Any) -> dict[str, Any]:
    base, rows = made
    found = instructions(base, rows, folder, method, num_train_epochs=1, **trainer)
    found["model"]["quantization"] = kind
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_layer_is_close_to_the_plain_one_and_comes_back(kind: Any) -> None:
    plain, model = Two(), coded(kind)
    layer: Any = model.body
    decoded = read_codes(layer)
    assert (decoded - plain.body.weight).abs().max() <= WORST[kind] * plain.body.weight.abs().max()
    assert torch.equal(layer.bias, plain.body.bias)
    assert type(model.head) is nn.Linear
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    exact = nn.functional.linear(x, decoded, layer.bias)
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=0.02 * exact.abs().max().item())
    dequantize_(model, torch.float32)
    assert type(model.body) is nn.Linear
    assert torch.equal(model.body.weight, decoded)
    assert torch.equal(model.body.bias, plain.body.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_carries_the_codes_and_what_decodes_them(kind: Any) -> None:
    """Into a model whose own codes are others: both come, also from a state dict that is in two parts."""
    one, other = coded(kind), Two()
    with torch.no_grad():
        other.body.weight.mul_(3.0).add_(0.1)
    quantization = Quantization(kind, CPU)
    quantization.apply_(other, keep={"head"})
    quantization.unmark_(other)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    other(x)  # after it the codes of 8-bit weights lie elsewhere
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(read_codes(other.body), read_codes(one.body))
    assert torch.equal(other(x), one(x))
    with torch.no_grad():
        keep_codes_(other.body, codes_of(coded(kind).body) | {"weight": torch.zeros_like(codes_of(one.body)["weight"])})
    names = sorted(state)
    for part in (names[:2], names[2:]):
        other.load_state_dict({name: state[name] for name in part}, strict=False)
    assert torch.equal(read_codes(other.body), read_codes(one.body))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_decoded_from_stored_tensors(kind: Any) -> None:
    model = coded(kind)
    state = model.state_dict()
    assert list(coded_layers(state)) == ["body."]
    tensors = {name: state[f"body.{name}"] for name in coded_layers(state)["body."]}
    torch.testing.assert_close(decode(tensors), read_codes(model.body), rtol=1e-6, atol=1e-6)
    assert decoded_shape(tensors, tuple(tensors["weight"].shape)) == (96, 128)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8 + 32 / 128), ("nf4", 4 + 32 / 64), ("nf4-double", 4 + 8 / 64)])
def test_weight_bytes_count_codes_and_what_decodes_them(kind: Any, bits: float) -> None:
    """The tables of a layer (at most 2 KiB here) beside."""
    model = coded(kind)
    others = sum(p.numel() * 4 for p in (*model.head.parameters(), model.body.bias))
    tables = memory.weight_bytes(model) - others - 96 * 128 * bits / 8
    assert 0 <= tables <= 2048
    assert statistic_bytes(Two()) == 0


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4-double"])
def test_a_lora_run_on_codes(kind: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    """It learns; its model is the decoded base with the factors added; its adapter fits the base as it was."""
    result = runs.finetune(resolve(content(made, tmp_path / "run", kind)))
    assert result is not None
    assert result["scores"]["loss"] < 0.5 * result["scores_before"]["loss"]
    plain = load_file(made[0] / "model.safetensors")
    trained = weights(tmp_path / "run")
    assert trained.keys() == plain.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    stored = read_weights(last)
    for name, tensor in trained.items():
        assert stored.shapes[name] == tuple(tensor.shape)
        torch.testing.assert_close(stored.read(name).float(), tensor, rtol=0, atol=1e-6)
    from_checkpoint = load_trained(str(last)).model.state_dict()
    torch.testing.assert_close(dict(from_checkpoint), trained, rtol=0, atol=1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    adapted = load_trained(str(made[0]), adapter=str(tmp_path / "run" / "adapter")).model.state_dict()
    update = adapted[name] - plain[name]
    decoded = trained[name] - update
    assert (decoded - plain[name]).abs().max() <= WORST[kind] * plain[name].abs().max()
    assert not torch.allclose(decoded, plain[name], atol=1e-6)
    assert update.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nf4", {"method.granularity": "row", "trainer.gradient_checkpointing": True}),
        pytest.param("int8", {}, marks=pytest.mark.slow),
    ],
)
def test_a_sift_run_on_codes(kind: str, changes: dict[str, Any], made: tuple[Path, Path], tmp_path: Path) -> None:
    """It learns; checkpoints and model are the decoded base with the entries put in; the adapter has these alone."""
    result = runs.finetune(resolve(content(made, tmp_path / "run", kind, "sift"), changes))
    assert result is not None
    assert result["scores"]["loss"] < 0.5 * result["scores_before"]["loss"]
    assert result["optimizer_state_bytes"] == result["optimizer_state_peak_bytes"]
    plain, trained = load_file(made[0] / "model.safetensors"), weights(tmp_path / "run")
    kinds = [{name: (t.shape, t.dtype) for name, t in one.items()} for one in (trained, plain)]
    assert kinds[0] == kinds[1]
    last = tmp_path / "run" / "checkpoint-10"
    stored = read_weights(last)
    assert stored.shapes.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(stored.read(name).float(), tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(dict(load_trained(str(last)).model.state_dict()), trained, rtol=0, atol=1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    adapted = load_trained(str(made[0]), adapter=str(tmp_path / "run" / "adapter")).model.state_dict()
    update = adapted[name] - plain[name]
    assert 0.1 < (update != 0).float().mean() < 0.4  # of a density of 0.3
    rounding = (trained[name] - update - plain[name]).abs().max()
    assert 0 < rounding <= WORST[kind] * plain[name].abs().max() + 1e-3


@pytest.mark.slow
def test_a_resumed_sift_run_is_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit, under autocast and update during backward; the best model comes back with its entries."""
    steps = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    changes = {"trainer.bf16": True, "trainer.fused_backward": True, "trainer.load_best_model_at_end": True}
    given = content(made, tmp_path / "whole", "nf4-double", "sift", **steps)
    runs.finetune(resolve(given, changes))
    config = resolve(given | {"output_dir": str(tmp_path / "part")}, changes)
    runs.finetune(config)
    shutil.rmtree(tmp_path / "part" / "checkpoint-10")
    (tmp_path / "part" / "result.json").unlink()
    assert runs.finetune(config, resume=True) is not None
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_a_classifier_whose_exceptions_stay_plain(tmp_path: Path) -> None:
    """The layer of an exception trains densely, so it is not kept as codes; the best model comes back."""
    given = classification(
        write_encoder(tmp_path / "encoder"),
        write_sst2(tmp_path / "data"),
        tmp_path / "run",
        "sift",
        num_train_epochs=3,
    )
    given["model"]["quantization"] = "int8"
    given["method"] |= {"target_modules": ["attention"], "exception": ["classifier", "output.dense", "pooler"]}
    result = runs.finetune(resolve(given))
    assert result is not None
    kept = tmp_path / "run" / f"checkpoint-{result['kept_step']}"
    codes = {name for name, tensor in load_file(kept / "model.safetensors").items() if tensor.dtype == torch.int8}
    assert any("intermediate.dense" in name for name in codes)
    assert not any("output.dense" in name or "classifier" in name for name in codes)
    stored = read_weights(kept)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(stored.read(name).float(), tensor, rtol=0, atol=1e-6)


def test_layers_that_are_not_linear_stay_plain(tmp_path: Path) -> None:
    """GPT-2's, beside whose only linear layer, the head, there is nothing to keep as codes."""
    network = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=64, n_layer=1, n_head=2, n_positions=16))
    config: Any = SimpleNamespace(model=SimpleNamespace(quantization="int8"), method=METHODS["sift"].config())
    with pytest.raises(ConfigError, match=r"takes linear layers, and GPT2LMHeadModel has none but what trains"):
        keep_as_codes(network, METHODS["sift"], config, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_a_resumed_run_is_the_same(kind: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit, with codes that restarts have changed, and the export of these is the model that was scored."""
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    whole = content(made, tmp_path / "whole", kind, "relora", **options)
    runs.finetune(resolve(whole))
    config = resolve(whole | {"output_dir": str(tmp_path / "part")})
    runs.finetune(config)
    for path in (tmp_path / "part").glob("checkpoint-*"):
        if path.name != "checkpoint-8":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (tmp_path / "part" / "result.json").unlink()
    assert runs.finetune(config, resume=True) is not None
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert not (tmp_path / "part" / "adapter").exists()
    scored = read_metrics(tmp_path / "whole")[-1]["eval_loss"]
    again = resolve(
        content((tmp_path / "whole" / "model", made[1]), tmp_path / "again", kind)
        | {"model": {"name": str(tmp_path / "whole" / "model")}},
        {"trainer.max_steps": 1},
    )
    runs.finetune(again)
    assert trajectory(tmp_path / "again")[0]["eval_loss"] == pytest.approx(scored, rel=0.02)


@pytest.mark.slow
def test_fira_on_factors_over_codes(made: tuple[Path, Path], tmp_path: Path) -> None:
    given = content(made, tmp_path / "run", "nf4", "fira")
    given["method"] = {"name": "fira", **ON_FACTORS}
    result = runs.finetune(resolve(given))
    assert result is not None
    assert result["scores"]["loss"] < 0.9 * result["scores_before"]["loss"]


@pytest.mark.slow
def test_a_classifier_keeps_its_head_plain_and_its_best_model(tmp_path: Path) -> None:
    given = classification(
        write_encoder(tmp_path / "encoder"),
        write_sst2(tmp_path / "data"),
        tmp_path / "run",
        "relora",
        num_train_epochs=3,
    )
    given["model"]["quantization"] = "int8"
    result = runs.finetune(resolve(given))
    assert result is not None
    kept = tmp_path / "run" / f"checkpoint-{result['kept_step']}"
    names = load_file(kept / "model.safetensors")
    assert names["classifier.weight"].dtype == torch.float32
    assert {tensor.dtype for name, tensor in names.items() if name.endswith("base_layer.weight")} == {torch.int8}
    stored = read_weights(kept)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(stored.read(name).float(), tensor, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metric"] == "accuracy"


REFUSED = [
    ("full", {}, r"model\.quantization nf4 keeps the weights as codes.*method full trains the weights"),
    ("sift", {"method.reselect_every": 5}, r"method\.reselect_every 5: codes have no place for what entries have"),
    ("sift", {"trainer.strategy": "fsdp2"}, r"trainer\.strategy fsdp2.*Use ddp"),
    ("fira", {}, r"method fira trains the weights\. Use lora, relora or sift, or fira with method\.lora_rank"),
    ("lora", {"method.warm_start_steps": 4}, r"method\.warm_start_steps 4, in which the weights train"),
    ("lora", {"method.factor_dtype": None}, r"method\.factor_dtype null"),
    ("lora", {"trainer.strategy": "fsdp2"}, r"trainer\.strategy fsdp2.*Use ddp"),
    ("lora", {"model.quantization": "int8", "trainer.bf16": True}, r"trainer\.bf16 on a float32 model"),
]


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED)
def test_what_cannot_be_is_refused_at_once(method: str, changes: dict[str, Any], message: str) -> None:
    base = {"model.name": "base", "data.name": "rows", "method.name": method, "model.quantization": "nf4"}
    with pytest.raises(ConfigError, match=message):
        resolve(None, base | changes, command="finetune")


def test_fresh_weights_are_refused(tmp_path: Path) -> None:
    given = recipe(write_text(tmp_path / "text.jsonl"), tmp_path / "run", "lora")
    with pytest.raises(ConfigError, match=r"for trained weights, and model\.pretrained is false"):
        resolve(given, {"model.quantization": "nf4"})
    assert resolve(given, {"model.quantization": "nf4", "model.pretrained": True, "model.name": "some"})


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes linear layers, and Sequential has none"):
        Quantization("nf4", CPU).apply_(nn.Sequential(nn.Linear(4, 4)), keep={"0"})


def test_widths_that_would_be_decoded_wrongly_on_a_cpu_are_refused() -> None:
    """Blocks of 64 entries go on across rows; nothing is changed before it is refused."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(96, 8))
    with pytest.raises(UnsupportedError, match=r"no multiple of 64, and 1 has 96\. Set model\.quantization int8"):
        Quantization("nf4", CPU).apply_(model)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize("width", [32, 96, 100, 65])
def test_codes_of_any_width_are_decoded(width: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    decoded = decode({"weight": codes, **packed})
    assert decoded.shape == weight.shape
    assert (decoded - weight).norm() < 0.12 * weight.norm()
