"""A base whose linear layers are kept as codes (``model.quantization``): by formula, on top of the plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fullrank.plan.network import Network
from fullrank.train.adapters import heads

if TYPE_CHECKING:
    from fullrank.plan.usage import Usage

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Numbers that share a scale in bitsandbytes' 4-bit codes, and scales that share one where these are codes too."""


def coded(usage: Usage, network: Network, kind: str) -> Usage:
    """The same with the linear layers as codes, of which one at a time is decoded to be multiplied with."""
    keep = heads(network.whole)
    layers = [
        module for name, module in network.whole.named_modules() if type(module) is nn.Linear and name not in keep
    ]
    saved = sum(layer.weight.numel() * layer.weight.element_size() - _codes(layer, kind) for layer in layers)
    decoded = max((layer.weight.numel() * layer.weight.element_size() for layer in layers), default=0)
    held = usage.at_peak
    return replace(
        usage,
        weights=usage.weights - saved,
        activations=usage.activations + decoded,
        at_peak=replace(held, weights=held.weights - saved, other=held.other + decoded),
    )


def _codes(layer: nn.Linear, kind: str) -> int:
    """Bytes of the codes of a weight and of what decodes them."""
    numel = layer.weight.numel()
    if kind == "int8":
        return numel + 4 * layer.out_features
    scales = -(-numel // BLOCK)
    if kind == "nf4":
        return -(-numel // 2) + 4 * scales
    return -(-numel // 2) + scales + 4 * -(-scales // BLOCK_OF_SCALES)
