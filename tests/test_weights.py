"""Weights of folders: one file or shards, LoRA's factors folded in, runs, labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fullrank.analysis.spectrum import spectrum
from fullrank.errors import CheckpointError, ConfigError, UnsupportedError
from fullrank.factors import find_pairs, train_scaling
from fullrank.weights import Weights, from_tensors, label_folders, read_weights, run_folder, shortest_ends

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
RANK, ALPHA = 3, 12.0


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def assert_holds(weights: Weights, expected: dict[str, Tensor], *, exactly: bool = True) -> None:
    """Every matrix, by name."""
    for name, tensor in expected.items():
        assert weights.shapes[name] == tuple(tensor.shape), name
        read = weights.read(name)
        assert read.dtype == torch.float64
        torch.testing.assert_close(read, tensor.double(), rtol=0, atol=0 if exactly else 1e-6)


def write_checkpoint(folder: Path, model: PreTrainedModel, targets: list[str], *, trained_scale: bool = False) -> Any:
    """PEFT's layers put into a model, trained as it were, and saved as the Trainer does."""
    config = LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules=targets, fan_in_fan_out=isinstance(model, GPT2LMHeadModel)
    )
    injected = get_peft_model(model, config)
    if trained_scale:
        for number, scale in enumerate(train_scaling(injected)):
            scale.data.fill_(0.3 + 0.1 * number)
    torch.manual_seed(7)
    for pair in find_pairs(injected):
        pair.b.data.normal_(std=0.02)
    injected.get_base_model().save_pretrained(folder)
    write_marker(folder)
    return injected


def write_marker(folder: Path) -> None:
    marker = {"config": {"method": {"name": "relora", "rank": RANK, "lora_alpha": ALPHA}}}
    (folder / "fullrank.json").write_text(json.dumps(marker))


def merged(injected: Any) -> dict[str, Tensor]:
    """The weights that the model computes with, merged by our own pairs."""
    for pair in find_pairs(injected):
        pair.merge_(stochastic=False)
    return dict(injected.unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_single_file_in_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    model.save_pretrained(tmp_path)
    assert_holds(read_weights(tmp_path), model.state_dict())


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = read_weights(str(tmp_path))
    assert_holds(weights, model.state_dict())
    assert weights.source == str(tmp_path)


def test_a_stale_file_beside_an_index_is_not_read(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    save_file({"old.weight": torch.ones(2, 2)}, tmp_path / "model-old.safetensors")
    assert read_weights(tmp_path).shapes.keys() == model.state_dict().keys()


@pytest.mark.parametrize("trained_scale", [False, True])
def test_factors_are_folded_into_their_weight(tmp_path: Path, trained_scale: bool) -> None:
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    injected = write_checkpoint(tmp_path, llama(), targets, trained_scale=trained_scale)
    weights = read_weights(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("lora_scaling" in name for name in stored) == trained_scale
    expected = merged(injected)
    assert weights.shapes.keys() == expected.keys()
    assert_holds(weights, expected, exactly=False)
    base = {name: weight.detach().clone() for name, weight in llama().state_dict().items()}
    found = spectrum(weights, from_tensors(base, source="base"), threshold=1e-9)
    for kind, measured in found.types.items():
        rank = RANK if kind in targets else 0
        assert measured.numerical_rank == rank, kind
        assert measured.num_below == measured.num_values - 2 * rank, "what factors leave out is zero in float64"


def test_folding_is_the_dense_difference(tmp_path: Path) -> None:
    """The spectrum of a checkpoint with factors is that of the merged model."""
    base = from_tensors({name: w.clone() for name, w in llama().state_dict().items()}, source="base")
    injected = write_checkpoint(tmp_path, llama(), ["q_proj", "up_proj"])
    folded = spectrum(read_weights(tmp_path), base)
    dense = spectrum(from_tensors(merged(injected), source="merged"), base)
    for kind, measured in folded.types.items():
        torch.testing.assert_close(measured.mean_values(), dense.types[kind].mean_values(), rtol=0, atol=1e-6)


def test_factors_beside_weights_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D, square ones (attn.c_proj) too."""
    injected = write_checkpoint(tmp_path, gpt2(), ["c_attn", "c_proj", "c_fc"])
    weights = read_weights(tmp_path)
    expected = merged(injected)
    assert weights.shapes["transformer.h.0.attn.c_proj.weight"] == (16, 16)
    assert_holds(weights, {name: w for name, w in expected.items() if name in weights.shapes}, exactly=False)


def test_square_factors_alone_beside_transposed_weights(tmp_path: Path) -> None:
    """Their shapes do not show that they lie transposed; the type of the model does."""
    injected = write_checkpoint(tmp_path, gpt2(), ["attn.c_proj"])
    weights = read_weights(tmp_path)
    expected = merged(injected)
    assert_holds(weights, {name: w for name, w in expected.items() if name in weights.shapes}, exactly=False)


def test_factors_in_bfloat16(tmp_path: Path) -> None:
    injected = write_checkpoint(tmp_path, llama().to(torch.bfloat16), ["q_proj"])
    pair = find_pairs(injected)[0]
    expected = pair.weight.double() + ALPHA / RANK * (pair.b.double() @ pair.a.double())
    assert_holds(read_weights(tmp_path), {"model.layers.0.self_attn.q_proj.weight": expected}, exactly=False)


def test_a_run_gives_its_model_else_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for step in (5, 10, 100, 200):
        llama(step).save_pretrained(tmp_path / f"checkpoint-{step}")
        if step < 200:
            write_marker(tmp_path / f"checkpoint-{step}")
    (tmp_path / "model").mkdir()  # made, and nothing in it yet
    assert_holds(read_weights(tmp_path), llama(100).state_dict())
    assert read_weights(tmp_path).source == str(tmp_path / "checkpoint-100")
    llama(1).save_pretrained(tmp_path / "model")
    assert_holds(read_weights(tmp_path), llama(1).state_dict())
    assert_holds(read_weights(tmp_path / "checkpoint-5"), llama(5).state_dict())


def test_the_run_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for inside in ("model", "checkpoint-7", "warm_start"):
        (run / inside).mkdir(parents=True)
    assert run_folder(run) is None
    (run / "config.yaml").touch()
    assert run_folder(run) == run_folder(run / "model") == run_folder(run / "checkpoint-7") == run
    assert run_folder(run / "warm_start") is None, "the start of a run is not trained by it"
    assert run_folder(tmp_path) is None
    monkeypatch.chdir(run / "model")
    assert run_folder(".") == run


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["runs/full-1", "runs/fira-1/"], ["full-1", "fira-1"]),
        (["a/model", "b/model", "c/checkpoint-5"], ["a/model", "b/model", "checkpoint-5"]),
        (["full rank=a/model", "b/model"], ["full rank", "model"]),
        (["relora=runs/x", "lora=runs/x"], ["relora", "lora"]),
        (["runs/lr=0.1/model", "runs/lr=0.2/model"], ["lr=0.1/model", "lr=0.2/model"]),
    ],
)
def test_labels_tell_runs_apart(given: list[str], labels: list[str]) -> None:
    found = label_folders(given)
    assert list(found) == labels
    assert list(found.values()) == [
        Path(text.removeprefix(f"{label}=")) for text, label in zip(given, labels, strict=True)
    ]


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    assert label_folders(["lr=0.1"]) == {"lr=0.1": Path("lr=0.1")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x=a", "x=b"], "2 runs are called 'x'. Name them apart"),
        (["a/run", "a/run"], "2 runs are called"),
        (["b=a/run", "x/b"], "2 runs are called 'b'"),
        ([], "no run was given"),
    ],
)
def test_runs_of_one_name_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        label_folders(given)


def test_shortest_ends() -> None:
    assert shortest_ends([("a", "x"), ("b", "x"), ("x",), ("b", "y")], joined_by=".") == ["a.x", "b.x", "x", "y"]
    assert shortest_ends([], joined_by=".") == []


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no model.safetensors and no model.safetensors.index.json. Give"):
        read_weights(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"only adapter_model.safetensors. Give a folder"):
        read_weights(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ConfigError, match="holds no model and no complete checkpoint yet"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"x": 3}}'])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read as an index"):
        read_weights(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged"):
        read_weights(tmp_path / "sharded")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}, which its index names"):
        read_weights(tmp_path / "sharded")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged or cannot be read"):
        read_weights(tmp_path)


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.read("model.norm.weight")


def changed(folder: Path, **tensors: Tensor | None) -> None:
    """Replace or remove parts of layer 0's q_proj in a checkpoint."""
    path, layer = folder / "model.safetensors", "model.layers.0.self_attn.q_proj."
    content = load_file(path)
    for name, tensor in tensors.items():
        content.pop(layer + name.replace("__", "."))
        if tensor is not None:
            content[layer + name.replace("__", ".")] = tensor
    save_file(content, path)


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(), ["q_proj"])
    changed(tmp_path, lora_A__default__weight=torch.ones(RANK, 17))
    with pytest.raises(CheckpointError, match=r"make a 16 x 17 matrix, its base is \(16, 16\)"):
        read_weights(tmp_path)
    changed(tmp_path, base_layer__weight=torch.ones(16, 16, dtype=torch.int8))
    with pytest.raises(UnsupportedError, match=r"q_proj in .* is quantized \(I8\)"):
        read_weights(tmp_path)
    changed(tmp_path, lora_B__default__weight=None)
    with pytest.raises(CheckpointError, match=r"has factor A of .*q_proj, but no .*lora_B"):
        read_weights(tmp_path)
    changed(tmp_path, base_layer__weight=None)
    with pytest.raises(CheckpointError, match=r"has factor A of .*q_proj, but no .*base_layer"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"config": {"method": {"lora_alpha": "high"}}}'])
def test_factors_without_their_scale_are_refused(content: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, llama(), ["q_proj"])
    (tmp_path / "fullrank.json").unlink()
    if content is not None:
        (tmp_path / "fullrank.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"method.lora_alpha in its fullrank.json, cannot be read"):
        read_weights(tmp_path)
