"""Merging into bitsandbytes' 4-bit and 8-bit weights: decode, add, encode again.

The grid of such a weight is coarse: an update smaller than half a step of it is lost, and what is
stored differs from what was meant. The error is returned with every merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.factors.pair import LayerPair
from fullrank.ops.codes import decode_flat

KINDS = ("Params4bit", "Int8Params")


def is_quantized(weight: Any) -> bool:
    """Whether a weight is kept as bitsandbytes' codes."""
    return type(weight).__name__ in KINDS and not getattr(weight, "has_fp16_weights", False)


@dataclass(eq=False)
class QuantizedPair(LayerPair):
    """The pair of a PEFT layer over a bitsandbytes weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """M and N; the stored weight is packed."""
        base = self.layer.get_base_layer()
        return base.out_features, base.in_features

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
            _keep_int8(base, codes, scales)
        return self.read()

    def stored(self) -> dict[str, Tensor]:
        """Codes and what decodes them, by bitsandbytes' own names."""
        return codes_of(self.layer.get_base_layer())

    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``stored`` gave."""
        keep_codes_(self.layer.get_base_layer(), tensors)


def read_codes(base: Any) -> Tensor:
    """The decoded weight of a layer (M x N, float32)."""
    from bitsandbytes import functional

    weight: Any = base.weight
    if type(weight).__name__ == "Params4bit":
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            base.state_dict()  # turns the layout that bitsandbytes uses for inference on CPUs back
        return decode_flat(functional.dequantize_4bit, weight.data, weight.quant_state)
    values: Tensor = functional.int8_vectorwise_dequant(*_int8(base)).float()
    return values


def codes_of(base: Any) -> dict[str, Tensor]:
    """Codes of a layer and what decodes them, by bitsandbytes' own names."""
    return {name: tensor for name, tensor in base.state_dict().items() if name != "bias"}


def keep_codes_(base: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put codes into a layer, with what decodes them: what ``codes_of`` gave."""
    weight: Any = base.weight
    if type(weight).__name__ == "Params4bit":
        statistics = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        found = type(weight).from_prequantized(tensors["weight"], statistics, device=weight.device)
        weight.data, weight.quant_state = found.data, found.quant_state
        base.quant_state = weight.quant_state
    else:
        _keep_int8(base, tensors["weight"].to(weight.device), tensors["SCB"].to(weight.device))


def _int8(base: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales of an 8-bit layer: with the weight until the first forward pass, then in the layer's state."""
    holder = base.state if base.state.CB is not None else base.weight
    return holder.CB, holder.SCB


def _keep_int8(base: Any, codes: Tensor, scales: Tensor) -> None:
    base.weight.data = codes
    holder = base.state if base.state.CB is not None else base.weight
    holder.CB, holder.SCB = codes, scales
