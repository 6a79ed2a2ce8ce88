"""Norms of gradients that arrive one by one: each clipped by itself, and all of them together when someone asks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.sharding import Split, all_reduce, local, split_of


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm (0-d, float32 at least) of what this process holds of a tensor, and who holds the rest."""

    own: Tensor
    split: Split | None
    """None: this process holds all of it."""

    @classmethod
    def of(cls, tensor: Tensor, parameter: Tensor, *, is_cut: bool = True) -> Norm:
        """The norm of a parameter's gradient, or of what is held of it.

        Args:
            tensor: The gradient, or a sum of projected ones.
            parameter: Says how it is spread.
            is_cut: Whether the tensor is spread as the parameter is; else it is whole in every process.
        """
        part = local(tensor).detach()
        norm = torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32))
        split = split_of(parameter) if is_cut else None
        return cls(norm, split if split is not None and split.is_cut else None)

    def whole(self) -> Tensor:
        """The norm of the whole tensor: a collective if it is spread."""
        if self.split is None:
            return self.own
        return all_reduce([self.own.square().view(1)], self.split.group)[0].sqrt().view(())


class Meter:
    """The norms of what was stepped since the optimizer's last step, or in it."""

    def __init__(self) -> None:
        self.bound: float | None = None
        """Largest norm of each, to which it is clipped; None: no clipping."""
        self._norms: dict[Tensor, Norm] = {}
        self._is_over = True
        """Whether the step that these are of is over."""
        self._known: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}
        """Gradients that were measured, and which of their versions: some outlive the step."""

    def take(self, parameter: Tensor, tensor: Tensor, norm: Norm) -> None:
        """Note the norm of what a parameter is about to be stepped with, and clip that."""
        if self._is_over:
            self._norms, self._is_over = {}, False
        self._norms[parameter] = norm
        if self.bound is not None:
            clip_(tensor, norm, self.bound)
        self._known[parameter] = weakref.ref(tensor), tensor._version

    def end_step(self) -> None:
        """Note that the optimizer has stepped; the norms stay until the next gradient, or a step without any."""
        if self._is_over:
            self._norms = {}
        self._is_over = True

    def is_known(self, parameter: Tensor, tensor: Tensor) -> bool:
        """Whether these very numbers were measured already."""
        known, version = self._known.get(parameter, (None, 0))
        return known is not None and known() is tensor and tensor._version == version

    def total(self, fresh: Mapping[Tensor, Norm]) -> Tensor:
        """The norm (0-d) of all together, and of those that the optimizer is still to step."""
        norms = {} if self._is_over and fresh else self._norms
        return total({**norms, **fresh}.values())


def clip_(tensor: Tensor, norm: Norm, bound: float) -> None:
    """Scale one gradient in place so that its norm is at most ``bound``, as ``clip_grad_norm_`` does with all."""
    part = local(tensor)
    part.mul_((bound / (norm.whole() + 1e-6)).clamp(max=1.0).to(part.dtype))


def total(norms: Iterable[Norm]) -> Tensor:
    """The norm (0-d, float32) of all these tensors together; a collective if some are spread."""
    groups: dict[Any, list[Tensor]] = {}
    for norm in norms:
        groups.setdefault(None if norm.split is None else norm.split.group, []).append(norm.own.float())
    found = []
    for group, several in groups.items():
        square = torch.linalg.vector_norm(torch.stack([norm.to(several[0].device) for norm in several])).square()
        found.append(square if group is None else all_reduce([square.view(1)], group)[0].view(()))
    return torch.stack([square.to(found[0].device) for square in found]).sum().sqrt() if found else torch.zeros(())
