"""The scaling factors of an optimizer's last step, read off its state: what Adam does to the size of a gradient.

For a matrix with gradient G the factor of column i is |N_i| / |G_i|, where N is Adam's direction of G. Fira
(arXiv:2410.01623, section 4.1) takes the factors of the projected gradient R = G Q in their place, because they
resemble those of full-rank training. Here both are computed after a step, from the gradients and the moments that
the step left behind, so nothing is added to the step itself.

"Columns" are the paper's: rows of the matrix oriented with its projected side last (``ops.subspace``), G (M x N).
Directions are taken before Adam's bias corrections, as in the authors' code: these are one number for all columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fullrank import moments
from fullrank.errors import ConfigError, UnsupportedError
from fullrank.ops import lowrank, subspace
from fullrank.sharding import refuse_sharded

TARGETS = ("attn", "mlp")
"""Parts of the names of the matrices that are looked at where no group projects any."""
LIMITED = 1e-5
"""A limiter's factor that is less than this below 1 is rounding: the limiter did not act."""
LIMITED_ROUGH = 1e-2
"""The same where the moments are stored in half precision."""

Matrix = tuple[str, Tensor, dict[str, Any]]
"""Name, parameter and its group."""


@dataclass(frozen=True)
class Factors:
    """What one step made of the gradient of one matrix; 0-d tensors, on its device, but for ``values``."""

    values: Tensor
    """Scaling factor of each column (M), or one of the whole matrix where the method has only that."""
    grad_norm: Tensor
    """Norm of the gradient that the step was given."""
    limited_norm: Tensor | None
    """Norm that the limiter looks at, before it: of Fira's scaled residual, of APOLLO's scaled gradient; else None."""
    limiter: Tensor
    """What the norm-growth limiter multiplied that by, 1 where it did not act or there is none."""

    @property
    def acted(self) -> bool:
        """Whether the limiter made the update smaller."""
        return bool(self.limiter < 1.0)


def scaling_factors(
    optimizer: torch.optim.Optimizer,
    *,
    names: Mapping[Tensor, str] | None = None,
    target_modules: Sequence[str] = TARGETS,
    proj_type: str = "std",
) -> dict[str, Factors]:
    """The scaling factors of each matrix at the step just taken.

    To be called after ``optimizer.step()`` and before its gradients are cleared; nothing is changed.

    Args:
        optimizer: One of ours that projects (GaLore, Fira, APOLLO), or one with Adam's two moments, such as
            ``torch.optim.AdamW``.
        names: Names of the parameters, such as ``{p: n for n, p in model.named_parameters()}``; by default those
            in the optimizer's groups (``param_names``).
        target_modules: Parts of the names of the matrices, where no group projects any.
        proj_type: Orientation of matrices that are not projected: the paper's columns are the long side ("std").

    Returns:
        Name -> factors, of every such matrix that has a gradient, in the optimizer's order.

    Raises:
        ConfigError: If there is no such matrix.
        UnsupportedError: If the optimizer keeps no such moments, or a matrix is spread over several processes.
    """
    chosen = matrices(optimizer, names=names, target_modules=target_modules)
    found = {}
    for name, parameter, group in chosen:
        if parameter.grad is not None:
            found[name] = matrix_factors(parameter, optimizer.state[parameter], group, proj_type=proj_type)
    return found


def matrices(
    optimizer: torch.optim.Optimizer,
    *,
    names: Mapping[Tensor, str] | None = None,
    target_modules: Sequence[str] = TARGETS,
) -> list[Matrix]:
    """The matrices to look at: what the optimizer projects, else the trainable weights of the target modules.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(target_modules, str):
        raise ConfigError(f"target_modules must list parts of names, got {target_modules!r}. Use [{target_modules!r}].")
    all_of_them = [entry for entry in _named(optimizer, names) if entry[1].requires_grad and entry[1].ndim >= 2]
    projected = [entry for entry in all_of_them if entry[2].get("rank") is not None]
    chosen = projected or [entry for entry in all_of_them if any(part in entry[0] for part in target_modules)]
    if not chosen:
        some = ", ".join(name for name, _, _ in all_of_them[:5]) or "none"
        raise ConfigError(
            f"no trainable matrix of the optimizer has one of {', '.join(target_modules)} in its name; its matrices: "
            f"{some}. Give target_modules, or names if these are positions."
        )
    return chosen


def matrix_factors(
    parameter: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], *, proj_type: str = "std"
) -> Factors:
    """The factors of one matrix from its gradient, its state and the options of its group.

    Raises:
        UnsupportedError: If the state has no moments of Adam or RMSprop, or AMSGrad's, or the matrix is spread over
            processes.
    """
    refuse_sharded(parameter, optimizer="a trace of scaling factors")
    assert parameter.grad is not None
    projected = "basis" in state
    proj_type = group["proj_type"] if projected else proj_type
    with torch.no_grad():
        grad = subspace.oriented(subspace.as_matrix(parameter.grad), proj_type)
        low = grad
        if projected:
            low = subspace.project(grad, state["basis"], state.get("basis_left"))
        whole = group.get("scaling") in ("matrix", "tensor") or "basis_left" in state
        low_norms = lowrank.norms(low, whole=whole)
        direction = _direction(low, state, group)
        if not projected:
            direction = subspace.oriented(subspace.as_matrix(direction), proj_type)
        factor = lowrank.norms(direction, whole=whole) / (low_norms + 1e-8)
        limited = _limited_norm(grad, low, low_norms, factor, state, group) if projected else None
        grad_norm = lowrank.norms(grad, whole=True).reshape(())
        limiter = torch.ones_like(grad_norm) if limited is None else _limiter(limited, state)
        return Factors(factor.flatten(), grad_norm, limited, limiter)


def sample_columns(count: int, num_columns: int, *, name: str, seed: int = 0) -> list[int]:
    """At most ``num_columns`` of ``count`` columns, without replacement, in order.

    A function of the seed and the matrix's name, so that runs of different optimizers look at the same columns.
    """
    if count <= num_columns:
        return list(range(count))
    generator = torch.Generator().manual_seed(subspace.mix_seed(seed, crc32(name.encode())))
    return sorted(torch.randperm(count, generator=generator)[:num_columns].tolist())


def num_factors(parameter: Tensor, group: Mapping[str, Any], *, proj_type: str = "std") -> int:
    """How many factors ``matrix_factors`` gives of a parameter: one for each column, or one."""
    projected = group.get("rank") is not None
    proj_type = group["proj_type"] if projected else proj_type
    if projected and (proj_type == "full" or group.get("scaling") in ("matrix", "tensor")):
        return 1
    rows, columns = parameter.shape[0], parameter[0].numel()
    return columns if subspace.projects_rows((rows, columns), proj_type) else rows


def has_limiter(group: Mapping[str, Any]) -> bool:
    """Whether matrices of a group are projected by a method that has a norm-growth limiter, turned on or off."""
    return group.get("rank") is not None and ("alpha_on" in group or "limiter_gamma" in group)


def _named(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str] | None) -> Iterator[Matrix]:
    for number, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
        for name, parameter in zip(own, group["params"], strict=True):
            yield (name if names is None else names.get(parameter, name)), parameter, group


def _direction(low: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Adam's direction of the last step, m / (sqrt(v) + eps), in the shape of the moments; float32 at least."""
    first, second = (moments.read(state, key) if key in state else None for key in ("exp_avg", "exp_avg_sq"))
    if "square_avg" in state:  # RMSprop
        first, second = low, moments.read(state, "square_avg")
    if first is None or second is None or "eps" not in group:
        held = ", ".join(sorted(state)) or "nothing"
        raise UnsupportedError(
            f"this optimizer's state holds no moments exp_avg and exp_avg_sq to read scaling factors from, but {held}. "
            "Use FiraAdamW, GaLoreAdamW, ApolloAdamW or torch.optim.AdamW."
        )
    if "max_exp_avg_sq" in state:
        raise UnsupportedError(
            "the optimizer keeps the largest second moment of every step (amsgrad=True), which scaling factors are not "
            "defined for. Use amsgrad=False."
        )
    dtype = torch.promote_types(second.dtype, torch.float32)
    return first.to(dtype) / second.to(dtype).sqrt().add_(group["eps"])


def _limited_norm(
    grad: Tensor,
    low: Tensor,
    low_norms: Tensor,
    factor: Tensor,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
) -> Tensor | None:
    """The norm of what the limiter limits: of S = s E in Fira (E as in ``ops.lowrank``), of s G in APOLLO."""
    whole = factor.numel() == 1
    if "alpha_on" in group:  # Fira
        kept = 1.0 if group["alpha_on"] == "update" else group["alpha"]
        basis = state["basis"]
        if lowrank.uses_direct_residual(basis.shape[0], basis.shape[1]):
            residual = grad - kept * lowrank.lift(low, basis, state.get("basis_left"))
            squared = lowrank.norms_sq(residual, whole=whole)
        else:
            squared = lowrank.residual_norms_sq(lowrank.norms_sq(grad, whole=whole), low_norms, kept=kept)
        return squared.mul_(factor).mul_(factor).sum().sqrt_()
    if "limiter_gamma" in group:  # APOLLO
        scaled: Tensor = torch.linalg.vector_norm(factor * lowrank.norms(grad, whole=whole))
        return scaled
    return None


def _limiter(norm: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The factor that the limiter applied: the norm it remembers of this step over the norm before it."""
    if "limiter_norm" not in state:
        return torch.ones_like(norm)
    rough = any(value.dtype.itemsize < 4 for key, value in state.items() if key in ("exp_avg_sq", "square_avg"))
    ratio = torch.where(norm > 0, state["limiter_norm"] / norm, 1.0)
    # A norm that overflowed is dropped by the limiter, whose memory stays: the ratio is 0 then.
    ratio = torch.where(norm.isfinite(), ratio, 0.0)
    return torch.where(ratio > 1.0 - (LIMITED_ROUGH if rough else LIMITED), 1.0, ratio)
