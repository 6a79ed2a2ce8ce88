"""Every packaged recipe resolves, says what it is, and plans a memory that agrees with the papers.

Models are built on the meta device: shapes without storage, so that even 7B takes no memory.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fullrank
from fullrank.methods import METHODS
from fullrank.params import match_parameters
from fullrank.train.config import RunConfig
from fullrank.train.model import PAPER_SIZES
from fullrank.train.resolve import describe_recipes, recipe_names, resolve, show_recipe

RECIPES = Path(fullrank.__file__).parent / "recipes"
NAMES = recipe_names()
SIZES = ("60m", "130m", "350m", "1b", "7b")
T5_VOCABULARY = 32100
"""Tokens of the T5 tokenizer, its 100 sentinels included; the authors' models have 32000 rows."""

GIB = 2**30
FIRA_MEMORY = {"60m": 0.36, "130m": 0.77, "350m": 1.90, "1b": 6.98}
"""Parameters, gradients and states, in the G of arXiv:2410.01623, Table 3."""

resolved = cache(resolve)


@cache
def meta_model(size: str, vocabulary: int) -> LlamaForCausalLM:
    """The bfloat16 LLaMA of a paper, without storage."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **PAPER_SIZES[size]._asdict()))
    return model.to(torch.bfloat16)


def model_of(config: RunConfig) -> LlamaForCausalLM:
    vocabulary = T5_VOCABULARY if config.data.tokenizer == "t5-base" else config.data.vocab_size
    return meta_model(config.model.name, vocabulary)


def test_all_recipes_are_found() -> None:
    assert len(NAMES) == len(list(RECIPES.rglob("*.yaml"))) == 1 + len(SIZES) * len(METHODS)
    assert {f"pretrain/{size}-{method}" for size in SIZES for method in METHODS} == set(NAMES) - {"quickstart"}


def test_every_size_has_every_method() -> None:
    counts = Counter(resolved(name).method_name for name in NAMES if name != "quickstart")
    assert counts == dict.fromkeys(METHODS, len(SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves(name: str) -> None:
    config = resolved(name)
    assert config.model.name in PAPER_SIZES
    assert config.trainer["max_steps"] >= config.trainer["warmup_steps"]
    assert resolve(config.to_dict()) == config, "the resolved file in a run's folder gives the same run"


@pytest.mark.parametrize("name", NAMES)
def test_first_line_describes(name: str) -> None:
    first = show_recipe(name).splitlines()[0]
    assert first.startswith("# ")
    assert 20 < len(first) <= 120
    assert first[2:] in describe_recipes()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_recipe_is_the_papers_setting(name: str) -> None:
    """What all of them share: data, batch, precision, warm-up of a tenth, the schedule to a tenth."""
    config = resolved(name)
    size, method = name.removeprefix("pretrain/").split("-")
    assert (config.model.name, config.method_name) == (f"llama-{size}", method)
    assert (config.data.name, config.data.subset, config.data.tokenizer) == ("allenai/c4", "en", "t5-base")
    assert (config.data.sequence_length, config.data.packing, config.data.streaming) == (256, False, True)
    assert config.model.dtype == "bfloat16"
    trainer = config.trainer
    assert trainer["total_batch_size"] == 512
    assert 512 % trainer["per_device_train_batch_size"] == 0
    assert trainer["warmup_steps"] == trainer["max_steps"] / 10
    assert trainer["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert trainer["eval_steps"] == 1000
    assert config.method.weight_decay == 0.0
    if method in ("fira", "galore"):
        assert config.method.basis == "svd"
    if method != "full":
        assert config.method.state_dtype is None


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_is_planned(name: str) -> None:
    """Rank and target modules fit the model; a projected method needs less state than AdamW."""
    config = resolved(name)
    model = model_of(config)
    state = METHODS[config.method_name].state_bytes(model, config.method)
    adamw = METHODS["full"].state_bytes(model, METHODS["full"].config())
    if config.method_name == "full":
        assert state == adamw
    else:
        assert 0 < state < adamw


@pytest.mark.parametrize("size", FIRA_MEMORY)
def test_fira_takes_the_memory_of_the_paper(size: str) -> None:
    """Bytes of weights, gradients and states against Table 3 of the paper.

    The paper counts every number as bfloat16 (Appendix C.1) and does not print the items. Counted so, ours
    are within 7% of it; 130M is the farthest. The vocabulary (32100 rows, not 32000) explains 0.2% at most. The
    rest we cannot trace: the papers' 1B weights (2.60 G; arXiv:2403.03507, Table 6) are themselves 4% above
    those of their configuration. What is really held is more, because the basis is float32: within 12%.
    """
    config = resolved(f"pretrain/{size}-fira")
    model = model_of(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = METHODS["fira"].state_bytes(model, config.method)
    projected, _ = match_parameters(model, config.method.target_modules, min_ndim=2)
    half_basis = sum(2 * min(p.shape) * config.method.rank for p in projected.values())
    assert (2 * weights + state - half_basis) / GIB == pytest.approx(FIRA_MEMORY[size], rel=0.07)
    assert (2 * weights + state) / GIB == pytest.approx(FIRA_MEMORY[size], rel=0.12)


def test_fira_saves_the_state_of_the_paper() -> None:
    """At 1B the paper saves 61.1% of the optimizer state (section 5.1), everything counted as bfloat16."""
    config = resolved("pretrain/1b-fira")
    model = model_of(config)
    projected, _ = match_parameters(model, config.method.target_modules, min_ndim=2)
    half_basis = sum(2 * min(p.shape) * config.method.rank for p in projected.values())
    state = METHODS["fira"].state_bytes(model, config.method) - half_basis
    saved = 1 - state / METHODS["full"].state_bytes(model, METHODS["full"].config())
    assert saved == pytest.approx(0.611, abs=0.002)
