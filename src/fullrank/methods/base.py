"""The whole contract of a method, and the options that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fullrank.errors import ConfigError
from fullrank.factors import AdapterRequest, Schedule, named_factors
from fullrank.optimizer import AdamConfig
from fullrank.params import class_head, divide_params, rank_problems
from fullrank.sharding import refuse_flattened, reshard


@dataclass(frozen=True, slots=True)
class Built:
    """A method at work on a model.

    ``after_step``, ``at_step`` and ``schedule`` are functions of the step number, so a resume needs no more state.
    """

    optimizer: torch.optim.Optimizer
    after_step: Callable[[int], object] | None = None
    """Called after the n-th optimizer step (n = 1, 2, ...); what it returns is of no account."""
    at_step: Callable[[int], None] | None = None
    """Lets train what trains after n optimizer steps (n = 0, 1, ...); called before training starts or goes on."""
    switches: tuple[int, ...] = ()
    """Optimizer steps after which other parameters train, so that a loop wraps the model anew there."""
    schedule: Callable[[Schedule, int, int], Schedule] | None = None
    """Turns a learning-rate schedule, its warm-up and the number of optimizer steps into the method's own schedule."""
    save_adapter: Callable[[Path], int] | None = None
    """Writes what training changed into a folder, as a small file; returns its bytes. None: there is no such file."""
    detach: Callable[[torch.device | str | None], None] | None = None
    """Ends training and leaves a plain model, what it decodes on this device (None: where that is). None: it is one."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method: a row of the table ``METHODS``."""

    name: str
    paper: str
    """arXiv number, or empty."""
    config: type[Any]
    """Dataclass of its options."""
    build: Callable[[nn.Module, Any], Built]
    """Makes it from a model and its options; allocates no state, so a model on the meta device will do."""
    state_bytes: Callable[[nn.Module, Any], int]
    """Bytes of optimizer state of a model under its options, before any training; the most there are at a time."""
    adapters: Callable[[Any], AdapterRequest | None] | None = None
    """The LoRA layers that ``build`` expects on the model, from its options; None: the model as it is."""
    beside_codes: Callable[[nn.Module, Any], Collection[str]] | None = None
    """Layers that have to stay plain where the others keep their weights as codes, beside which it trains (without
    ``adapters``); None: it needs the weights."""
    finetune_lr: float = 1e-4
    """Peak learning rate for a trained model, where none is given: as in the papers' fine-tuning scripts."""


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(AdamConfig):
    """Options of the methods that keep moments in a low-rank subspace."""

    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Substrings of the names of the weights to project; all others take plain AdamW."""
    rank: int = 128
    """Rank of the subspace, at most the short side of each matrix."""
    update_proj_gap: int = 200
    """Optimizer steps between two refreshes of the basis (T in the papers)."""
    alpha: float = 0.25
    """Scale of the low-rank update (GaLore's scale factor)."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Projected side: std (short), reverse_std (long), left (rows), right (columns), full (both)."""
    basis: Literal["svd", "power", "random"] = "power"
    """How a basis is found: exact SVD, warm-started block power iteration, or at random."""
    rotate_moments: bool = False
    """Carry the moments into the new basis at a refresh."""
    stagger_refresh: bool = False
    """Spread the refreshes of the matrices over the gap, so that no step stands out."""
    state_dtype: Literal["float32", "bfloat16", "8bit"] | None = "float32"
    """Data type of the low-rank moments; null: that of the weights; 8bit: block-wise codes (extra ``quant``), but
    float32 at rank 1."""
    plain_state_dtype: Literal["float32", "bfloat16", "8bit"] | None = None
    """The same of all other parameters' moments; null: that of the weights, or 8bit where ``state_dtype`` is."""
    weight_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a stepped bfloat16 or float16 weight is rounded: to the nearest, or at random so that its mean is exact."""
    partition_states: bool = False
    """Under DDP, let each process keep, refresh and step its share of the parameters and send on their weights."""
    lora_rank: int | None = None
    """Train LoRA's factors of this rank on the target layers instead of the weights, and project those; null: no."""
    lora_alpha: float = 64.0
    """Scale of these factors times their rank."""
    lora_dropout: float = 0.0
    """Share of the inputs of these factors that is dropped at random."""
    seed: int = 0
    """Seed of random starting directions."""


def factor_request(config: ProjectionConfig) -> AdapterRequest | None:
    """The LoRA layers that a projected method asks for under these options."""
    if config.lora_rank is None:
        return None
    return AdapterRequest(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        trainable_scaling=False,
        dtype=torch.float32,
        seed=config.seed,
        keeps_base=True,
    )


def projected_groups(model: nn.Module, config: ProjectionConfig) -> list[dict[str, Any]]:
    """The plain and the projected parameter group of a model under these options.

    With ``lora_rank`` the factors are projected, as in the fine-tuning script of Fira's authors; a fresh head of
    classes trains plainly beside them, and all else is frozen.

    Raises:
        ConfigError: If a pattern matches no weight, or the rank is out of bounds for a matched one.
        UnsupportedError: For weights that an engine has flattened: no pattern would find a matrix.
    """
    reshard(model)  # after an evaluation some of its parameters would be those gathered for it
    for name, parameter in model.named_parameters():
        refuse_flattened(parameter, name=name, user="a projected method")
    options: dict[str, Any] = {
        "rank": config.rank,
        "update_proj_gap": config.update_proj_gap,
        "alpha": config.alpha,
        "proj_type": config.proj_type,
    }
    if config.lora_rank is None:
        return divide_params(model, config.target_modules, **options)
    factors = named_factors(model, config.target_modules, rank=config.lora_rank)
    for name, factor in factors.items():
        if problems := rank_problems(config.rank, tuple(factor.shape), name):
            raise ConfigError(problems[0])
    head = class_head(model)
    for parameter in head.values():
        parameter.requires_grad_(True)  # whoever put the factors on the model froze it
    return [
        {"params": list(head.values()), "param_names": list(head)},
        {"params": list(factors.values()), "param_names": list(factors), **options},
    ]


def projection_options(config: ProjectionConfig) -> dict[str, Any]:
    """The keyword arguments that every projected AdamW class takes, from a configuration."""
    return {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "basis": config.basis,
        "rotate_moments": config.rotate_moments,
        "stagger_refresh": config.stagger_refresh,
        "state_dtype": config.state_dtype,
        "plain_state_dtype": config.plain_state_dtype,
        "weight_rounding": config.weight_rounding,
        "seed": config.seed,
        "partition_states": config.partition_states,
    }
