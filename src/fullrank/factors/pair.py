"""One weight with its two factors: the effective weight is W + scale * B A.

Shape legend as in ``ops.merge``: W (M x N), B (M x r), A (r x N).

Any of these may be spread over processes (FSDP2). A merge then gathers the factors, r (M + N) numbers, and every
process adds the rows or columns of scale * B A that belong to its part of the weight, which is never gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fullrank.errors import ConfigError
from fullrank.ops import merge, rounding
from fullrank.sharding import Split, all_reduce, keep_, local, split_of, whole


class Merge(NamedTuple):
    """What a merge added to a weight, and what of it the weight's type could not hold."""

    update: float
    """Frobenius norm of scale * B A."""
    error: float
    """Frobenius norm of the difference between what was added and scale * B A."""

    def __add__(self, other: Any) -> Merge:
        """The same of two weights together."""
        return Merge((self.update**2 + other.update**2) ** 0.5, (self.error**2 + other.error**2) ** 0.5)

    @property
    def relative_error(self) -> float:
        """The error as a share of the update; 0 if there was none."""
        return self.error / self.update if self.update else 0.0


@dataclass(eq=False)
class LowRankPair:
    """A weight and the factors that train beside it.

    ``weight`` is a tensor of two or more dimensions; a and b may have more too (convolutions): their
    first dimension stays, the others are one. ``ReLoRA`` takes a list of these for layers of one's own.
    """

    weight: Tensor
    """M x N, or N x M if ``transposed``."""
    a: Tensor
    """r x N, started at random."""
    b: Tensor
    """M x r, started at zero."""
    scale: float | Tensor = 1.0
    """lora_alpha / r, or a trained number s: the scale is then tanh(s)."""
    name: str = "a pair"
    transposed: bool = False
    """Whether the weight is stored as its transpose (transformers' Conv1D, embeddings)."""
    zero_a: bool = False
    """Whether it is A that starts at zero, and B at random (normal), as PEFT's embeddings do."""

    def __post_init__(self) -> None:
        if self.a.ndim < 2 or self.b.ndim < 2 or not self.a.shape[0]:
            raise ConfigError(
                f"{self.name}: factors must be matrices of rank 1 or more, got A {tuple(self.a.shape)} and B "
                f"{tuple(self.b.shape)}."
            )
        rows, columns = self.shape
        rank = self.a.shape[0]
        if math.prod(self.a.shape[1:]) != columns or self.b.shape[0] != rows or math.prod(self.b.shape[1:]) != rank:
            raise ConfigError(
                f"{self.name}: factors A {tuple(self.a.shape)} and B {tuple(self.b.shape)} do not fit a weight of "
                f"{rows} x {columns}. A must be r x {columns}, B {rows} x r"
                + (" (the weight is stored transposed)." if self.transposed else ".")
            )

    @property
    def shape(self) -> tuple[int, int]:
        """M and N."""
        rows, columns = self.weight.shape[0], math.prod(self.weight.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def parameters(self) -> list[Tensor]:
        """What trains: A, B and a trained scale."""
        return [self.a, self.b, *([self.scale] if isinstance(self.scale, Tensor) else [])]

    def current(self) -> Tensor:
        """The weight that the model computes with: another tensor than ``weight`` if it was sharded meanwhile."""
        return self.weight

    def trained_scale(self) -> float | Tensor:
        """What B A is multiplied by at present; a collective if it trains and is sharded."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        return whole(self.scale.detach()).reshape(()).tanh()

    def update(self) -> Tensor:
        """What the factors add to what this process holds of the weight: scale * B A (M x N, float32 at least).

        A collective if the factors are sharded: they are gathered whole. Of a sharded weight it is the rows or the
        columns of this process alone.
        """
        a, b = (whole(factor.detach()).flatten(1) for factor in (self.a, self.b))
        split = split_of(self.weight)
        if split is not None and split.is_cut:
            if (split.dim == 0) != self.transposed:
                b = split.rows(b)
            else:
                a = split.rows(a.t()).t()
        return merge.product(b, a, self.trained_scale())

    @torch.no_grad()
    def merge_(self, *, generator: torch.Generator | None = None, stochastic: bool = True) -> Merge:
        """Add the update to the weight, summed in float32 at least; the factors stay as they are.

        A collective if anything is sharded. What it reports is of the whole weight, the same in all processes.

        Args:
            generator: Of the random rounding, on the weight's device; where the weight is sharded, one for each part.
            stochastic: Round at random where the weight's type is shorter than float32, else to nearest.
        """
        update, total = self.update(), self.read()
        size = update.norm()
        total = total + update
        del update  # a matrix less while the sum is rounded
        stored = self.write_(total, generator, stochastic=stochastic)
        lost = size.new_zeros(()) if stored is total else (total - stored).norm()
        return Merge(*_of_the_whole([size, lost], split_of(self.weight)))

    @torch.no_grad()
    def reinit_(self, generator: torch.Generator) -> None:
        """Start the factors again: A uniform within 1 / sqrt(N), B zero, a trained scale one.

        All of A is drawn in every process, so from one seed all have the same; each keeps its part.
        """
        if self.zero_a:
            local(self.a).zero_()
            keep_(self.b, torch.empty(self.b.shape).normal_(generator=generator))
        else:
            drawn = torch.empty(self.a.shape)
            merge.kaiming_uniform_(drawn, generator)
            keep_(self.a, drawn)
            local(self.b).zero_()
        if isinstance(self.scale, Tensor):
            local(self.scale).fill_(1.0)

    def read(self) -> Tensor:
        """What this process holds of the weight (M x N, float32 at least)."""
        weight = local(self.weight).detach().flatten(1)
        return (weight.t() if self.transposed else weight).to(torch.promote_types(weight.dtype, torch.float32))

    def write_(self, values: Tensor, generator: torch.Generator | None, *, stochastic: bool) -> Tensor:
        """Store values of what this process holds (M x N) in the weight's own type; returns what is stored."""
        weight = local(self.weight)
        stored = rounding.round_stochastic(values, weight.dtype, generator) if stochastic else values.to(weight.dtype)
        weight.copy_((stored.t() if self.transposed else stored).reshape(weight.shape))
        return stored

    def stored(self) -> dict[str, Tensor]:
        """The weight as it is kept, for a file; a collective if it is sharded."""
        return {"weight": whole(self.weight.detach())}

    @torch.no_grad()
    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``stored`` gave."""
        keep_(self.weight, tensors["weight"])

    def freeze(self, *, frozen: bool = True) -> None:
        """Say whether the weight itself trains (in a warm start) or its factors do."""
        self.weight.requires_grad_(not frozen)
        for parameter in self.parameters():
            parameter.requires_grad_(frozen)


@dataclass(eq=False)
class LayerPair(LowRankPair):
    """The pair of a PEFT layer, which can also leave its factors out of the forward pass."""

    layer: Any = None

    def current(self) -> Tensor:
        """The weight in the layer."""
        weight: Tensor = self.layer.get_base_layer().weight
        return weight

    @torch.no_grad()
    def merge_(self, *, generator: torch.Generator | None = None, stochastic: bool = True) -> Merge:
        """As of any pair.

        Raises:
            ConfigError: If PEFT has merged the layer: its factors would be added twice.
        """
        if self.layer.merged:
            raise ConfigError(f"the adapter of {self.name} is merged at present. Call model.unmerge_adapter() first.")
        return super().merge_(generator=generator, stochastic=stochastic)

    def freeze(self, *, frozen: bool = True) -> None:
        """As of any pair; while the weight trains, the layer is its base alone."""
        self.layer.enable_adapters(frozen)
        super().freeze(frozen=frozen)


def _of_the_whole(norms: list[Tensor], split: Split | None) -> list[float]:
    """Norms of a tensor from those of each process's part of it: one sum over the processes."""
    if split is None or not split.is_cut:
        return [float(norm) for norm in norms]
    (sums,) = all_reduce([torch.stack(norms).double().square()], split.group)
    found: list[float] = sums.sqrt().tolist()
    return found
