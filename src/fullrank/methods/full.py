"""Full-rank AdamW, the baseline (arXiv:1711.05101): torch's own fused optimizer.

Memory for an m x n matrix: 2 m n numbers of state.

The projected methods give their matrices alpha times the learning rate of embeddings and head. So
that a comparison can be fair, ``matrix_lr_scale`` gives full-rank training the same split.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fullrank.errors import ConfigError
from fullrank.methods.base import Built, Method
from fullrank.optimizer import AdamConfig, adam_problems
from fullrank.params import match_parameters


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdamConfig):
    """Options of full-rank AdamW."""

    lr: float = 2e-3
    """Peak learning rate."""
    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment."""
    matrix_lr_scale: float = 1.0
    """Learning rate of the target matrices relative to that of all other parameters."""
    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Substrings of the names of the weights that ``matrix_lr_scale`` applies to."""


def build(model: nn.Module, config: FullConfig) -> Built:
    """torch.optim.AdamW, fused, in two groups if the matrices have a rate of their own."""
    problems = adam_problems(dataclasses.asdict(config))
    if not config.matrix_lr_scale > 0.0:
        problems.append(f"matrix_lr_scale must be above 0, got {config.matrix_lr_scale!r}. 1 is the plain baseline.")
    if problems:
        raise ConfigError(" ".join(problems))
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if config.matrix_lr_scale != 1.0:
        matrices, rest = match_parameters(model, config.target_modules, min_ndim=2)
        groups = [
            {"params": list(rest.values())},
            {"params": list(matrices.values()), "lr": config.lr * config.matrix_lr_scale},
        ]
    betas = (config.betas[0], config.betas[1])
    decay = config.weight_decay
    return Built(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=decay, fused=True))


def state_bytes(model: nn.Module, config: FullConfig) -> int:
    """Two moments in the weight's dtype and a step counter (float32) for each trainable parameter."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in model.parameters() if p.requires_grad)


METHOD = Method("full", "1711.05101", FullConfig, build, state_bytes, finetune_lr=2e-5)
