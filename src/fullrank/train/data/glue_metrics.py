"""The metrics of GLUE, computed once over a whole validation set.

Where a metric is undefined it is 0: the correlation of scores that are all the same or not finite, Matthews'
correlation when one class alone was predicted, F1 when neither a label nor a prediction is positive. So a model that
learned nothing scores 0, not nan.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from fullrank.errors import ConfigError
from fullrank.train.data.glue_tasks import GlueTask
from fullrank.train.data.prepared import Scoring

Metric = Callable[[Any, Any], float]
"""A number from labels and predictions, arrays of the same length."""


@dataclass(frozen=True, eq=False)
class GlueScore:
    """Metrics and mean loss of a validation set that may be several sets joined."""

    metrics: dict[str, Metric]
    labels: Any
    """Labels of the validation set in its order (a numpy array)."""
    sets: tuple[tuple[str, int], ...]
    """The sets in their order: the suffix of their metrics, and how many examples each has."""
    num_outputs: int
    """Outputs a model must have: one a class, or a single one."""

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Every metric of every set, and the mean loss over all examples.

        Args:
            prediction: Outputs of the model (examples x `num_outputs`) and labels (examples).

        Returns:
            The metrics by name, with the suffix of their set, and ``loss``: cross entropy in nats, or squared error.

        Raises:
            ConfigError: If the model has another number of outputs, or the trainer changed the order of joined sets.
        """
        outputs = np.asarray(prediction.predictions, dtype=np.float64)
        labels = np.asarray(prediction.label_ids)
        if outputs.shape[1:] != (self.num_outputs,):
            raise ConfigError(
                f"the model has outputs of shape {outputs.shape[1:]}, this task needs {self.num_outputs} an example. "
                "Name a model that was trained on this task."
            )
        if len(self.sets) > 1 and not np.array_equal(labels, self.labels):
            raise ConfigError(
                "the trainer scored the validation examples in another order than they are in, so that its sets "
                "cannot be told apart. Leave trainer.train_sampling_strategy and dataloader_in_order at their "
                "defaults, or score one set: data.validation."
            )
        is_regression = self.num_outputs == 1
        predictions = outputs[:, 0] if is_regression else outputs.argmax(1)
        scores = {"loss": _mean_loss(torch.from_numpy(outputs), torch.from_numpy(labels))}
        start = 0
        for suffix, length in self.sets:
            part = slice(start, start + length) if len(self.sets) > 1 else slice(None)
            for name, metric in self.metrics.items():
                scores[name + suffix] = metric(labels[part], predictions[part])
            start += length
        return scores


def make_scoring(task: GlueTask, labels: list[int] | list[float], sets: list[tuple[str, int]]) -> Scoring:
    """How a model is scored on a task.

    Args:
        task: The task.
        labels: Those of the validation set, in its order.
        sets: The sets that it is joined of: the suffix of their metrics, and how many examples each has.

    Raises:
        ConfigError: If a metric needs a package that is not installed.
    """
    return Scoring(
        compute=GlueScore(
            metrics=find_metrics(task.metrics),
            labels=np.asarray(labels, dtype=np.float32 if task.is_regression else np.int64),
            sets=tuple(sets),
            num_outputs=len(task.label_names),
        ),
        condense=outputs_alone,
        metric=task.metric + sets[0][0],
        metrics=("loss", *(name + suffix for suffix, _ in sets for name in task.metrics)),
    )


def outputs_alone(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The outputs of the classifier, without the hidden states and the cache that some models give besides."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def find_metrics(names: tuple[str, ...]) -> dict[str, Metric]:
    """Metrics by their names: accuracy, f1, matthews_correlation, pearson, spearmanr.

    Raises:
        ConfigError: If one needs a package that is not installed.
    """
    try:
        return {name: _METRICS[name]() for name in names}
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise ConfigError(
            f"{package} is missing, which computes {' and '.join(names)}. Install it: pip install 'fullrank[eval]'"
        ) from error


def _mean_loss(outputs: Tensor, labels: Tensor) -> float:
    """Mean cross entropy (nats) of classes, or mean squared error of a single output."""
    if outputs.shape[1] == 1:
        return float(F.mse_loss(outputs[:, 0], labels.double()))
    return float(F.cross_entropy(outputs, labels))


def _accuracy() -> Metric:
    return lambda labels, predictions: float((labels == predictions).mean())


def _f1() -> Metric:
    from sklearn.metrics import f1_score

    return lambda labels, predictions: float(f1_score(labels, predictions, zero_division=0.0))


def _matthews() -> Metric:
    from sklearn.metrics import matthews_corrcoef

    return _defined(matthews_corrcoef)


def _pearson() -> Metric:
    from scipy.stats import pearsonr

    return _defined(lambda labels, predictions: pearsonr(labels, predictions)[0])


def _spearman() -> Metric:
    from scipy.stats import spearmanr

    return _defined(lambda labels, predictions: spearmanr(labels, predictions)[0])


def _defined(correlation: Metric) -> Metric:
    """A correlation that is 0 where it has no value, without the warning for it."""

    def metric(labels: Any, predictions: Any) -> float:
        if len(labels) < 2 or not np.isfinite(predictions).all():
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(correlation(labels, predictions))
        return value if math.isfinite(value) else 0.0

    return metric


_METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
