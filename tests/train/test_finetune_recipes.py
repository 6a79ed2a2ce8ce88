"""The fine-tuning recipes against the authors' scripts, and what they train against what the papers print.

Models are built on the meta device: shapes without storage.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from fullrank import SIFT
from fullrank.factors import named_factors
from fullrank.methods import METHODS
from fullrank.train.recipes import recipe_names, show_recipe
from fullrank.train.resolve import resolve

GIB = 2**30
SEVEN = [f"{part}_proj" for part in ("q", "k", "v", "o", "down", "gate", "up")]
"""Both lists of target modules in SIFT's train.py."""
FIVE = [f"{part}_proj" for part in ("q", "k", "v", "up", "down")]
"""The target modules of ft_fira.sh."""


class Published(NamedTuple):
    """What the authors' script of a fine-tuning run says, and its published score."""

    lr: float
    epochs: int
    batch: int
    """Examples on a device at once."""
    accumulation: int
    weight_decay: float
    warmup: float
    """Optimizer steps, or a share of all."""
    score: float
    options: dict[str, Any]
    """Options of the method."""
    gpus: int = 1


def sift_alpaca(lr: float, density: float, batch: int, accumulation: int, score: float) -> Published:
    options = {"density": density, "target_modules": SEVEN, "exception": []}
    return Published(lr, 3, batch, accumulation, 0.01, 0.03, score, options)


def sift_glue(lr: float, epochs: int, score: float) -> Published:
    modules = ["query", "key", "value", "attention.output.dense"]
    options = {"density": 0.008, "target_modules": modules, "exception": ["classifier"]}
    return Published(lr, epochs, 32, 1, 0.1, 0.06, score, options)


ALPACA_LORA = {"rank": 128, "lora_alpha": 256.0, "lora_dropout": 0.1, "target_modules": SEVEN}
ON_FACTORS = {
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "lora_dropout": 0.05,
    "target_modules": FIVE,
    "rank": 16,
    "update_proj_gap": 200,
    "alpha": 1.0,
    "proj_type": "std",
    "basis": "svd",
    "eps": 1e-6,
}
FINETUNE = {
    "alpaca-7b-sift": sift_alpaca(2e-4, 0.05, 4, 32, 40.7),
    "alpaca-13b-sift": sift_alpaca(9e-5, 0.04, 4, 32, 46.7),
    "alpaca-30b-sift": sift_alpaca(8e-5, 0.03, 2, 64, 55.7),
    "alpaca-7b-lora": Published(2e-4, 3, 8, 16, 0.0, 0.03, 40.7, ALPACA_LORA),
    "alpaca-13b-lora": Published(2e-4, 3, 4, 32, 0.0, 0.03, 46.7, ALPACA_LORA),
    "alpaca-30b-lora": Published(1e-4, 3, 2, 64, 0.0, 0.03, 55.9, ALPACA_LORA, gpus=4),
    "alpaca-7b-full": Published(2e-5, 3, 4, 32, 0.0, 0.03, 42.0, {}, gpus=4),
    "alpaca-13b-full": Published(2e-5, 3, 4, 32, 0.0, 0.03, 48.8, {}, gpus=4),
    "commonsense-7b-fira": Published(1e-4, 3, 4, 4, 0.0, 100, 76.9, ON_FACTORS | {"limiter_gamma": 1.01}),
    "commonsense-7b-galore": Published(1e-4, 3, 4, 4, 0.0, 100, 62.7, ON_FACTORS),
    "commonsense-7b-lora": Published(
        3e-4, 3, 4, 4, 0.0, 100, 74.7, {"rank": 32, "lora_alpha": 64.0, "lora_dropout": 0.05, "target_modules": FIVE}
    ),
    "glue-cola-sift": sift_glue(7e-5, 20, 68.5),
    "glue-mnli-sift": sift_glue(7e-5, 10, 90.6),
    "glue-mrpc-sift": sift_glue(7e-5, 20, 90.4),
    "glue-qnli-sift": sift_glue(5e-5, 10, 94.1),
    "glue-qqp-sift": sift_glue(7e-5, 20, 91.0),
    "glue-rte-sift": sift_glue(7e-5, 20, 85.9),
    "glue-sst2-sift": sift_glue(7e-5, 15, 96.2),
    "glue-stsb-sift": sift_glue(8e-5, 30, 92.3),
}
"""song-wx/SIFT, exp/instruction_finetuning/*.sh and exp/glue_benchmark/*.sh (Tables 2 and 3 of the paper);
xichen-fy/Fira, fine_tuning/ft_fira.sh (its table of commonsense tasks). The rate of commonsense-7b-lora is assumed."""

ALPACA = [name for name in FINETUNE if name.startswith("alpaca")]
COMMONSENSE = {
    "fira": "69.4 82.6 78.0 76.8 81.2 82.2 64.4 80.8",
    "galore": "69.5 82.0 75.1 32.2 18.0 80.7 65.8 78.0",
    "lora": "68.9 80.7 77.4 78.1 78.8 77.8 61.3 74.8",
}
"""BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA of LLaMA-7B, as Fira's table has them."""
HUMANEVAL = {
    "7b-sift": (11.6, 20.7),
    "7b-lora": (11.8, 20.1),
    "7b-full": (11.1, 19.5),
    "13b-sift": (15.5, 26.2),
    "13b-lora": (14.6, 25.6),
    "13b-full": (15.7, 22.0),
    "30b-sift": (24.1, 37.2),
    "30b-lora": (21.6, 33.5),
}
"""pass@1 and pass@10, SIFT's Table 3."""
GLUE = [name for name in FINETUNE if name.startswith("glue")]

LLAMA = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "30b": (6656, 17920, 60, 52)}
"""Width, intermediate, layers, heads of the pretrained LLaMA (arXiv:2302.13971); what the scripts call 30b has 33 B."""

TRAINED = {
    "alpaca-7b-sift": (0.32, 1e9),
    "alpaca-13b-sift": (0.5, 1e9),
    "alpaca-30b-sift": (0.96, 1e9),
    "glue-cola-sift": (0.8, 1e6),
    "alpaca-7b-lora": (0.32, 1e9),
    "alpaca-30b-lora": (0.98, 1e9),
}
"""Trained numbers as SIFT's paper prints them, and the unit: without the classifier (Tables 2 and 3)."""

ENTRY_BYTES = {torch.bfloat16: 18, torch.float32: 20}
"""State of a chosen entry: two moments, its value and its index 4 each, and its first value in the weight's dtype."""

SIFTS = [name for name in FINETUNE if name.endswith("-sift")]
resolved = cache(resolve)


@cache
def meta_pretrained(name: str) -> nn.Module:
    """The model that a fine-tuning recipe loads, without storage."""
    dtype = getattr(torch, resolved(f"finetune/{name}").model.dtype)
    family, size, _ = name.split("-")
    with torch.device("meta"):
        if family == "glue":
            return RobertaForSequenceClassification(
                RobertaConfig(
                    vocab_size=50265,
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    max_position_embeddings=514,
                    type_vocab_size=1,
                    num_labels={"mnli": 3, "stsb": 1}.get(size, 2),
                )
            ).to(dtype)
        width, intermediate, layers, heads = LLAMA[size]
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                vocab_size=32000,
            )
        ).to(dtype)


@cache
def sparse_numbers(name: str) -> tuple[int, int, int]:
    """Chosen entries, weights that they are in, and numbers that train densely, under a recipe of SIFT."""
    method = resolved(f"finetune/{name}").method
    sift = SIFT(meta_pretrained(name), method.density, method.target_modules, method.exception)
    entries = sum(values.numel() for values in sift.sparse_mapping.values())
    counted = entries, len(sift.sparse_mapping), sift.get_trainable_num() - entries
    sift.detach()
    return counted


def factors_of(name: str) -> dict[str, nn.Parameter]:
    """The factors that a recipe puts beside the target layers."""
    method = resolved(f"finetune/{name}").method
    rank = getattr(method, "lora_rank", None) or method.rank
    return named_factors(meta_pretrained(name), method.target_modules, rank=rank)


def test_every_recipe_is_compared() -> None:
    assert {f"finetune/{name}" for name in FINETUNE} == {n for n in recipe_names() if n.startswith("finetune/")}


@pytest.mark.parametrize("name", FINETUNE)
def test_recipe_is_the_authors_setting(name: str) -> None:
    """Every number of the authors' script that defines the run, and what their programs take by default."""
    config, published = resolve(f"finetune/{name}", command="finetune"), FINETUNE[name]
    method, trainer = config.method, config.trainer
    assert config.method_name == name.rpartition("-")[2]
    assert (method.lr, method.weight_decay, method.betas) == (published.lr, published.weight_decay, (0.9, 0.999))
    assert method.eps == published.options.get("eps", 1e-8), "that of torch's AdamW, where the script sets none"
    assert {key: getattr(method, key) for key in published.options} == published.options
    assert trainer["num_train_epochs"] == published.epochs
    assert trainer["per_device_train_batch_size"] == published.batch
    if published.gpus == 1:
        assert trainer["gradient_accumulation_steps"] == published.accumulation
    else:
        assert trainer["total_batch_size"] == published.batch * published.accumulation * published.gpus
    assert trainer["warmup_steps"] == published.warmup
    assert (trainer["lr_scheduler_type"], trainer["lr_scheduler_kwargs"]) == ("linear", {})
    assert (trainer["max_grad_norm"], config.seed, config.data.seed) == (1.0, 42, 42)
    assert config.data.tokenizer is None, "the model's own"
    assert config.data.max_examples is None
    assert f": {published.score} (" in show_recipe(f"finetune/{name}")


@pytest.mark.parametrize("name", SIFTS)
def test_sift_chooses_as_the_authors_program(name: str) -> None:
    method = resolved(f"finetune/{name}").method
    assert (method.selection, method.selection_batches, method.scope) == ("gradient", 1, "matrix")
    assert (method.granularity, method.reselect_every) == ("entry", None)


@pytest.mark.parametrize("name", GLUE)
def test_glue_recipe_keeps_its_best_epoch(name: str) -> None:
    config = resolved(f"finetune/{name}")
    assert (config.model.name, config.model.dtype) == ("FacebookAI/roberta-large", "float32")
    assert (config.data.task, config.data.name) == (name.split("-")[1], "nyu-mll/glue")
    assert (config.data.subset, config.data.validation, config.data.sequence_length) == (None, None, 512)
    trainer = config.trainer
    assert trainer["per_device_eval_batch_size"] == (32 if name == "glue-rte-sift" else 8)
    assert trainer["eval_strategy"] == trainer["save_strategy"] == "epoch"
    assert trainer["load_best_model_at_end"] is True
    assert "keeps the last" in show_recipe(f"finetune/{name}"), "it says that the authors' program does otherwise"


@pytest.mark.parametrize("name", ALPACA)
def test_alpaca_recipe_reads_as_the_authors_program(name: str) -> None:
    config, (_, size, method) = resolved(f"finetune/{name}"), name.split("-")
    data, trainer = config.data, config.trainer
    assert config.model.name == f"huggyllama/llama-{size}"
    assert config.model.dtype == ("float32" if method == "full" else "bfloat16")
    assert (data.name, data.format, data.prompt_template) == ("tatsu-lab/alpaca", "instruction", "alpaca")
    assert (data.train_on_inputs, data.packing, data.validation_size, data.sequence_length) == (False, False, 0, 512)
    assert trainer["gradient_checkpointing"] == (name == "alpaca-30b-sift")
    assert trainer["bf16"] is True
    assert (trainer["eval_strategy"], trainer["save_strategy"]) == ("no", "steps")
    assert trainer["save_steps"] == (20000 if FINETUNE[name].gpus == 4 else 2000)
    first, tenth = HUMANEVAL[f"{size}-{method}"]
    assert f"HumanEval pass@1 {first}, pass@10 {tenth}." in show_recipe(f"finetune/{name}")


@pytest.mark.parametrize("method", COMMONSENSE)
def test_commonsense_recipe_reads_as_the_authors_program(method: str) -> None:
    config, text = resolved(f"finetune/commonsense-7b-{method}"), show_recipe(f"finetune/commonsense-7b-{method}")
    data, trainer = config.data, config.trainer
    assert (config.model.name, config.model.dtype, trainer["bf16"]) == ("yahma/llama-7b-hf", "bfloat16", True)
    assert (data.name, data.format, data.prompt_template) == ("commonsense_170k.json", "instruction", "commonsense")
    assert (data.train_on_inputs, data.packing, data.validation_size, data.sequence_length) == (True, False, 120, 256)
    assert trainer["gradient_checkpointing"] is True
    assert (trainer["eval_strategy"], trainer["eval_steps"]) == ("steps", 15000)
    assert (trainer["save_strategy"], trainer["save_steps"]) == ("steps", 15000)
    assert trainer["load_best_model_at_end"] is True
    columns = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA")
    scores = COMMONSENSE[method].split()
    assert ", ".join(f"{task} {score}" for task, score in zip(columns, scores, strict=True)) in text
    mean = sum(map(float, scores)) / len(scores)
    assert mean == pytest.approx(FINETUNE[f"commonsense-7b-{method}"].score, abs=0.051), "the paper's own average"
    assert ("Assumed" in text) == (method == "lora")


def test_the_limiter_of_fira_has_its_floor() -> None:
    """The authors have none, and A's first gradient is zero: the recipe says so, since it departs from them."""
    assert resolved("finetune/commonsense-7b-fira").method.limiter_floor == 1e-3
    assert "limiter_floor: 1.0e-3  # theirs: 0" in show_recipe("finetune/commonsense-7b-fira")


@pytest.mark.parametrize("name", [name for name in FINETUNE if name.endswith("-lora")])
def test_lora_trains_its_factors_alone(name: str) -> None:
    method = resolved(f"finetune/{name}").method
    assert (method.train_embeddings, method.train_norms, method.train_head) == (False, False, False)
    assert (method.factor_dtype, method.warm_start_steps) == ("float32", 0)
    factors = factors_of(name)
    numbers = sum(factor.numel() for factor in factors.values())
    state = METHODS["lora"].state_bytes(meta_pretrained(name), method)
    assert state == 2 * 4 * numbers + 4 * len(factors), "two float32 moments and a counter each"


def test_fira_and_galore_project_the_factors() -> None:
    """State of the projected factors of LLaMA-7B: two moments of half their size, and a basis."""
    factors = factors_of("commonsense-7b-fira")
    numbers = sum(factor.numel() for factor in factors.values())
    assert numbers == factors_numel(32, FIVE, *LLAMA["7b"][:3])
    assert numbers / 6_738_415_616 == pytest.approx(0.0083, abs=0.0001), "0.83% of LLaMA-7B"
    base = meta_pretrained("commonsense-7b-fira")
    states = {m: METHODS[m].state_bytes(base, resolved(f"finetune/commonsense-7b-{m}").method) for m in COMMONSENSE}
    assert states["galore"] == 4 * (2 * numbers // 2 + len(factors) * 32 * 16) + 4 * len(factors), "and a counter each"
    assert states["fira"] - states["galore"] == 4 * len(factors), "the limiter's norm"
    assert states["fira"] == pytest.approx(states["lora"] / 2, rel=0.01)


def factors_numel(rank: int, modules: list[str], width: int, intermediate: int, layers: int) -> int:
    """Numbers in the factors of these projections of LLaMA."""
    wide = sum(module in ("up_proj", "down_proj", "gate_proj") for module in modules)
    return rank * layers * ((len(modules) - wide) * 2 * width + wide * (width + intermediate))


@pytest.mark.parametrize("name", SIFTS)
def test_sift_state_is_planned(name: str) -> None:
    """Bytes for each chosen entry and AdamW's for the classifier, whose size the labels decide."""
    config = resolved(f"finetune/{name}")
    entries, num_weights, dense = sparse_numbers(name)
    state = METHODS["sift"].state_bytes(meta_pretrained(name), config.method)
    dtype = getattr(torch, config.model.dtype)
    dense_weights = 4 if name.startswith("glue") else 0
    counters = 4 * (num_weights + dense_weights)
    assert state == ENTRY_BYTES[dtype] * entries + 2 * dtype.itemsize * dense + counters
    assert state < METHODS["full"].state_bytes(meta_pretrained(name), METHODS["full"].config())


@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_is_what_the_paper_counts(name: str) -> None:
    """The paper's number of trained entries or factors, to the digits that it prints."""
    printed, unit = TRAINED[name]
    if name.endswith("-lora"):
        numbers = sum(factor.numel() for factor in factors_of(name).values())
        assert round(numbers / unit, 2) == printed
        return
    entries, num_weights, dense = sparse_numbers(name)
    assert round(entries / unit, len(str(printed)) - 2) == printed
    if name == "glue-cola-sift":
        # weights and biases of four matrices a layer, each share rounded down, plus one
        assert entries == 24 * 4 * (int(0.008 * 1024**2) + 1 + int(0.008 * 1024) + 1)
        assert num_weights == 24 * 4 * 2
        assert dense == 1024**2 + 1024 + 2 * 1024 + 2
    else:
        assert dense == 0


def test_sift_takes_the_memory_of_the_paper() -> None:
    """Gradient and states of LLaMA-7B at 5% against Table 1 of the paper: 0.626 and 2.51 GiB.

    The paper takes 5% of every weight: of its 12.55 GiB of gradients and 50.21 GiB of float32 moments. But embeddings,
    norms and head are frozen, so what trains, 0.32 B as in its own Table 3, is 5% of 6.48 B, not of 6.74 B: counted as
    the paper counts, bfloat16 gradients and two float32 moments, ours take 4% less than it prints. What is really held
    is more: float32 gradients, the float32 values, the index, and what the entries were at first (on the host).
    """
    model, (entries, _, _) = meta_pretrained("alpaca-7b-sift"), sparse_numbers("alpaca-7b-sift")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * total / GIB == pytest.approx(12.55, abs=0.005), "its bfloat16 weights, and full gradients"
    assert 2 * 0.05 * total / GIB == pytest.approx(0.626, rel=0.003)
    assert 8 * 0.05 * total / GIB == pytest.approx(2.51, rel=0.001)
    assert 2 * entries / GIB == pytest.approx(0.626, rel=0.04)
    assert 8 * entries / GIB == pytest.approx(2.51, rel=0.04)
