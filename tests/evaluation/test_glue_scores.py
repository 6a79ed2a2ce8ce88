"""GLUE: a classifier scored as its run was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fullrank.errors import ConfigError
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.run import evaluate
from tests.evaluation.made import write_model
from tests.train.data.glue_files import HUB_LABELS, make_content, word_tokenizer, write_official

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))


def write_classifier(folder: Path, task: str) -> BertForSequenceClassification:
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    names = HUB_LABELS[task] or ("score",)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def asked(folder: Path, data: Path, *tasks: str, **changes: Any) -> EvaluateConfig:
    settings = {"sequence_length": 48, "batch_size": 3, "device": "cpu", **changes}
    return EvaluateConfig(
        model=str(folder), tasks=list(tasks), data={"glue": str(data)}, output_dir=str(folder / "eval"), **settings
    )


def predictions(model: BertForSequenceClassification, examples: list[Any]) -> np.ndarray[Any, Any]:
    """Classes of the examples, one at a time."""
    tokenizer = word_tokenizer()
    with torch.no_grad():
        return np.array([int(model(**tokenizer(*texts, return_tensors="pt")).logits.argmax()) for texts, _ in examples])


def test_mrpc(tmp_path: Path) -> None:
    content = make_content("mrpc", num_validation=19)
    data = write_official(tmp_path / "glue", "mrpc", content)
    model = write_classifier(tmp_path / "model", "mrpc")
    result = evaluate(asked(tmp_path / "model", data, "mrpc"))
    labels = np.array([label for _, label in content["validation"]])
    predicted = predictions(model, content["validation"])
    entry = result["tasks"]["mrpc"]
    assert entry["metric"] == "accuracy"
    assert entry["value"] == metrics.accuracy_score(labels, predicted)
    assert entry["metrics"]["f1"] == pytest.approx(metrics.f1_score(labels, predicted))
    assert (entry["num_examples"], entry["protocol"]) == (20, "classifier")


@pytest.mark.parametrize("limit", [None, 3])
def test_both_sets_of_mnli(limit: int | None, tmp_path: Path) -> None:
    content = make_content("mnli", num_validation=7)
    data = write_official(tmp_path / "glue", "mnli", content)
    model = write_classifier(tmp_path / "model", "mnli")
    entry = evaluate(asked(tmp_path / "model", data, "mnli", limit=limit))["tasks"]["mnli"]
    counts = 0
    for suffix in ("matched", "mismatched"):
        examples = content[f"validation_{suffix}"][:limit]
        counts += len(examples)
        expected = float((predictions(model, examples) == [label for _, label in examples]).mean())
        assert entry["metrics"][f"accuracy_{suffix}"] == pytest.approx(expected)
    assert entry["num_examples"] == counts
    assert entry["metric"] == "accuracy_matched"


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = write_official(tmp_path / "glue", "mrpc", make_content("mrpc"))
    write_official(tmp_path / "glue", "mnli", make_content("mnli"))
    write_official(tmp_path / "glue", "qqp", make_content("qqp"))
    write_classifier(tmp_path / "model", "mrpc")
    with pytest.raises(ConfigError, match=r"(?s)mnli: its labels are entailment.*qqp: its labels are") as error:
        evaluate(asked(tmp_path / "model", data, "mnli", "qqp", "mrpc", sequence_length=65))
    assert "mrpc: its labels" not in str(error.value)
    assert "sequence_length is 65 for glue, the model takes at most 64" in str(error.value)
    with pytest.raises(ConfigError, match=r"mrpc: this needs a sequence-classification model.*LlamaForCausalLM"):
        evaluate(asked(write_model(tmp_path / "causal"), data, "mrpc"))
    assert not (tmp_path / "model" / "eval").exists()


def test_language_tasks_need_a_language_model(tmp_path: Path) -> None:
    write_classifier(tmp_path / "model", "mrpc")
    text = tmp_path / "text.txt"
    text.write_text("one two red blue cat\n\n" * 50)
    config = asked(tmp_path / "model", tmp_path, "perplexity")
    with pytest.raises(ConfigError, match=r"needs a causal language model, and .* is a BertForSequenceClassification"):
        evaluate(EvaluateConfig(**{**vars(config), "data": {"perplexity": str(text)}}))
