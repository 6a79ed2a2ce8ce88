"""What a fine-tuning run must not get wrong: batches that accumulate, epochs, the best model, stops, other bases."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from fullrank import ConfigError
from fullrank.cli import main
from fullrank.train import run as runs
from fullrank.train.load import load_trained
from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.run import finetune
from tests.train.data.instructing import MARKED, make_tokenizer
from tests.train.finetuning import classification, instructions, write_base, write_encoder, write_rows, write_sst2
from tests.train.tiny import assert_same_run, trajectory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks")
    write_base(folder / "base")
    write_rows(folder / "rows.json")
    write_encoder(folder / "encoder")
    write_sst2(folder / "glue")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in trajectory(folder) if "loss" in row]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accumulated_batches_are_one_batch(kind: str, place: Path, tmp_path: Path) -> None:
    encoder = place / "encoder"
    if kind == "llama":
        encoder = tmp_path / "llama"
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        write_encoder(encoder)
        LlamaForSequenceClassification(LlamaConfig(vocab_size=120, pad_token_id=0, **sizes)).save_pretrained(encoder)
    found = {}
    for size in (8, 2):
        folder = tmp_path / f"by-{size}"
        content = classification(encoder, place / "glue", folder, "full", num_train_epochs=1)
        content["trainer"] |= {"per_device_train_batch_size": size, "total_batch_size": 8, "max_grad_norm": 0.0}
        content["model"]["overrides"] = {"attention_dropout": 0.0} if kind == "llama" else no_dropout()
        assert finetune(resolve(content)) is not None
        found[size] = rows_of(folder)
    assert len(found[8]) == len(found[2]) == 8
    for one, several in zip(found[8], found[2], strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert several["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def no_dropout() -> dict[str, float]:
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(("size", "total", "steps"), [(16, 16, 9), (16, 32, 6), (64, 64, 3)])
def test_an_epoch_is_a_whole_epoch(size: int, total: int, steps: int, place: Path, tmp_path: Path) -> None:
    """40 examples, three times over, each epoch ending with a step."""
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "full", num_train_epochs=3)
    content["trainer"] |= {"per_device_train_batch_size": size, "total_batch_size": total}
    result = finetune(resolve(content))
    assert result is not None
    assert result["steps"] == steps
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [
        0,
        *range(steps // 3, steps + 1, steps // 3),
    ]


def test_the_lowest_perplexity_is_the_best(place: Path, tmp_path: Path) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "full", num_train_epochs=3)
    content["trainer"] |= {"load_best_model_at_end": True, "metric_for_best_model": "perplexity"}
    result = finetune(resolve(content))
    assert result is not None
    found = {row["step"]: row["perplexity"] for row in read_metrics(tmp_path / "run") if "perplexity" in row}
    assert result["perplexity"] == min(value for step, value in found.items() if step)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"metric_for_best_model": "bleu"}, "must be one of loss, perplexity, got bleu"),
        (
            {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 5},
            "eval_steps is 4 and save_steps 5",
        ),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "40 examples, fewer than a batch of 64"),
    ],
)
def test_refused_before_training(trainer: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "full", **trainer)
    content["trainer"]["load_best_model_at_end"] = True
    with pytest.raises(ConfigError, match=words):
        finetune(resolve(content))
    assert not (tmp_path / "run").exists()


class StopAt(TrainerCallback):
    """A Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [*(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8)), 7, 13])
def test_a_stop_changes_nothing(step: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop within an epoch is not scored, so it cannot be the best; a resumed run is the uninterrupted one."""
    whole = classification(place / "encoder", place / "glue", tmp_path / "whole", "full", num_train_epochs=2)
    assert finetune(resolve(whole)) is not None
    stopped = classification(place / "encoder", place / "glue", tmp_path / "stopped", "full", num_train_epochs=2)
    make = runs.make_trainer

    def interrupted(*given: Any, callbacks: list[Any], **named: Any) -> Any:
        return make(*given, callbacks=[*callbacks, StopAt(step)], **named)

    monkeypatch.setattr(runs, "make_trainer", interrupted)
    assert finetune(resolve(stopped)) is None
    monkeypatch.undo()
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    assert finetune(resolve(stopped), resume=True) is not None
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_stop_in_the_last_step_comes_too_late(place: Path, tmp_path: Path) -> None:
    """The run is over: it is scored and returns to its best like any other."""
    results = []
    for name, callbacks in (("whole", []), ("stopped", [StopAt(-1)])):
        content = classification(place / "encoder", place / "glue", tmp_path / name, "full", num_train_epochs=2)
        content["method"]["lr"] = 0.05
        content["trainer"]["load_best_model_at_end"] = True
        if results:
            callbacks[0].step = results[0]["steps"] - 1
        result = finetune(resolve(content), callbacks=callbacks)
        assert result is not None
        results.append(result)
    assert results[0]["kept_step"] == results[1]["kept_step"] < results[0]["steps"]
    assert results[0]["scores"] == results[1]["scores"]
    found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_lora_adapter_knows_its_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "lora", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    other = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    adapter = str(tmp_path / "run" / "adapter")
    asked = ["--model", str(tmp_path / "other"), "--adapter", adapter, "--output_dir", str(tmp_path / "out")]
    assert main(["export", *asked]) == 2
    assert "was trained from another base: 1 of its" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    AutoModelForCausalLM.from_pretrained(place / "base").bfloat16().save_pretrained(tmp_path / "rounded")
    assert load_trained(str(tmp_path / "rounded"), adapter=adapter).method == "lora", "the same base in another type"


def test_biases_beside_factors_are_in_the_adapter(place: Path, tmp_path: Path) -> None:
    """A bias of a layer without factors: PEFT puts back whole modules."""
    content = classification(place / "encoder", place / "glue", tmp_path / "run", "lora", num_train_epochs=1)
    content["method"] |= {"target_modules": ["query"], "train_norms": True}
    assert finetune(resolve(content)) is not None
    loaded = load_trained(str(place / "encoder"), adapter=str(tmp_path / "run" / "adapter")).model.state_dict()
    trained = load_trained(str(tmp_path / "run")).model.state_dict()
    for name, value in trained.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=1e-6)


def test_an_adapter_of_a_decoder_knows_its_classes(place: Path, tmp_path: Path) -> None:
    decoder = tmp_path / "decoder"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    write_encoder(decoder)
    LlamaForSequenceClassification(LlamaConfig(vocab_size=120, pad_token_id=None, **sizes)).save_pretrained(decoder)
    content = classification(decoder, place / "glue", tmp_path / "run", "lora", num_train_epochs=1)
    content["method"]["target_modules"] = ["q_proj", "mlp"]
    assert finetune(resolve(content)) is not None
    model = load_trained(str(decoder), adapter=str(tmp_path / "run" / "adapter")).model
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.pad_token_id == 0
    assert model(torch.tensor([[2, 5, 0], [2, 5, 6]])).logits.shape == (2, 2)


def test_generate_puts_the_prompt_as_it_was_learned(place: Path, tmp_path: Path) -> None:
    """A run on prompts and completions has no template, one on messages the tokenizer's."""
    tokenizer = make_tokenizer(chat=MARKED)
    base = tmp_path / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "answer"}]
    kinds: dict[str, tuple[dict[str, Any], str | None]] = {
        "messages": ({"messages": messages}, "chat"),
        "completion": ({"prompt": "the", "completion": " answer"}, None),
        "instruction": ({"instruction": "the", "output": " answer"}, "plain"),
    }
    for name, (row, template) in kinds.items():
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(f"{json.dumps(row)}\n" * 4)
        content = instructions(base, rows, tmp_path / name, "full", num_train_epochs=1)
        content["data"]["validation_size"] = 0
        assert finetune(resolve(content)) is not None
        assert load_trained(str(tmp_path / name)).prompt_template == template


def test_the_folder_of_a_run_is_its_model(place: Path, tmp_path: Path) -> None:
    """Fine-tuning goes on from a run; an adapter and a path to nothing are told apart from a missing tokenizer."""
    content = instructions(place / "base", place / "rows.json", tmp_path / "one", "lora", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    content = instructions(tmp_path / "one", place / "rows.json", tmp_path / "two", "full", num_train_epochs=1)
    result = finetune(resolve(content))
    assert result is not None
    assert result["model"] == str(tmp_path / "one" / "model")
    for name, words in ((tmp_path / "one" / "adapter", "is an adapter"), (tmp_path / "nothing", "is not a folder")):
        content = instructions(name, place / "rows.json", tmp_path / "three", "full")
        with pytest.raises(ConfigError, match=words):
            finetune(resolve(content))


def test_another_row_in_the_middle_is_another_run(place: Path, tmp_path: Path) -> None:
    from fullrank.train.data.instructions import load_instructions

    tokenizer = make_tokenizer()
    hashes = set()
    for answer in ("yes", "no"):
        rows = [{"instruction": "the", "output": "yes"} for _ in range(1000)]
        rows[500]["output"] = answer
        (tmp_path / f"{answer}.json").write_text(json.dumps(rows))
        config = resolve(
            {"data": {"task": "instructions", "name": str(tmp_path / f"{answer}.json")}}, {"model.name": "m"}
        )
        hashes.add(load_instructions(config.data, tokenizer, cache_dir=tmp_path / "cache").content_hash)
    assert len(hashes) == 2


def test_small_steps_on_bfloat16_weights_are_told(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for method, warned in (("full", True), ("lora", False)):
        content = instructions(place / "base", place / "rows.json", tmp_path / method, method, num_train_epochs=1)
        content["model"]["dtype"] = "bfloat16"
        content["method"]["lr"] = 2e-5
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fullrank"):
            assert finetune(resolve(content)) is not None
        assert ("lost to rounding" in caplog.text) == warned


def test_loras_factors_stay_when_the_projection_goes() -> None:
    config = resolve("finetune/commonsense-7b-fira", {"method.name": "lora"}).method
    assert (config.rank, config.lora_alpha, config.lora_dropout) == (32, 64.0, 0.05)


def test_a_peft_adapter_of_another_tool_loads(place: Path, tmp_path: Path) -> None:
    """Without a note of its base, as PEFT itself writes it."""
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "lora", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    own = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "base"), str(tmp_path / "run" / "adapter")
    )
    own.save_pretrained(str(tmp_path / "again"))
    loaded = load_trained(str(place / "base"), adapter=str(tmp_path / "again")).model.state_dict()
    for name, value in load_trained(str(tmp_path / "run")).model.state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=1e-6)


def test_an_adapter_on_another_architecture_is_refused(place: Path, tmp_path: Path) -> None:
    """Before a model of the wrong class is built, which could be of any size."""
    content = instructions(place / "base", place / "rows.json", tmp_path / "run", "sift", num_train_epochs=1)
    assert finetune(resolve(content)) is not None
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"trained from another base: on a LlamaForCausalLM, and .* is a gpt2"):
        load_trained(str(tmp_path / "gpt2"), adapter=str(tmp_path / "run" / "adapter"))


@pytest.mark.parametrize("own", [0, None])
def test_model_and_tokenizer_agree_on_padding(own: int | None, tmp_path: Path) -> None:
    """A decoder takes the classes of a padded example from its last real token, whatever it is batched with."""
    tokenizer = make_tokenizer(pads=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=own, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_trained(str(tmp_path / "model"))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id is not None
    texts = ["the", "the answer is yes : no"]
    together = loaded.model(**loaded.tokenizer(texts, padding=True, return_tensors="pt")).logits
    for text, logits in zip(texts, together, strict=True):
        torch.testing.assert_close(loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits[0], logits)
