"""The recipes of ReLoRA and LoRA against what the authors' commands and the papers' tables say."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import NamedTuple

import pytest
import torch

from fullrank.factors import cosine
from fullrank.factors.training import cycles_of
from fullrank.methods import METHODS
from fullrank.train.recipes import show_recipe
from fullrank.train.resolve import resolve
from tests.train.networks import model_of

LORA_STATES = {"60m": 0.17, "130m": 0.37, "350m": 0.72, "1b": 2.38}
"""Optimizer states of LoRA in the G of arXiv:2403.03507, Table 6."""


class Pretrained(NamedTuple):
    """A run of ReLoRA's paper: what the authors' command says, and what is printed."""

    lr: float
    warm_start_lr: float
    sequences: int
    length: int
    steps: int
    warmup: int
    restarts: tuple[int, ...]
    """Optimizer steps after which a restart falls."""
    batch: float
    """Thousands of tokens a step, in the paper."""
    tokens: float
    """Billions of tokens, in the paper."""
    perplexity: float


RELORA = {
    "60m": Pretrained(1e-3, 1e-3, 480, 256, 10_000, 500, (7_000, 9_000), 122, 1.2, 34.46),
    "130m": Pretrained(1e-3, 1e-3, 600, 256, 20_000, 500, (10_000, 15_000), 154, 2.6, 25.04),
    "250m": Pretrained(1e-3, 5e-4, 1152, 512, 20_000, 1000, (10_000, 15_000), 590, 6.8, 22.48),
    "350m": Pretrained(5e-4, 5e-4, 1152, 512, 20_000, 1000, (10_000, 15_000), 590, 6.8, 19.32),
}
"""Guitaricet/relora: README.md and scripts/ at commit f52a322, README.md today for 250m; perplexities: Table 2."""

resolved = cache(resolve)


@pytest.mark.parametrize("size", RELORA)
def test_relora_recipe_is_the_papers_setting(size: str) -> None:
    """The authors' command of each size, its tokens against the paper's, and where the restarts fall."""
    config, published = resolved(f"pretrain/{size}-relora"), RELORA[size]
    method, data, trainer = config.method, config.data, config.trainer
    assert (config.model.name, config.model.dtype, config.method_name) == (f"llama-{size}", "bfloat16", "relora")
    assert (data.name, data.subset, data.tokenizer, data.packing) == ("allenai/c4", "en", "t5-base", False)
    assert (trainer["total_batch_size"], data.sequence_length) == (published.sequences, published.length)
    assert (trainer["max_steps"], trainer["warmup_steps"]) == (published.steps, published.warmup)
    assert (method.lr, method.warm_start_lr, method.warm_start_steps) == (published.lr, published.warm_start_lr, 5000)
    assert (method.rank, method.lora_alpha, method.lora_dropout) == (128, 32.0, 0.1)
    assert (method.factor_dtype, method.merge_rounding) == (None, "nearest")
    assert (method.weight_decay, trainer["max_grad_norm"]) == (0.0, 0.0)
    assert f" {published.perplexity} " in show_recipe(f"pretrain/{size}-relora")
    cycles = cycles_of(method, restart_every=method.restart_every, adjust_step=method.adjust_step)
    assert tuple(n for n in range(1, published.steps) if cycles.begins_after(n)) == published.restarts
    # the paper counts tokens without padding, but for 60m: about 0.85 of a length of 256, 0.58 of 512
    batch = published.sequences * published.length
    assert batch / 1e3 == pytest.approx(published.batch, abs=1.0)
    share = published.tokens * 1e9 / (batch * published.steps)
    assert share == pytest.approx({"60m": 1.0, "130m": 0.85}.get(size, 0.58), abs=0.03)


def test_relora_1b_has_the_cycle_that_its_file_lacks() -> None:
    """The authors' training_configs/1B_v1.0.yaml, whose program stops for want of a cycle length."""
    config, text = resolved("pretrain/1b-relora"), show_recipe("pretrain/1b-relora")
    method, trainer = config.method, config.trainer
    assert "no cycle length" in text
    assert (config.model.name, config.model.revision, config.model.pretrained) == (
        "EleutherAI/pythia-1b",
        "step1000",
        True,
    )
    assert (config.data.sequence_length, trainer["total_batch_size"], trainer["max_steps"]) == (2048, 1024, 130_000)
    assert (method.lr, method.betas, method.weight_decay) == (4e-4, (0.9, 0.95), 0.01)
    assert (method.reset, method.reset_ratio, method.rank, method.restart_warmup_steps) == ("magnitude", 0.8, 128, 100)
    assert (trainer["warmup_steps"], trainer["max_grad_norm"], method.warm_start_steps) == (500, 1.0, 0)
    cycles = cycles_of(method, restart_every=method.restart_every)
    assert (method.restart_every, cycles.num_restarts(trainer["max_steps"])) == (1000, 129)


@pytest.mark.parametrize("size", [*RELORA, "1b"])
def test_relora_schedule_holds_its_parts(size: str) -> None:
    """The rate is zero at the start, at the end of the warm start and at each restart, and nowhere else."""
    config = resolved(f"pretrain/{size}-relora")
    method, steps, warmup = config.method, config.trainer["max_steps"], config.trainer["warmup_steps"]
    cycles = cycles_of(method, restart_every=method.restart_every)
    rate = cycles.schedule(lambda n: cosine(n, num_training_steps=steps, warmup_steps=warmup), warmup, steps)
    first = method.warm_start_steps
    assert [n for n in range(steps) if rate(n) == 0.0] == sorted(
        {0, first, *range(first + method.restart_every, steps, method.restart_every)}
    )


@pytest.mark.parametrize("size", LORA_STATES)
def test_lora_takes_the_memory_of_the_paper(size: str) -> None:
    """Bytes of optimizer state against GaLore's Table 6, which counts factors, embeddings and head in bfloat16."""
    config = resolved(f"pretrain/{size}-lora")
    state = METHODS["lora"].state_bytes(model_of(config), config.method)
    assert state / 1e9 == pytest.approx(LORA_STATES[size], rel=0.04)


def test_relora_trains_as_many_numbers_as_the_paper() -> None:
    """250M: 99 M numbers train after the warm start (the authors' notebook 07)."""
    config = resolved("pretrain/250m-relora")
    later = dataclasses.replace(config.method, warm_start_steps=0)
    state = METHODS["relora"].state_bytes(model_of(config), later)
    assert round(state / 2 / torch.bfloat16.itemsize / 1e6) == 99
