"""From parameter names to parameter groups: by pattern, each parameter once, nothing silently left out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from fullrank.errors import ConfigError

NamedParameters = dict[str, nn.Parameter]


def match_parameters(
    model: nn.Module, patterns: Sequence[str], *, min_ndim: int = 0
) -> tuple[NamedParameters, NamedParameters]:
    """Split a model's parameters into those whose name contains a pattern, and the others.

    A tied parameter has several names and lands once, under its first; it matches if any of its
    names does.

    Args:
        model: The model; only names and shapes are read.
        patterns: Substrings of parameter names, such as ``"attn"`` or ``"mlp.up_proj"``.
        min_ndim: A parameter with fewer dimensions never matches (2 leaves out biases and norms).

    Raises:
        ConfigError: If ``patterns`` is empty, or one of them matches no parameter.
    """
    if isinstance(patterns, str):
        raise ConfigError(f"target modules must be a list of name patterns, got the string {patterns!r}. "
                          f"Write [{patterns!r}].")  # fmt: skip
    if not patterns:
        raise ConfigError('target modules must name at least one pattern, got none. Use ["attn", "mlp"].')
    first_name: dict[nn.Parameter, str] = {}
    matched: NamedParameters = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(parameter, name)
        hits = [pattern for pattern in patterns if pattern in name]
        if hits and parameter.ndim >= min_ndim:
            used.update(hits)
            matched[first] = parameter
    for pattern in patterns:
        if pattern not in used:
            raise ConfigError(_no_match(pattern, list(first_name.values()), min_ndim))
    rest = {name: parameter for parameter, name in first_name.items() if name not in matched}
    return matched, rest


def divide_params(
    model: nn.Module,
    target_modules_list: Sequence[str] = ("attn", "mlp"),
    rank: int = 8,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
) -> list[dict[str, Any]]:
    """Two parameter groups for ``FiraAdamW``, ``GaLoreAdamW`` or ``ApolloAdamW``: plain and projected.

    Weights with two or more dimensions whose name contains one of the patterns are projected: linear
    layers, transformers' Conv1D, convolutions. Biases, norms and everything else stay plain.

    Args:
        model: The model whose parameters are divided.
        target_modules_list: Substrings of module names to project.
        rank: Rank of the subspace, 1 to the short side of each matched matrix.
        update_proj_gap: Optimizer steps between two refreshes of the basis.
        alpha: Scale of the low-rank part of the update (GaLore's ``scale``).
        proj_type: Projected side: ``std``, ``reverse_std``, ``left``, ``right`` or ``full``.

    Raises:
        ConfigError: If a pattern matches no weight, or the rank is out of bounds for a matched one.
    """
    projected, plain = match_parameters(model, target_modules_list, min_ndim=2)
    problems = [p for name, weight in projected.items() for p in rank_problems(rank, tuple(weight.shape), name)]
    if problems:
        raise ConfigError(problems[0])
    return [
        {"params": list(plain.values()), "param_names": list(plain)},
        {
            "params": list(projected.values()),
            "param_names": list(projected),
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "alpha": alpha,
            "proj_type": proj_type,
        },
    ]


def rank_problems(rank: Any, shape: Sequence[int], name: str) -> list[str]:
    """What is wrong with a rank for a weight seen as a matrix: it must be 1 to the short side."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    short = min(shape[0], columns)
    if not isinstance(rank, bool) and isinstance(rank, int) and 1 <= rank <= short:
        return []
    return [
        f"rank must be between 1 and {short} (the short side of {name}, {shape[0]} x {columns}), got {rank!r}. "
        "Lower rank, or leave that module out of the targets."
    ]


def is_classifier(model: nn.Module) -> bool:
    """Whether a model of transformers gives a score for each class instead of for each token."""
    return type(model).__name__.endswith("ForSequenceClassification")


def class_head(model: nn.Module) -> NamedParameters:
    """What a sequence-classification model has above the layers of its encoder: head and pooler; none for others."""
    if not is_classifier(model):
        return {}
    encoder = f"{getattr(model, 'base_model_prefix', '')}."
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if not name.startswith(encoder) or ".pooler." in name}


def _no_match(pattern: str, names: list[str], min_ndim: int) -> str:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    near = difflib.get_close_matches(pattern, parts, n=5, cutoff=0.3) or parts[:12]
    kind = f"parameter with {min_ndim} or more dimensions" if min_ndim else "parameter"
    return f"target pattern {pattern!r} matches no {kind} of this model. Near names: {', '.join(near)}."
