"""LoRA: train two thin factors beside each frozen matrix, W + lora_alpha / r * B A (arXiv:2106.09685).

A (r x n) starts uniform, B (m x r) at zero, so training starts from the model as it is. The total change of a
matrix has rank r at most: the baseline that ReLoRA, GaLore and Fira are measured against.

Memory for an m x n matrix: gradients r (m + n), two moments 2 r (m + n) numbers (AdamW: m n and 2 m n).

Departures from the paper: the factors go to every matrix of attention and MLP, and embeddings, norms and head
train too unless told otherwise, as in the pre-training baselines of the papers above. The layers are PEFT's.
``warm_start_steps`` trains full-rank first, inside the same run (LoRA with warm start in ReLoRA's tables).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fullrank.errors import ConfigError
from fullrank.factors import AdapterRequest, Cycles, FactorConfig, WarmStart, refuse_mixed_types
from fullrank.factors.training import cycles_of, divide, factor_problems, make_optimizer, planned_state_bytes
from fullrank.methods.base import Built, Method


@dataclass(frozen=True, kw_only=True)
class LoraConfig(FactorConfig):
    """Options of LoRA."""


def adapters(config: LoraConfig) -> AdapterRequest:
    """Factors beside every target matrix."""
    checked_cycles(config)
    return AdapterRequest.of(config, keeps_base=True)


def checked_cycles(config: LoraConfig) -> Cycles:
    """The warm start under these options, once they are in order."""
    cycles = cycles_of(config)
    if problems := factor_problems(config, cycles):
        raise ConfigError(" ".join(problems))
    return cycles


def build(model: nn.Module, config: LoraConfig) -> Built:
    """AdamW on the factors and what trains beside them; the model must have its LoRA layers."""
    cycles = checked_cycles(config)
    parts = divide(model, config)
    optimizer = make_optimizer(parts, config)
    refuse_mixed_types(model, model.parameters() if config.warm_start_steps else ())
    if not config.warm_start_steps:
        return Built(optimizer)
    warm_start = WarmStart(parts.pairs, optimizer, config.warm_start_steps, others=parts.frozen, model=model)
    warm_start.at_step(0)

    return Built(
        optimizer,
        after_step=warm_start.after_step,
        at_step=warm_start.at_step,
        switches=(warm_start.steps,),
        schedule=cycles.schedule,
    )


METHOD = Method("lora", "2106.09685", LoraConfig, build, planned_state_bytes, adapters, finetune_lr=2e-4)
