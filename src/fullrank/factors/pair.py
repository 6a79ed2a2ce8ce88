"""One weight with its two factors: the effective weight is W + scale * B A.

Shape legend as in ``ops.merge``: W (M x N), B (M x r), A (r x N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fullrank.errors import ConfigError
from fullrank.ops import merge


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
        if self.a.ndim < 2 or self.b.ndim < 2 or not len(self.a):
            raise ConfigError(
                f"{self.name}: factors must be matrices of rank 1 or more, got A {tuple(self.a.shape)} and B "
                f"{tuple(self.b.shape)}."
            )
        rows, columns = self.shape
        rank = self.a.shape[0]
        if self.a[0].numel() != columns or self.b.shape[0] != rows or self.b[0].numel() != rank:
            raise ConfigError(
                f"{self.name}: factors A {tuple(self.a.shape)} and B {tuple(self.b.shape)} do not fit a weight of "
                f"{rows} x {columns}. A must be r x {columns}, B {rows} x r"
                + (" (the weight is stored transposed)." if self.transposed else ".")
            )

    @property
    def shape(self) -> tuple[int, int]:
        """M and N."""
        rows, columns = self.weight.shape[0], self.weight[0].numel()
        return (columns, rows) if self.transposed else (rows, columns)

    def parameters(self) -> list[Tensor]:
        """What trains: A, B and a trained scale."""
        return [self.a, self.b, *([self.scale] if isinstance(self.scale, Tensor) else [])]

    def update(self) -> Tensor:
        """What the factors add: scale * B A (M x N, float32 at least)."""
        scale = self.scale.detach().tanh() if isinstance(self.scale, Tensor) else self.scale
        return merge.product(self.b.detach().flatten(1), self.a.detach().flatten(1), scale)

    @torch.no_grad()
    def merge_(self, *, generator: torch.Generator | None = None, stochastic: bool = True) -> Merge:
        """Add the update to the weight, summed in float32 at least; the factors stay as they are.

        Args:
            generator: Of the random rounding, on the weight's device.
            stochastic: Round at random where the weight's type is shorter than float32, else to nearest.
        """
        update, total = self.update(), self.read()
        size = float(update.norm())
        total = total + update
        del update  # a matrix less while the sum is rounded
        stored = self.write_(total, generator, stochastic=stochastic)
        return Merge(size, 0.0 if stored is total else float((total - stored).norm()))

    @torch.no_grad()
    def reinit_(self, generator: torch.Generator) -> None:
        """Start the factors again: A uniform within 1 / sqrt(N), B zero, a trained scale one."""
        if self.zero_a:
            self.a.zero_()
            self.b.copy_(torch.empty(self.b.shape).normal_(generator=generator))
        else:
            merge.kaiming_uniform_(self.a, generator)
            self.b.zero_()
        if isinstance(self.scale, Tensor):
            self.scale.fill_(1.0)

    def read(self) -> Tensor:
        """The weight (M x N, float32 at least)."""
        weight = self.weight.detach().flatten(1)
        return (weight.t() if self.transposed else weight).to(torch.promote_types(weight.dtype, torch.float32))

    def write_(self, values: Tensor, generator: torch.Generator | None, *, stochastic: bool) -> Tensor:
        """Store values (M x N) in the weight's own type; returns what is stored."""
        dtype = self.weight.dtype
        stored = merge.round_stochastic(values, dtype, generator) if stochastic else values.to(dtype)
        self.weight.copy_((stored.t() if self.transposed else stored).reshape(self.weight.shape))
        return stored

    def stored(self) -> dict[str, Tensor]:
        """The weight as it is kept, for a file."""
        return {"weight": self.weight.detach()}

    @torch.no_grad()
    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``stored`` gave."""
        self.weight.copy_(tensors["weight"])

    def freeze(self, *, frozen: bool = True) -> None:
        """Say whether the weight itself trains (in a warm start) or its factors do."""
        self.weight.requires_grad_(not frozen)
        for parameter in self.parameters():
            parameter.requires_grad_(frozen)


@dataclass(eq=False)
class LayerPair(LowRankPair):
    """The pair of a PEFT layer, which can also leave its factors out of the forward pass."""

    layer: Any = None

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
