"""Numbers of the papers, to be printed beside ours where model, method and task are theirs.

Sources: Fira's table of commonsense tasks (arXiv 2410.01623v3: LLaMA-7B trained on Commonsense170K, scored by
generation; its other rows are taken as that paper prints them), and SIFT's tables of GLUE (RoBERTa-large) and
of MMLU without solved examples and HumanEval (LLaMA trained on Alpaca; arXiv 2312.11875, from the figures in the
authors' repository). All are percentages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fullrank.evaluation.tasks import COMMONSENSE, GLUE

FIRA, SIFT = "Fira, arXiv 2410.01623", "SIFT, arXiv 2312.11875"
VANILLA = "vanilla"
"""The method of a model that nobody trained further."""


@dataclass(frozen=True)
class Published:
    """A paper's number (%)."""

    value: float
    source: str
    protocol: str
    """How it was obtained, in the words of our protocols."""


BASES = {
    "llama-7b": ("huggyllama/llama-7b", "yahma/llama-7b-hf", "decapoda-research/llama-7b-hf"),
    "llama-13b": ("huggyllama/llama-13b", "yahma/llama-13b-hf", "decapoda-research/llama-13b-hf"),
    "llama-30b": ("huggyllama/llama-30b", "decapoda-research/llama-30b-hf"),
    "roberta-large": ("FacebookAI/roberta-large", "roberta-large"),
}
"""The papers' models and their names on the hub. A name without owner, such as llama-7b, is a size of ours."""

SIZES = {"llama-7b": 6.74e9, "llama-13b": 13.02e9, "llama-30b": 32.53e9, "roberta-large": 3.55e8}
"""Parameters of these models."""

_COMMONSENSE_LLAMA_7B = {
    "fira": (69.4, 82.6, 78.0, 76.8, 81.2, 82.2, 64.4, 80.8, 76.9),
    "galore": (69.5, 82.0, 75.1, 32.2, 18.0, 80.7, 65.8, 78.0, 62.7),
    "lora": (68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8, 74.7),
    "relora": (68.9, 81.2, 77.8, 46.0, 79.4, 80.2, 64.2, 79.6, 72.2),
    "full": (64.2, 68.1, 68.0, 42.3, 66.5, 55.6, 43.9, 60.0, 58.6),
}
"""Method -> BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA, average."""

_GLUE_ROBERTA_LARGE = {
    "full": (90.2, 96.4, 90.9, 68.0, 94.7, 92.2, 86.6, 92.4, 88.9),
    "sift": (90.6, 96.2, 90.4, 68.5, 94.1, 91.0, 85.9, 92.3, 88.6),
    "lora": (90.6, 96.2, 90.2, 68.2, 94.8, 91.6, 85.2, 92.3, 88.6),
}
"""Method -> MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B, average."""

_ALPACA = {
    "llama-7b": {
        VANILLA: (32.7, 11.3, 16.5),
        "full": (42.0, 11.1, 19.5),
        "lora": (40.7, 11.8, 20.1),
        "sift": (40.7, 11.6, 20.7),
    },
    "llama-13b": {
        VANILLA: (43.6, 14.3, 24.4),
        "full": (48.8, 15.7, 22.0),
        "lora": (46.7, 14.6, 25.6),
        "sift": (46.7, 15.5, 26.2),
    },
    "llama-30b": {VANILLA: (54.3, 20.9, 36.0), "lora": (55.9, 21.6, 33.5), "sift": (55.7, 24.1, 37.2)},
}
"""Base -> method -> MMLU without solved examples, HumanEval pass@1, pass@10. The 33B model is called 30b on the hub."""


def base_of(name: str) -> str | None:
    """The papers' name of a model by its hub name or the folder of a copy; None if it is none of theirs."""
    for base, names in BASES.items():
        if name.lower() in [hub.lower() for hub in names]:
            return base
        copies = {base, *(hub.rpartition("/")[2] for hub in names)}
        if "/" in name and name.rstrip("/").rpartition("/")[2].lower() in copies:
            return base
    return None


def is_theirs(name: str, num_parameters: int) -> bool:
    """Whether a model of this name is one of the papers', by its size too: a folder may be called anything."""
    base = base_of(name)
    return base is not None and 0.95 < num_parameters / SIZES[base] < 1.05


def published(task: str, metric: str, *, base: str, method: str | None, num_fewshot: int = 0) -> Published | None:
    """A paper's number for this task, model and method; None if there is none.

    Args:
        task: A task, or a group for its average.
        metric: Name of our metric; HumanEval's and GLUE's have one number each.
        base: Name of the model that training started from.
        method: Name of the method; None: unknown.
        num_fewshot: Solved examples in the prompt; MMLU's number is without.
    """
    model = base_of(base)
    if model is None or method is None:
        return None
    if task in (*COMMONSENSE, "commonsense") and model == "llama-7b":
        return _at(_COMMONSENSE_LLAMA_7B, method, (*COMMONSENSE, "commonsense"), task, FIRA, "generate")
    if task in (*GLUE, "glue") and model == "roberta-large":
        return _at(_GLUE_ROBERTA_LARGE, method, (*GLUE, "glue"), task, SIFT, "classifier")
    if task == "mmlu" and num_fewshot == 0:
        return _at(_ALPACA.get(model, {}), method, ("mmlu",), task, SIFT, "ranking")
    if task == "humaneval":
        return _at(_ALPACA.get(model, {}), method, ("mmlu", "pass@1", "pass@10"), metric, SIFT, "execution")
    return None


def _at(
    rows: Mapping[str, tuple[float, ...]],
    method: str,
    columns: tuple[str, ...],
    column: str,
    source: str,
    protocol: str,
) -> Published | None:
    """The number of a table at a row and a column, if it has both."""
    if method not in rows or column not in columns:
        return None
    return Published(rows[method][columns.index(column)], source, protocol)
