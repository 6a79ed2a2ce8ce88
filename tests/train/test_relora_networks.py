"""LoRA and ReLoRA on other networks than LLaMA: transposed weights, biases, tied embeddings, fused projections."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fullrank.train.report import read_metrics
from fullrank.train.resolve import resolve
from fullrank.train.run import pretrain
from tests.train.tiny import METHOD_OPTIONS, assert_same_run, recipe, write_text

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def tied() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, max_position_embeddings=64))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "relora"])
@pytest.mark.parametrize(
    ("make", "targets"), [(gpt2, ["attn", "mlp"]), (tied, ["attn", "mlp"]), (neox, ["attention", "mlp"])]
)
def test_it_trains_and_what_it_leaves_is_the_trained_model(
    make: Any, targets: list[str], method: str, tmp_path: Path
) -> None:
    """The plain model scores as the run did before the factors were merged; an adapter gives the same on the base."""
    make().save_pretrained(tmp_path / "base")
    content = recipe(write_text(tmp_path / "text.jsonl"), tmp_path / "run", method, max_steps=8, eval_steps=5)
    content["model"] = {"name": str(tmp_path / "base"), "pretrained": True}
    restarts = {"restart_every": 3, "restart_warmup_steps": 1} if method == "relora" else {}
    content["method"] = {"name": method, **METHOD_OPTIONS[method], **restarts, "target_modules": targets}
    result = pretrain(resolve(content))
    assert result is not None
    assert result["perplexity"] < 0.5 * result["perplexity_before"]
    again = dict(content, output_dir=str(tmp_path / "again"), method={"name": "full"})
    again["model"] = {"name": str(tmp_path / "run" / "model"), "pretrained": True}
    scored = pretrain(resolve(again | {"trainer": content["trainer"] | {"max_steps": 1}}))
    assert scored is not None
    assert math.log(scored["perplexity_before"]) == pytest.approx(result["eval_loss"], rel=1e-5)
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", folder, ignore=shutil.ignore_patterns("model", "adapter", "result.json"))
    shutil.rmtree(folder / "checkpoint-8")
    pretrain(resolve(content | {"output_dir": str(folder)}), resume=True)
    assert_same_run(tmp_path / "run", folder)
    start = pretrain(
        resolve(
            content
            | {"model": {"name": str(folder / "checkpoint-5"), "pretrained": True}, "method": {"name": "full"}}
            | {"output_dir": str(tmp_path / "from-5"), "trainer": content["trainer"] | {"max_steps": 1}}
            | {"data": content["data"] | {"tokenizer": str(folder / "model")}}
        )
    )
    assert start is not None
    scored_at_5 = next(
        row["eval_loss"] for row in read_metrics(tmp_path / "run") if row["step"] == 5 and "eval_loss" in row
    )
    assert math.log(start["perplexity_before"]) == pytest.approx(scored_at_5, rel=1e-5)
    if method == "lora":
        tokens = torch.arange(24).view(2, 12)
        adapter = tmp_path / "run" / "adapter"
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")(tokens).logits
            original = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(tokens).logits
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            loaded = PeftModel.from_pretrained(base, adapter)
            doors = [loaded, AutoPeftModelForCausalLM.from_pretrained(adapter)]
            doors.append(PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=True))
            found = [door(tokens).logits for door in doors]
            loaded.save_pretrained(tmp_path / "again-adapter")
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            found.append(PeftModel.from_pretrained(base, tmp_path / "again-adapter")(tokens).logits)
            with doors[0].disable_adapter():
                without = doors[0](tokens).logits
            found.append(doors[0].merge_and_unload()(tokens).logits)
        for logits in found:
            torch.testing.assert_close(logits, merged, rtol=0, atol=1e-5)
        if make is tied:
            torch.testing.assert_close(without, original, rtol=0, atol=1e-5)
