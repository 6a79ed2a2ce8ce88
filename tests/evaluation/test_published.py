"""Papers' numbers appear beside their own models, methods and tasks alone."""

from __future__ import annotations

import pytest

from fullrank.evaluation.published import base_of, published


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("huggyllama/llama-7b", "llama-7b"),
        ("yahma/llama-7b-hf", "llama-7b"),
        ("Huggyllama/LLaMA-7B", "llama-7b"),
        ("/models/llama-7b-hf/", "llama-7b"),
        ("FacebookAI/roberta-large", "roberta-large"),
        ("roberta-large", "roberta-large"),
        ("huggyllama/llama-30b", "llama-30b"),
        ("llama-7b", None),  # a size of ours, with random weights
        ("meta-llama/Llama-2-7b-hf", None),
        ("FacebookAI/roberta-base", None),
    ],
)
def test_names_of_the_papers_models(name: str, base: str | None) -> None:
    assert base_of(name) == base


@pytest.mark.parametrize(
    ("task", "metric", "base", "method", "value"),
    [
        ("boolq", "accuracy", "yahma/llama-7b-hf", "fira", 69.4),
        ("openbookqa", "acc_norm", "yahma/llama-7b-hf", "lora", 74.8),
        ("commonsense", "accuracy", "yahma/llama-7b-hf", "full", 58.6),
        ("cola", "matthews_correlation", "roberta-large", "sift", 68.5),
        ("stsb", "pearson", "roberta-large", "full", 92.4),
        ("glue", "average", "roberta-large", "lora", 88.6),
        ("mmlu", "acc", "huggyllama/llama-7b", "sift", 40.7),
        ("mmlu", "acc", "huggyllama/llama-13b", "vanilla", 43.6),
        ("humaneval", "pass@1", "huggyllama/llama-30b", "sift", 24.1),
        ("humaneval", "pass@10", "huggyllama/llama-30b", "sift", 37.2),
    ],
)
def test_numbers(task: str, metric: str, base: str, method: str, value: float) -> None:
    found = published(task, metric, base=base, method=method)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    ("task", "metric", "base", "method", "num_fewshot"),
    [
        ("boolq", "accuracy", "yahma/llama-7b-hf", "apollo", 0),
        ("boolq", "accuracy", "yahma/llama-7b-hf", None, 0),
        ("boolq", "accuracy", "huggyllama/llama-13b", "fira", 0),
        ("boolq", "accuracy", "llama-7b", "fira", 0),
        ("cola", "matthews_correlation", "roberta-base", "sift", 0),
        ("mmlu", "acc", "huggyllama/llama-7b", "sift", 5),
        ("mmlu", "acc", "huggyllama/llama-7b", "fira", 0),
        ("mmlu_stem", "acc", "huggyllama/llama-7b", "sift", 0),
        ("mmlu", "acc", "huggyllama/llama-30b", "full", 0),
        ("humaneval", "pass@100", "huggyllama/llama-7b", "sift", 0),
        ("perplexity", "perplexity", "huggyllama/llama-7b", "full", 0),
    ],
)
def test_nothing_beside_others(task: str, metric: str, base: str, method: str | None, num_fewshot: int) -> None:
    assert published(task, metric, base=base, method=method, num_fewshot=num_fewshot) is None
