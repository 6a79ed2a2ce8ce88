"""Every packaged recipe resolves, says what it is, and plans a memory that agrees with the papers.

Models are built on the meta device: shapes without storage, so that even 7B takes no memory.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import fullrank
from fullrank import SIFT
from fullrank.methods import METHODS
from fullrank.params import match_parameters
from fullrank.train.model import PAPER_SIZES
from fullrank.train.resolve import describe_recipes, recipe_names, resolve, show_recipe
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
GIB = 2**30
FIRA_MEMORY = {"60m": 0.36, "130m": 0.77, "350m": 1.90, "1b": 6.98}
"""Parameters, gradients and states, in the G of arXiv:2410.01623, Table 3."""


class Published(NamedTuple):
    """What the authors' script of a fine-tuning run says, and its first published score."""

    lr: float
    density: float
    epochs: int
    batch: int
    accumulation: int
    weight_decay: float
    warmup: float
    score: float


FINETUNE = {
    "alpaca-7b": Published(2e-4, 0.05, 3, 4, 32, 0.01, 0.03, 40.7),
    "alpaca-13b": Published(9e-5, 0.04, 3, 4, 32, 0.01, 0.03, 46.7),
    "alpaca-30b": Published(8e-5, 0.03, 3, 2, 64, 0.01, 0.03, 55.7),
    "glue-cola": Published(7e-5, 0.008, 20, 32, 1, 0.1, 0.06, 68.5),
    "glue-mnli": Published(7e-5, 0.008, 10, 32, 1, 0.1, 0.06, 90.6),
    "glue-mrpc": Published(7e-5, 0.008, 20, 32, 1, 0.1, 0.06, 90.4),
    "glue-qnli": Published(5e-5, 0.008, 10, 32, 1, 0.1, 0.06, 94.1),
    "glue-qqp": Published(7e-5, 0.008, 20, 32, 1, 0.1, 0.06, 91.0),
    "glue-rte": Published(7e-5, 0.008, 20, 32, 1, 0.1, 0.06, 85.9),
    "glue-sst2": Published(7e-5, 0.008, 15, 32, 1, 0.1, 0.06, 96.2),
    "glue-stsb": Published(8e-5, 0.008, 30, 32, 1, 0.1, 0.06, 92.3),
}
"""song-wx/SIFT, exp/instruction_finetuning/sparse_*.sh and exp/glue_benchmark/*.sh; scores: Tables 2 and 3."""

LLAMA = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "30b": (6656, 17920, 60, 52)}
"""Width, intermediate, layers, heads of the pretrained LLaMA (arXiv:2302.13971); what the script calls 30b has 33 B."""

SIFT_ENTRIES = {"alpaca-7b": (0.32, 1e9), "alpaca-13b": (0.5, 1e9), "alpaca-30b": (0.96, 1e9), "glue-cola": (0.8, 1e6)}
"""Trained entries as the paper prints them, and the unit: without the classifier (Tables 2 and 3)."""

ENTRY_BYTES = {torch.bfloat16: 18, torch.float32: 20}
"""State of a chosen entry: two moments, its value and its index 4 each, and its first value in the weight's dtype."""

resolved = cache(resolve)


@cache
def meta_pretrained(name: str) -> nn.Module:
    """The model that a fine-tuning recipe loads, without storage."""
    dtype = getattr(torch, resolved(f"finetune/{name}-sift").model.dtype)
    with torch.device("meta"):
        if name.startswith("glue"):
            return RobertaForSequenceClassification(
                RobertaConfig(
                    vocab_size=50265,
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    max_position_embeddings=514,
                    type_vocab_size=1,
                    num_labels={"glue-mnli": 3, "glue-stsb": 1}.get(name, 2),
                )
            ).to(dtype)
        width, intermediate, layers, heads = LLAMA[name.removeprefix("alpaca-")]
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
    """Chosen entries, weights that they are in, and numbers that train densely, under a fine-tuning recipe."""
    method = resolved(f"finetune/{name}-sift").method
    sift = SIFT(meta_pretrained(name), method.density, method.target_modules, method.exception)
    entries = sum(values.numel() for values in sift.sparse_mapping.values())
    counted = entries, len(sift.sparse_mapping), sift.get_trainable_num() - entries
    sift.detach()
    return counted


def test_all_recipes_are_found() -> None:
    """A file that nobody asked for, or a recipe that is gone, fails here."""
    num_pretrain = sum(len(sizes) for sizes in SIZES_OF.values())
    assert len(NAMES) == len(list(RECIPES.rglob("*.yaml"))) == 1 + num_pretrain + len(FINETUNE)
    assert {
        *(f"pretrain/{size}-{method}" for method, sizes in SIZES_OF.items() for size in sizes),
        *(f"finetune/{name}-sift" for name in FINETUNE),
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
    if name.startswith("finetune/"):
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


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_recipe_is_the_papers_setting(name: str) -> None:
    """Every number of the authors' script that defines the run, and what their programs take by default."""
    config, published = resolved(f"finetune/{name}-sift"), FINETUNE[name]
    method, trainer = config.method, config.trainer
    assert config.method_name == "sift"
    assert (method.lr, method.density) == (published.lr, published.density)
    assert method.weight_decay == published.weight_decay
    assert (method.betas, method.eps) == ((0.9, 0.999), 1e-8), "AdamW of torch, its defaults"
    assert (method.selection, method.selection_batches, method.scope) == ("gradient", 1, "matrix")
    assert (method.granularity, method.reselect_every) == ("entry", None)
    assert trainer["num_train_epochs"] == published.epochs
    assert trainer["per_device_train_batch_size"] == published.batch
    assert trainer["gradient_accumulation_steps"] == published.accumulation
    assert trainer["warmup_steps"] == published.warmup, "a fraction of all steps"
    assert (trainer["lr_scheduler_type"], trainer["lr_scheduler_kwargs"]) == ("linear", {})
    assert (trainer["max_grad_norm"], config.seed) == (1.0, 42)
    assert (config.data.sequence_length, config.data.packing) == (512, False)
    assert config.data.tokenizer == config.model.name
    assert f" {published.score} " in show_recipe(f"finetune/{name}-sift")
    assert "`fullrank finetune`" in show_recipe(f"finetune/{name}-sift"), "it says which command will run it"
    if name.startswith("glue"):
        assert (config.model.name, config.model.dtype) == ("FacebookAI/roberta-large", "float32")
        assert (config.data.name, config.data.subset) == ("nyu-mll/glue", name.removeprefix("glue-"))
        assert (method.target_modules, method.exception) == (
            ["query", "key", "value", "attention.output.dense"],
            ["classifier"],
        )
        assert trainer["eval_strategy"] == "epoch"
    else:
        assert (config.model.name, config.model.dtype) == (f"huggyllama/llama-{name[7:]}", "bfloat16")
        assert config.data.name == "tatsu-lab/alpaca"
        assert {f"{part}_proj" for part in ("q", "k", "v", "o", "down", "gate", "up")} == set(method.target_modules)
        assert method.exception == []
        assert trainer["gradient_checkpointing"] == (name == "alpaca-30b")
        assert trainer["eval_strategy"] == "no"


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_state_is_planned(name: str) -> None:
    """Bytes for each chosen entry and AdamW's for the classifier, whose size the labels decide."""
    config = resolved(f"finetune/{name}-sift")
    entries, num_weights, dense = sparse_numbers(name)
    state = METHODS["sift"].state_bytes(meta_pretrained(name), config.method)
    dtype = getattr(torch, config.model.dtype)
    dense_weights = 4 if name.startswith("glue") else 0
    counters = 4 * (num_weights + dense_weights)
    assert state == ENTRY_BYTES[dtype] * entries + 2 * dtype.itemsize * dense + counters
    assert state < METHODS["full"].state_bytes(meta_pretrained(name), METHODS["full"].config())


@pytest.mark.parametrize("name", SIFT_ENTRIES)
def test_sift_trains_the_entries_of_the_paper(name: str) -> None:
    """The paper's number of trained entries, to the digits that it prints."""
    entries, num_weights, dense = sparse_numbers(name)
    printed, unit = SIFT_ENTRIES[name]
    assert round(entries / unit, len(str(printed)) - 2) == printed
    if name == "glue-cola":
        # weights and biases of four matrices a layer, each share rounded down, plus one
        assert entries == 24 * 4 * (int(0.008 * 1024**2) + 1 + int(0.008 * 1024) + 1)
        assert num_weights == 24 * 4 * 2
        assert dense == 1024**2 + 1024 + 2 * 1024 + 2
    else:
        assert dense == 0


def test_sift_takes_the_memory_of_the_paper() -> None:
    """Gradient and states of LLaMA-7B at 5% against Table 1 of the paper: 0.626 and 2.51 GiB.

    The paper takes 5% of every weight of the model: of its 12.55 GiB of gradients and 50.21 GiB of float32 moments.
    But embeddings, norms and head are frozen, so the entries that train, 0.32 B as in its own Table 3, are 5%
    of 6.48 B, not of 6.74 B: counted as the paper counts, bfloat16 gradients and two float32 moments, ours take 4%
    less than it prints. What is really held is more: float32 gradients (its code has bfloat16 ones, and bfloat16
    moments too), the float32 values, the index, and what the entries were at first, which lies on the host.
    """
    model, (entries, _, _) = meta_pretrained("alpaca-7b"), sparse_numbers("alpaca-7b")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * total / GIB == pytest.approx(12.55, abs=0.005), "its bfloat16 weights, and full gradients"
    assert 2 * 0.05 * total / GIB == pytest.approx(0.626, rel=0.003)
    assert 8 * 0.05 * total / GIB == pytest.approx(2.51, rel=0.001)
    assert 2 * entries / GIB == pytest.approx(0.626, rel=0.04)
    assert 8 * entries / GIB == pytest.approx(2.51, rel=0.04)


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
