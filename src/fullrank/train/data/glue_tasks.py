"""The eight tasks of GLUE: fields, labels, metrics and files of each, as the benchmark and the hub have them."""

from __future__ import annotations

from dataclasses import dataclass

LOWEST_SCORE, HIGHEST_SCORE = 0.0, 5.0
"""The bounds of an STS-B score."""


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """What is particular to one task."""

    folder: str
    """Folder of its official files."""
    text_fields: tuple[str, ...]
    """Fields of a hub row that hold its one or two texts; the label is always in ``label``."""
    text_columns: tuple[str, ...]
    """Columns of the official files that hold the same."""
    label_column: str
    """Column of the official files that holds the label."""
    label_names: tuple[str, ...]
    """The hub's names of the labels, in the order of their numbers; of a regression, the name of its value."""
    file_labels: tuple[str, ...]
    """What the official files say for each of them; none: a number from 0 to 5."""
    metrics: tuple[str, ...]
    """Metrics of the benchmark, by their names in scikit-learn and scipy."""
    metric: str
    """The one that SIFT's paper reports."""
    header: tuple[str, ...] = ()
    """Names of the columns of files that have no header line."""
    train_files: tuple[str, ...] = ("train.tsv",)
    """Names that the training file goes by."""
    validation: tuple[tuple[str, str, str], ...] = (("validation", "dev.tsv", ""),)
    """Each validation set: its split on the hub, its official file, and the suffix of its metrics."""
    skips_short_rows: bool = False
    """Whether the official files are known to hold broken lines, which the hub's dataset leaves out."""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number, not a class."""
        return not self.file_labels


_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        text_fields=("sentence",),
        text_columns=("sentence",),
        label_column="is_acceptable",
        label_names=("unacceptable", "acceptable"),
        file_labels=("0", "1"),
        metrics=("matthews_correlation",),
        metric="matthews_correlation",
        header=("source", "is_acceptable", "author_judgment", "sentence"),
    ),
    "sst2": GlueTask(
        folder="SST-2",
        text_fields=("sentence",),
        text_columns=("sentence",),
        label_column="label",
        label_names=("negative", "positive"),
        file_labels=("0", "1"),
        metrics=("accuracy",),
        metric="accuracy",
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        text_fields=("sentence1", "sentence2"),
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        label_names=("not_equivalent", "equivalent"),
        file_labels=("0", "1"),
        metrics=("accuracy", "f1"),
        metric="accuracy",
        train_files=("train.tsv", "msr_paraphrase_train.txt"),  # the second is Microsoft's, GLUE's dev set included
    ),
    "stsb": GlueTask(
        folder="STS-B",
        text_fields=("sentence1", "sentence2"),
        text_columns=("sentence1", "sentence2"),
        label_column="score",
        label_names=("score",),
        file_labels=(),
        metrics=("pearson", "spearmanr"),
        metric="pearson",
    ),
    "qqp": GlueTask(
        folder="QQP",
        text_fields=("question1", "question2"),
        text_columns=("question1", "question2"),
        label_column="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        file_labels=("0", "1"),
        metrics=("accuracy", "f1"),
        metric="accuracy",
        skips_short_rows=True,
    ),
    "mnli": GlueTask(
        folder="MNLI",
        text_fields=("premise", "hypothesis"),
        text_columns=("sentence1", "sentence2"),
        label_column="gold_label",
        label_names=("entailment", "neutral", "contradiction"),
        file_labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        metric="accuracy",
        validation=(
            ("validation_matched", "dev_matched.tsv", "_matched"),
            ("validation_mismatched", "dev_mismatched.tsv", "_mismatched"),
        ),
    ),
    "qnli": GlueTask(
        folder="QNLI",
        text_fields=("question", "sentence"),
        text_columns=("question", "sentence"),
        label_column="label",
        label_names=_ENTAILMENT,
        file_labels=_ENTAILMENT,
        metrics=("accuracy",),
        metric="accuracy",
    ),
    "rte": GlueTask(
        folder="RTE",
        text_fields=("sentence1", "sentence2"),
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        label_names=_ENTAILMENT,
        file_labels=_ENTAILMENT,
        metrics=("accuracy",),
        metric="accuracy",
    ),
}
"""Every task by its name on the hub."""
