"""GLUE's metrics against scikit-learn, scipy and torch called directly, and through a Trainer's own evaluation."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fullrank.errors import ConfigError
from fullrank.train.config import GlueConfig
from fullrank.train.data.glue import TASKS, load_glue, load_glue_validation
from fullrank.train.data.glue_metrics import make_scoring, outputs_alone
from fullrank.train.data.prepared import Data
from tests.train.data.glue_files import make_content, word_tokenizer, write_official

ORACLES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


def score(task: str, outputs: Any, labels: Any, sets: list[tuple[str, int]] | None = None) -> dict[str, float]:
    """The metrics of a task for these outputs of a model."""
    scoring = make_scoring(TASKS[task], list(labels), sets or [("", len(labels))])
    prediction: Any = SimpleNamespace(predictions=outputs, label_ids=np.asarray(labels))
    return scoring.compute(prediction)


def draw(task: str, count: int, seed: int) -> tuple[Any, Any]:
    """Random outputs (float32) and labels that they say something about."""
    rng = np.random.default_rng(seed)
    num_outputs = len(TASKS[task].label_names)
    if num_outputs == 1:
        labels = rng.integers(0, 21, count).astype(np.float32) / 4
        return (labels[:, None] + rng.normal(0, 2, (count, 1))).astype(np.float32), labels
    labels = rng.integers(0, num_outputs, count)
    outputs = rng.normal(0, 1, (count, num_outputs)) + np.eye(num_outputs)[labels]
    return outputs.astype(np.float32), labels


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", TASKS)
def test_against_the_packages(task: str, seed: int) -> None:
    outputs, labels = draw(task, 57, seed)
    found = score(task, outputs, labels)
    predictions = outputs[:, 0] if task == "stsb" else outputs.argmax(1)
    for name in TASKS[task].metrics:
        assert found[name] == pytest.approx(ORACLES[name](labels, predictions), abs=1e-6)
        assert 0.1 < found[name] < 1
    logits, targets = torch.tensor(outputs).double(), torch.tensor(labels)
    loss = F.mse_loss(logits[:, 0], targets.double()) if task == "stsb" else F.cross_entropy(logits, targets)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert set(found) == {"loss", *TASKS[task].metrics}


def test_right_and_wrong() -> None:
    """The extremes, worked out by hand."""
    right = np.array([[2.0, -1.0], [-1.0, 2.0], [-1.0, 2.0], [2.0, -1.0]])
    labels = [0, 1, 1, 0]
    assert score("cola", right, labels)["matthews_correlation"] == 1
    assert score("cola", -right, labels)["matthews_correlation"] == -1
    half = score("mrpc", right, [0, 1, 0, 1])
    assert (half["accuracy"], half["f1"]) == (0.5, 0.5)
    assert score("mrpc", right, [1, 1, 0, 0])["f1"] == 0.5
    curved = score("stsb", np.array([[0.0], [1.0], [8.0], [27.0]]), [0.0, 1.0, 2.0, 3.0])
    assert curved["spearmanr"] == pytest.approx(1)
    assert curved["pearson"] < 0.95


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("task", ["cola", "mrpc", "sst2"])
@pytest.mark.parametrize("classes", [(0, 1), (0,), (1,)])
def test_one_class_predicted(task: str, constant: int, classes: tuple[int, ...]) -> None:
    """No warning, no nan: Matthews' correlation is 0, and so is F1 without a positive."""
    labels = [classes[n % len(classes)] for n in range(9)]
    outputs = np.zeros((9, 2))
    outputs[:, constant] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(task, outputs, labels)
    share = sum(label == constant for label in labels) / 9
    if task == "cola":
        assert found["matthews_correlation"] == 0
    else:
        assert found["accuracy"] == pytest.approx(share)
    if task == "mrpc":
        assert found["f1"] == pytest.approx(2 * share / (1 + share) if constant == 1 else 0)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        ([3.0, 3.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [3.0, 3.0, 3.0]),
        ([1.0], [1.0]),
        ([1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]),
        ([1.0, float("inf"), 2.0], [1.0, 2.0, 3.0]),
    ],
)
def test_a_correlation_that_is_not_defined(outputs: list[float], labels: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score("stsb", np.array(outputs)[:, None], labels)
    assert (found["pearson"], found["spearmanr"]) == (0, 0)
    expected = np.mean((np.array(outputs) - np.array(labels)) ** 2)
    assert found["loss"] == pytest.approx(expected, nan_ok=True)


def test_the_sets_of_mnli() -> None:
    """Each set has its own accuracy, over its own examples; the loss is that of all."""
    outputs, labels = draw("mnli", 50, seed=3)
    found = score("mnli", outputs, labels, [("_matched", 20), ("_mismatched", 30)])
    first, second = (score("mnli", outputs[part], labels[part]) for part in (slice(20), slice(20, 50)))
    assert found["accuracy_matched"] == first["accuracy"]
    assert found["accuracy_mismatched"] == second["accuracy"]
    assert first["accuracy"] != second["accuracy"]
    assert found["loss"] == pytest.approx((20 * first["loss"] + 30 * second["loss"]) / 50)
    assert set(found) == {"loss", "accuracy_matched", "accuracy_mismatched"}


def test_sets_in_another_order_are_refused() -> None:
    scoring = make_scoring(TASKS["mnli"], [0, 1, 2, 0], [("_matched", 1), ("_mismatched", 3)])
    for labels in ([1, 0, 2, 0], [0, 1, 2], [0, 1, 2, 0, 0]):
        prediction: Any = SimpleNamespace(predictions=np.zeros((len(labels), 3)), label_ids=np.array(labels))
        with pytest.raises(ConfigError, match="in another order"):
            scoring.compute(prediction)


@pytest.mark.parametrize(("task", "num_outputs"), [("rte", 3), ("mnli", 2), ("stsb", 2), ("sst2", 1)])
def test_a_model_of_another_task(task: str, num_outputs: int) -> None:
    needed = len(TASKS[task].label_names)
    with pytest.raises(ConfigError, match=rf"shape \({num_outputs},\), this task needs {needed}"):
        score(task, np.zeros((4, num_outputs)), [0, 1, 0, 1])


def test_outputs_alone() -> None:
    """Some models give more than logits; the labels do not matter."""
    logits, cache = torch.rand(2, 3), torch.rand(5)
    assert outputs_alone(logits, torch.zeros(2)) is logits
    assert outputs_alone((logits, cache), torch.zeros(2)) is logits


@pytest.mark.parametrize(
    ("task", "module"), [("cola", "sklearn.metrics"), ("mrpc", "sklearn.metrics"), ("stsb", "scipy.stats")]
)
def test_a_missing_package(task: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is read; a task of accuracy alone needs none."""
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ConfigError, match=rf"{package} is missing, which computes .*pip install 'fullrank\[eval\]'"):
        load_glue(GlueConfig(task=task, name="none"), word_tokenizer(), cache_dir=tmp_path)  # type: ignore[arg-type]
    make_scoring(TASKS["rte"], [0, 1], [("", 2)])


def evaluate(task: str, folder: Path, **arguments: Any) -> tuple[dict[str, float], Data, Any]:
    """What a Trainer finds on a made task with a tiny network, the data, and the network."""
    tokenizer = word_tokenizer()
    root = write_official(folder / "glue", task, make_content(task, num_validation=9))
    config = GlueConfig(task=task, name=str(root), sequence_length=16)  # type: ignore[arg-type]
    data = load_glue_validation(config, tokenizer, cache_dir=folder)
    torch.manual_seed(0)
    about = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=len(data.label_names),
        initializer_range=1.0,  # so that the predictions differ
    )
    model = BertForSequenceClassification(about).eval()
    settings = {"per_device_eval_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder / "out"), **settings, **arguments),
        eval_dataset=data.validation,
        data_collator=data.collate,
        compute_metrics=data.scoring.compute,
        preprocess_logits_for_metrics=data.scoring.condense,
    )
    return trainer.evaluate(), data, model


@pytest.mark.parametrize("task", ["rte", "mnli", "stsb"])
def test_through_a_trainer(task: str, tmp_path: Path) -> None:
    """Ten examples and more in batches of four: the last batch is smaller, and every example counts once."""
    found, data, model = evaluate(task, tmp_path)
    assert data.validation is not None
    rows = [data.collate([row]) for row in data.validation]
    with torch.no_grad():
        outputs = torch.cat([model(**{k: v for k, v in row.items() if k != "labels"}).logits for row in rows])
    labels = torch.cat([row["labels"] for row in rows])
    losses = (outputs[:, 0] - labels) ** 2 if task == "stsb" else F.cross_entropy(outputs, labels, reduction="none")
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    predictions = outputs[:, 0].numpy() if task == "stsb" else outputs.argmax(1).numpy()
    if task == "mnli":
        right = predictions == labels.numpy()
        assert found["eval_accuracy_matched"] == pytest.approx(right[:10].mean())
        assert found["eval_accuracy_mismatched"] == pytest.approx(right[10:].mean())
        assert right[:10].mean() != right[10:].mean()
        return
    assert len(labels) % 4
    for name in TASKS[task].metrics:
        assert found[f"eval_{name}"] == pytest.approx(ORACLES[name](labels.numpy(), predictions), abs=1e-5)


def test_a_trainer_that_changes_the_order(tmp_path: Path) -> None:
    """Grouping by length sorts the validation set too: the two sets of MNLI cannot be told apart, one set can."""
    with pytest.raises(ConfigError, match="in another order"):
        evaluate("mnli", tmp_path, train_sampling_strategy="group_by_length")
    grouped, _, _ = evaluate("rte", tmp_path, train_sampling_strategy="group_by_length")
    plain, _, _ = evaluate("rte", tmp_path)
    assert grouped["eval_accuracy"] == plain["eval_accuracy"]
    assert grouped["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
