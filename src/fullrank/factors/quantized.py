"""Merging into bitsandbytes' 4-bit and 8-bit weights: decode, add, encode again.

The grid of such a weight is coarse: an update smaller than half a step of it is lost, and what is
stored differs from what was meant. The error is returned with every merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.coded import codes_of, keep_codes_, keep_int8_, read_codes, shape_of
from fullrank.factors.pair import LayerPair


@dataclass(eq=False)
class QuantizedPair(LayerPair):
    """The pair of a PEFT layer over a bitsandbytes weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """M and N; the stored weight is packed."""
        return shape_of(self.layer.get_base_layer())

    def read(self) -> Tensor:
        """The decoded weight (M x N, float32)."""
        return read_codes(self.layer.get_base_layer())

    def write_(self, values: Tensor, generator: torch.Generator | None, *, stochastic: bool) -> Tensor:
        """Encode values (M x N) to nearest in the weight's own format; returns what that decodes to."""
        from bitsandbytes import functional

        base = self.layer.get_base_layer()
        weight: Any = base.weight
        if type(weight).__name__ == "Params4bit":
            weight.data, weight.quant_state = functional.quantize_4bit(
                values.to(weight.quant_state.dtype),
                blocksize=weight.blocksize,
                compress_statistics=weight.compress_statistics,
                quant_type=weight.quant_type,
                quant_storage=weight.quant_storage,
            )
            base.quant_state = weight.quant_state
        else:
            codes, scales, _ = functional.int8_vectorwise_quant(values.half())
            keep_int8_(base, codes, scales)
        return self.read()

    def stored(self) -> dict[str, Tensor]:
        """Codes and what decodes them, by bitsandbytes' own names."""
        return codes_of(self.layer.get_base_layer())

    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``stored`` gave."""
        keep_codes_(self.layer.get_base_layer(), tensors)
