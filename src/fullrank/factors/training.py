"""What LoRA and ReLoRA share: their options, what trains beside the factors, the optimizer, its bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.adamw import AdamW, AdamWConfig, config_problems, make_adamw, state_bytes_of
from fullrank.errors import UnsupportedError
from fullrank.factors.cycles import Cycles
from fullrank.factors.find import find_pairs, lora_layers, target_layers
from fullrank.factors.pair import LowRankPair
from fullrank.params import class_head
from fullrank.sharding import gathered_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FactorConfig(AdamWConfig):
    """Options of the methods that train LoRA's factors."""

    rank: int = 128
    """Rank of the factors, at most the short side of each matrix."""
    lora_alpha: float = 32.0
    """Scale of the factors times their rank: a matrix is W + lora_alpha / rank * B A."""
    lora_dropout: float = 0.0
    """Share of the inputs of the factors that is dropped at random."""
    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Substrings of the names of the linear layers that get factors."""
    trainable_scaling: bool = False
    """Train the scale, tanh(s) with s = 1 at first, in place of lora_alpha / rank."""
    train_embeddings: bool = True
    """Train the embeddings too, full-rank."""
    train_norms: bool = True
    """Train norms and biases too."""
    train_head: bool = True
    """Train the head too, full-rank: that of a language model or of classes."""
    factor_dtype: Literal["float32", "bfloat16"] | None = "float32"
    """Data type of the factors and so of their moments; null: that of the weights."""
    warm_start_steps: int = 0
    """Optimizer steps of full-rank training first; the matrices then freeze and their factors train."""
    warm_start_lr: float | None = None
    """Peak learning rate of the warm start; null: half of lr."""
    restart_warmup_steps: int = 100
    """Optimizer steps in which the learning rate rises again, after the warm start and after each restart."""
    seed: int = 0
    """Seed of the factors."""


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """The LoRA layers that a method wants on a model before it is built; whoever knows PEFT puts them there."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    trainable_scaling: bool
    dtype: torch.dtype | None
    """Data type of the factors; None: that of the weights."""
    seed: int
    keeps_base: bool
    """Whether the weights under the factors stay as they were, so that the factors are the whole result."""

    @classmethod
    def of(cls, config: FactorConfig, *, keeps_base: bool) -> AdapterRequest:
        """The request of a method with these options."""
        return cls(
            rank=config.rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules,
            trainable_scaling=config.trainable_scaling,
            dtype=_factor_dtype(config),
            seed=config.seed,
            keeps_base=keeps_base and not config.warm_start_steps,
        )


def factor_problems(config: FactorConfig, cycles: Cycles) -> list[str]:
    """What is wrong with the options, one sentence each."""
    problems = config_problems(config) + cycles.problems()
    if not 0.0 < config.lora_alpha < math.inf:
        problems.append(
            f"lora_alpha must be above 0 and finite, got {config.lora_alpha!r}. The scale is lora_alpha / rank."
        )
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed must be between 0 and {2**32 - 1}, got {config.seed}.")
    if not 0.0 <= config.lora_dropout < 1.0:
        problems.append(f"lora_dropout must be at least 0 and below 1, got {config.lora_dropout!r}.")
    if config.warm_start_lr is not None and not config.warm_start_lr > 0.0:
        problems.append(f"warm_start_lr must be above 0, got {config.warm_start_lr!r}. null is half of lr.")
    return problems


def cycles_of(config: FactorConfig, *, restart_every: int | None = None, adjust_step: int = 0) -> Cycles:
    """Warm start and restarts under these options."""
    return Cycles(
        restart_every=restart_every,
        restart_warmup_steps=config.restart_warmup_steps,
        warm_start_steps=config.warm_start_steps,
        warm_start_lr_ratio=0.5 if config.warm_start_lr is None else config.warm_start_lr / (config.lr or 1.0),
        adjust_step=adjust_step,
    )


@dataclass(frozen=True)
class Parts:
    """The parameters of a model by what happens to them."""

    pairs: Sequence[LowRankPair]
    beside: list[nn.Parameter]
    """Train full-rank throughout: embeddings, norms and head, as far as they are wanted."""
    frozen: list[nn.Parameter]
    """Train in a warm start alone; the weights of the pairs are not among them."""


def divide(model: nn.Module, config: FactorConfig) -> Parts:
    """The parts of a model that has its LoRA layers."""
    pairs = find_pairs(model)
    taken = {parameter for pair in pairs for parameter in (pair.weight, *pair.parameters())}
    wanted = wanted_beside(model, config)
    rest = [parameter for parameter in model.parameters() if parameter not in taken]
    return Parts(pairs, [p for p in rest if p in wanted], [p for p in rest if p not in wanted])


def wanted_beside(model: nn.Module, config: FactorConfig) -> set[nn.Parameter]:
    """What trains beside the factors: embeddings, norms (and biases) and head; a tied head if either does."""
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = {*(output.parameters() if output is not None else ()), *class_head(model).values()}
    norms = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    wanted: set[nn.Parameter] = set()
    for parameters, is_wanted in (
        (embeddings, config.train_embeddings),
        (head, config.train_head),
        (norms, config.train_norms),
    ):
        wanted |= parameters if is_wanted else set()
    return wanted


def make_optimizer(parts: Parts, config: FactorConfig) -> torch.optim.AdamW | AdamW:
    """AdamW over the factors, what trains beside them, and for a warm start the rest; freezes what waits."""
    factors = [parameter for pair in parts.pairs for parameter in pair.parameters()]
    for parameter in (*(pair.weight for pair in parts.pairs), *parts.frozen):
        parameter.requires_grad_(False)
    for parameter in (*factors, *parts.beside):
        parameter.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": factors}]
    if parts.beside:
        groups.append({"params": list(parts.beside)})
    if config.warm_start_steps:
        groups.append({"params": [*(pair.weight for pair in parts.pairs), *parts.frozen]})
    logger.info(
        "%d matrices with factors of rank %d (%d numbers), %d numbers beside them train, %d are frozen%s",
        len(parts.pairs),
        config.rank,
        sum(parameter.numel() for parameter in factors),
        sum(parameter.numel() for parameter in parts.beside),
        sum(pair.weight.numel() for pair in parts.pairs) + sum(parameter.numel() for parameter in parts.frozen),
        f" after {config.warm_start_steps} steps" if config.warm_start_steps else "",
    )
    return make_adamw(groups, config, seed=config.seed)


def refuse_mixed_types(model: nn.Module, also: Iterable[Tensor] = ()) -> None:
    """Check that whatever trains in a layer that FSDP2 gathers at once is of one data type, as FSDP2 demands.

    Args:
        model: With its parameters frozen or not, as they train.
        also: What trains at another time, in a warm start or after it.

    Raises:
        UnsupportedError: If it is not; FSDP2 would say so in the first forward pass.
    """
    trains = {*also, *(parameter for parameter in model.parameters() if parameter.requires_grad)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in gathered_together(model):
        first = {parameter.dtype: names[parameter] for parameter in reversed(group) if parameter in trains}
        if len(first) > 1:
            found = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in first.items())
            raise UnsupportedError(
                f"what trains in one layer is of several data types, {found}, and FSDP2 reduces a layer's gradients "
                "together, in one. Give the factors the type of the weights (method.factor_dtype null), load the model "
                "in float32, or freeze the others (method.train_norms false)."
            )


def planned_state_bytes(model: nn.Module, config: FactorConfig) -> int:
    """Two moments and a step counter (float32) for all that trains; with a warm start, the most there are at a time.

    The model may have its LoRA layers or not.
    """
    if next(lora_layers(model), None) is not None:
        pairs = find_pairs(model)
        factors = [(tuple(p.shape), p.dtype) for pair in pairs for p in pair.parameters()]
        taken = {p for pair in pairs for p in pair.parameters()}
        targets = {pair.weight for pair in pairs}
    else:
        layers = target_layers(model, config.target_modules, rank=config.rank)
        factors = [factor for layer in layers.values() for factor in _factor_shapes(layer, config)]
        taken, targets = set(), {layer.weight for layer in layers.values()}
    dense = [parameter for parameter in model.parameters() if parameter not in taken]
    wanted = wanted_beside(model, config) - targets
    later = [*factors, *((tuple(p.shape), p.dtype) for p in dense if p in wanted)]
    first = [(tuple(p.shape), p.dtype) for p in dense] if config.warm_start_steps else []
    return max(sum(state_bytes_of(shape, dtype, config) for shape, dtype in kinds) for kinds in (later, first))


def _factor_shapes(layer: nn.Module, config: FactorConfig) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each of A, B and a trained scale that a layer would get."""
    weight: Any = layer.weight
    dtype = _factor_dtype(config) or weight.dtype
    rows, columns = reversed(weight.shape) if type(layer).__name__ == "Conv1D" else weight.shape
    scale: list[tuple[tuple[int, ...], torch.dtype]] = [((1,), torch.float32)] if config.trainable_scaling else []
    return [((config.rank, columns), dtype), ((rows, config.rank), dtype), *scale]


def _factor_dtype(config: FactorConfig) -> torch.dtype | None:
    """Data type of the factors; None: that of the weights."""
    return getattr(torch, config.factor_dtype) if config.factor_dtype else None
