"""The papers' numbers: that they are the papers', by which method and size, and what sets them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fullrank import METHODS
from fullrank.report.comparison import Comparison, compare_runs
from fullrank.report.published import SIZES, beside, differences, is_published, published_for, section, size_of
from fullrank.report.runs import read_run
from tests.report.made import write_run


def compared(folder: Path, *runs: dict[str, Any]) -> Comparison:
    made = [read_run(write_run(folder / str(number), **options)) for number, options in enumerate(runs)]
    return compare_runs(made, title="a title")


@pytest.mark.parametrize(
    ("model", "method", "values"),
    [
        ("llama-60m", "fira", [31.06, 31.06, 30.34]),
        ("llama-350m", "fira", [16.85, 17.03, 16.82]),
        ("llama-1b", "fira", [14.31, 14.31, 15.10]),
        ("llama-60m", "full", [34.06, 33.81, 30.05]),
        ("llama-250m", "full", [22.39]),
        ("llama-1b", "full", [15.56, 16.52, 13.97]),
        ("llama-130m", "galore", [25.36, 25.36, 25.31]),
        ("llama-60m", "apollo", [31.55, 31.26, 31.93, 30.94]),
        ("llama-60m", "relora", [34.46, 37.04]),
        ("llama-250m", "relora", [22.48]),
        ("llama-130m", "lora", [25.46, 33.92]),
        ("llama-7b", "apollo", [13.02, 13.09]),
        ("llama-7b", "fira", []),
        ("llama-60m", "sift", []),
    ],
)
def test_values(model: str, method: str, values: list[float]) -> None:
    found = published_for(model, method)
    assert [number.value for number in found] == values
    assert {number.size for number in found} <= {size_of(model)}


def test_each_says_where_it_is_from() -> None:
    for size in SIZES:
        for method in METHODS:
            for number in published_for(f"llama-{size}", method):
                assert "arXiv 2" in number.source
                assert number.method == method
                assert (number.memory_gb is None) == (number.memory_of == "")


def test_memory_and_tokens() -> None:
    fira, _, scale = published_for("llama-1b", "fira")
    assert (fira.memory_gb, fira.tokens) == (6.98, 13.1e9)
    assert "gradients" in fira.memory_of
    assert scale.tokens is None
    assert "gradients" not in published_for("llama-1b", "galore")[0].memory_of
    assert published_for("llama-350m", "relora")[0].tokens == 6.8e9


@pytest.mark.parametrize("model", ["llama-20m", "gpt2", "my/llama-60m-copy"])
def test_other_models_get_the_smallest_size(model: str) -> None:
    assert not is_published(model)
    assert [number.size for number in published_for(model, "fira")] == ["60m"] * 3


def test_beside_ours(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path,
        {"method": "fira", "perplexity": 100.0},
        {"method": "sift", "perplexity": 120.0},
        {"method": "full", "perplexity": None},
    )
    ((row, numbers),) = beside(comparison)
    assert (row.label, numbers[0].value) == ("fira", 31.06)
    content = section(comparison)
    assert json.loads(json.dumps(content)) == content
    assert content["rows"][0]["ours"] == 100.0
    assert content["rows"][0]["published"][0]["source"] == "Fira, arXiv 2410.01623, Table 3"


def test_what_sets_a_small_trial_apart(tmp_path: Path) -> None:
    text = "\n".join(differences(compared(tmp_path, {"method": "fira"}, {"method": "relora", "perplexity": 40.0})))
    for part in (
        "None of these papers has numbers of llama-20m",
        "bfloat16, these runs in float32",
        "C4, these runs' is text.jsonl",
        "a BPE of 2,048 tokens",
        "these runs take 128 of joined documents",
        "1.1B or 1.2B tokens at this size, the best fira run on 20,000",
        "one here 1,000 tokens",
        "34.06 at 60M, where a tuned one reaches 30.05",
        "1 learning rate.",
        "n + 1",
        "relora without one",
    ):
        assert part in text


def test_a_run_of_the_papers_differs_in_little(tmp_path: Path) -> None:
    data = {"name": "allenai/c4", "tokenizer": "t5-base", "sequence_length": 256, "packing": False}
    config = {"model": {"name": "llama-130m", "dtype": "bfloat16"}, "data": data}
    rates = [{"method": "fira", "lr": lr, "config": config} for lr in (0.01, 0.02)]
    found = differences(compared(tmp_path, *rates))
    text = "\n".join(found)
    assert "None of these papers" not in text
    assert not [word for word in ("C4", "T5", "bfloat16", "cut each document", "warm start") if word in text]
    assert "25.08 at 130M, where a tuned one reaches 23.13" in text
    assert "2 learning rates." in text
    assert "n + 1" in text


def test_another_shape_of_the_model_is_told(tmp_path: Path) -> None:
    config = {"model": {"name": "llama-60m", "overrides": {"hidden_size": 32}}}
    found = differences(compared(tmp_path, {"method": "fira", "config": config}))
    assert "The model here departs from the papers': hidden_size." in found


def test_the_full_rank_row_is_not_called_untuned_where_it_is_as_good(tmp_path: Path) -> None:
    """At 350M an independent tuned Adam is no better."""
    found = differences(compared(tmp_path, {"method": "fira", "config": {"model": {"name": "llama-350m"}}}))
    assert not [line for line in found if "not well tuned" in line]


def test_the_warm_start_of_ours_is_told(tmp_path: Path) -> None:
    run = {"method": "relora", "config": {"method": {"warm_start_steps": 2000}}}
    assert any("relora after 2,000 full-rank steps" in line for line in differences(compared(tmp_path, run)))


def test_a_pretrained_model_has_no_published_number(tmp_path: Path) -> None:
    run = {"method": "relora", "config": {"model": {"name": "EleutherAI/pythia-1b", "pretrained": True}}}
    comparison = compared(tmp_path, run)
    assert (section(comparison), differences(comparison)) == ({}, [])


@pytest.mark.parametrize(("parameters", "shown"), [(355_000_000, True), (4_000_000, False)])
def test_scores_of_glue(tmp_path: Path, parameters: int, shown: bool) -> None:
    run = {
        "method": "sift",
        "scores": {"loss": 0.2, "accuracy": 0.95},
        "metric": "accuracy",
        "task": "sst2",
        "config": {"model": {"name": "FacebookAI/roberta-large", "pretrained": True}},
        "result": {"parameters": parameters},
    }
    found = beside(compared(tmp_path, run))
    assert [number.value for _, numbers in found for number in numbers] == ([pytest.approx(0.962)] if shown else [])
