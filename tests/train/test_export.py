"""From a base and an adapter to a plain model folder, through the command, and from a run's own folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fullrank import SIFT
from fullrank.cli import main
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import recipe, write_text


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def train(model: Any, sift: SIFT, num_labels: int | None = None) -> None:
    """A few steps on random tokens."""
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        tokens = torch.randint(0, 64, (4, 8), generator=draw)
        labels = tokens if num_labels is None else tokens[:, 0] % num_labels
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained(tmp_path: Path) -> LlamaForCausalLM:
    """A trained model; its base is in ``base/``, its adapter in ``adapter/`` of the test's folder."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    sift = SIFT(model, 0.1, ["q_proj", "mlp"])
    train(model, sift)
    sift.save_adapter(tmp_path / "adapter", dtype="float32")
    return model


def export(folder: Path, *more: str, base: str = "base") -> int:
    where = {"model": base, "adapter": "adapter", "output_dir": "out"}
    return main(["export", *(word for key, name in where.items() for word in (f"--{key}", str(folder / name))), *more])


def test_export_is_the_trained_model(
    trained: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path) == 0
    said = capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-8)
    assert any(not torch.equal(base[name], value) for name, value in merged.state_dict().items())
    assert "without a tokenizer" in said
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors"))
    assert f"an adapter of {size / 1e6:,.1f} MB is merged" in said


def test_export_in_another_dtype(trained: LlamaForCausalLM, tmp_path: Path) -> None:
    assert export(tmp_path, "--dtype", "bfloat16") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.lm_head.weight, trained.lm_head.weight.bfloat16())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--speed", "3"), "export does not know"),
        (("--adapter", "nowhere"), "is not an adapter"),
    ],
)
def test_bad_arguments(
    more: tuple[str, str], words: str, trained: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, *more) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(trained: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(seed=1).save_pretrained(tmp_path / "other")
    assert export(tmp_path, base="other") == 2
    assert "was trained from another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(trained: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert export(tmp_path) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_missing_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", "base"]) == 2
    assert "export needs --output_dir" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0
    assert "--dtype" in capsys.readouterr().out


def test_a_classifier_keeps_its_class_and_head(tmp_path: Path) -> None:
    """The head is not in the base's files: it comes whole from the adapter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))
    model.bert.save_pretrained(tmp_path / "base")
    sift = SIFT(model, 0.1, ["query", "value"], exception=["classifier"])
    train(model, sift, num_labels=3)
    sift.save_adapter(tmp_path / "adapter", dtype="float32")
    assert export(tmp_path) == 0
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.num_labels == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-8)


def test_a_run_from_a_pretrained_model_leaves_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first run makes a base; a second one trains it sparsely; export gives that run's model."""
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "documents.jsonl")
    first = recipe(text, tmp_path / "first", "full", max_steps=3, save_strategy="no", eval_strategy="no")
    pretrain(resolve(first))
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "base")
    second = recipe(text, tmp_path / "second", "sift", max_steps=3, save_strategy="no", eval_strategy="no")
    second["model"] = {"name": str(tmp_path / "base"), "pretrained": True}
    second["data"]["tokenizer"] = str(tmp_path / "base")
    second["method"]["exception"] = []
    result = pretrain(resolve(second))
    assert result is not None
    shutil.copytree(tmp_path / "second" / "adapter", tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter.safetensors").stat().st_size
    assert result["adapter_bytes"] == size < 0.5 * (tmp_path / "base" / "model.safetensors").stat().st_size
    assert export(tmp_path) == 0
    assert "with its tokenizer" in capsys.readouterr().out
    AutoTokenizer.from_pretrained(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "model").state_dict()
    for name, value in trained.items():
        largest = (value - base[name]).abs().max()
        torch.testing.assert_close(merged[name], value, rtol=0, atol=max(float(largest) / 250, 1e-8))  # bf16 deltas
    assert (tmp_path / "first" / "adapter").exists() is False


def test_pretrain_refuses_a_finetuning_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "finetune/glue-cola-sift"]) == 2
    assert "describes a fine-tuning run" in capsys.readouterr().err
