"""Every packaged recipe resolves, says what it is, and plans a memory that agrees with the papers.

Models are built on the meta device: shapes without storage, so that even 7B takes no memory.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import fullrank
from fullrank.methods import METHODS
from fullrank.params import match_parameters
from fullrank.train.config import GLUE_TASKS
from fullrank.train.model import PAPER_SIZES
from fullrank.train.recipes import describe_recipes, recipe_names, show_recipe
from fullrank.train.resolve import resolve
from tests.train.networks import model_of

RECIPES = Path(fullrank.__file__).parent / "recipes"
NAMES = recipe_names()
PRETRAIN = [name for name in NAMES if name.startswith("pretrain/")]
SIZES = ("60m", "130m", "350m", "1b", "7b")
SIZES_OF = {
    **{method: SIZES for method in METHODS if method not in ("lora", "relora", "sift")},
    "lora": SIZES[:-1],
    "relora": ("60m", "130m", "250m", "350m", "1b"),
    "sift": ("60m",),
}
"""LoRA: the sizes of GaLore's Table 2. SIFT's paper does not pre-train; it has one recipe in that loop all the same."""
FINETUNE = {
    "sift": [f"alpaca-{size}" for size in ("7b", "13b", "30b")] + [f"glue-{task}" for task in GLUE_TASKS],
    "lora": ["alpaca-7b", "alpaca-13b", "alpaca-30b", "commonsense-7b"],
    "full": ["alpaca-7b", "alpaca-13b"],
    "fira": ["commonsense-7b"],
    "galore": ["commonsense-7b"],
}
"""The published runs by method; what they hold is in test_finetune_recipes.py."""
GIB = 2**30
FIRA_MEMORY = {"60m": 0.36, "130m": 0.77, "350m": 1.90, "1b": 6.98}
"""Parameters, gradients and states, in the G of arXiv:2410.01623, Table 3."""


resolved = cache(resolve)


def test_all_recipes_are_found() -> None:
    """A file that nobody asked for, or a recipe that is gone, fails here."""
    num_pretrain = sum(len(sizes) for sizes in SIZES_OF.values())
    num_finetune = sum(len(runs) for runs in FINETUNE.values())
    assert len(NAMES) == len(list(RECIPES.rglob("*.yaml"))) == 1 + num_pretrain + num_finetune
    assert {
        *(f"pretrain/{size}-{method}" for method, sizes in SIZES_OF.items() for size in sizes),
        *(f"finetune/{run}-{method}" for method, runs in FINETUNE.items() for run in runs),
        "quickstart",
    } == set(NAMES)


def test_every_method_has_its_sizes() -> None:
    counts = Counter(resolved(name).method_name for name in PRETRAIN)
    assert counts == {method: len(sizes) for method, sizes in SIZES_OF.items()}
    assert set(counts) == set(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves(name: str) -> None:
    config = resolved(name)
    assert resolve(config.to_dict()) == config, "the resolved file in a run's folder gives the same run"
    assert config.command == name.replace("quickstart", "pretrain").partition("/")[0]
    if config.command == "finetune":
        assert config.model.pretrained
        assert "max_steps" not in config.trainer
    else:
        assert config.model.name in PAPER_SIZES or config.model.pretrained
        assert config.trainer["max_steps"] >= config.trainer["warmup_steps"]


@pytest.mark.parametrize("name", NAMES)
def test_first_line_describes(name: str) -> None:
    first = show_recipe(name).splitlines()[0]
    assert first.startswith("# ")
    assert 20 < len(first) <= 120
    assert first[2:] in describe_recipes()


@pytest.mark.parametrize("name", [name for name in PRETRAIN if not name.endswith("-relora")])
def test_recipe_is_the_papers_setting(name: str) -> None:
    """What all of them but ReLoRA's share: data, batch, precision, warm-up of a tenth, the schedule to a tenth."""
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
    if method in ("fira", "galore", "apollo"):
        assert config.method.state_dtype is None
    if method == "lora":
        assert (config.method.lora_alpha, config.method.lora_dropout, config.method.eps) == (32.0, 0.05, 1e-8)
        assert config.method.rank == resolved(f"pretrain/{size}-galore").method.rank, "Table 2 has one rank for all"
        assert (config.method.factor_dtype, config.method.warm_start_steps) == (None, 0)


@pytest.mark.parametrize("name", [*PRETRAIN, "quickstart"])
def test_optimizer_state_is_planned(name: str) -> None:
    """Rank and target modules fit the model; all but a full-rank warm start need less state than AdamW."""
    config = resolved(name)
    model = model_of(config)
    state = METHODS[config.method_name].state_bytes(model, config.method)
    adamw = METHODS["full"].state_bytes(model, METHODS["full"].config())
    if config.method_name == "full" or getattr(config.method, "warm_start_steps", 0):
        assert state == adamw
    else:
        assert 0 < state < adamw


def test_sift_pretrains_beside_fira() -> None:
    """The one SIFT recipe that is not its paper's: Fira's run and Fira's state, with nothing frozen."""
    sift, fira = resolved("pretrain/60m-sift"), resolved("pretrain/60m-fira")
    assert (sift.model, sift.data, sift.trainer, sift.seed) == (fira.model, fira.data, fira.trainer, fira.seed)
    assert sift.method.reselect_every == fira.method.update_proj_gap
    assert sift.method.lr == resolved("pretrain/60m-full").method.lr
    model = model_of(sift)
    patterns = [*sift.method.target_modules, *sift.method.exception]
    assert not match_parameters(model, patterns)[1], "every weight of the model trains, sparsely or densely"
    planned = METHODS["sift"].state_bytes(model, sift.method)
    assert planned == pytest.approx(METHODS["fira"].state_bytes(model, fira.method), rel=0.01)


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
