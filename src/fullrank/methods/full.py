"""Full-rank AdamW, the baseline (arXiv:1711.05101): torch's own fused optimizer.

Memory for an m x n matrix: 2 m n numbers of state.

The projected methods give their matrices alpha times the learning rate of embeddings and head. So
that a comparison can be fair, ``matrix_lr_scale`` gives full-rank training the same split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fullrank.adamw import AdamWConfig, config_problems, make_adamw, state_bytes_of
from fullrank.errors import ConfigError
from fullrank.methods.base import Built, Method
from fullrank.params import match_parameters


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdamWConfig):
    """Options of full-rank AdamW."""

    lr: float = 2e-3
    """Peak learning rate."""
    matrix_lr_scale: float = 1.0
    """Learning rate of the target matrices relative to that of all other parameters."""
    target_modules: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    """Substrings of the names of the weights that ``matrix_lr_scale`` applies to."""


def build(model: nn.Module, config: FullConfig) -> Built:
    """AdamW, torch's fused one by default, in two groups if the matrices have a rate of their own."""
    problems = config_problems(config, model.parameters())
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
    return Built(make_adamw(groups, config))


def state_bytes(model: nn.Module, config: FullConfig) -> int:
    """Two moments in ``state_dtype`` and a step counter (float32) for each trainable parameter."""
    return sum(state_bytes_of(p.shape, p.dtype, config) for p in model.parameters() if p.requires_grad)


METHOD = Method("full", "1711.05101", FullConfig, build, state_bytes, finetune_lr=2e-5)
