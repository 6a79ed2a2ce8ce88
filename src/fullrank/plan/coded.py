"""A base whose linear layers are kept as codes (``model.quantization``): by formula, on top of the plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fullrank.factors.quantize import BLOCK, plain_linears
from fullrank.plan.network import Network
from fullrank.sharding import own_bytes
from fullrank.train.coded import heads

if TYPE_CHECKING:
    from fullrank.plan.usage import Usage

BLOCK_OF_SCALES = 256
"""Scales of bitsandbytes' 4-bit codes that share one of their own where they are codes too."""
TABLES = {"nf4": 4 * 16, "nf4-double": 4 * (16 + 256 + 1)}
"""Bytes of what codes stand for, of the scales' codes too, and of their mean."""


def coded(usage: Usage, network: Network, kind: str) -> Usage:
    """The same with the linear layers as codes, of which one at a time is decoded to be multiplied with."""
    layers = plain_linears(network.whole, heads(network.whole)).values()
    saved = sum(own_bytes(layer.weight) - code_bytes(layer, kind) for layer in layers)
    decoded = max((own_bytes(layer.weight) for layer in layers), default=0)
    held = usage.at_peak
    return replace(
        usage,
        weights=usage.weights - saved,
        activations=usage.activations + decoded,
        at_peak=replace(held, weights=held.weights - saved, other=held.other + decoded),
    )


def code_bytes(layer: nn.Linear, kind: str) -> int:
    """Bytes of the codes of a weight and of what decodes them."""
    numel = layer.weight.numel()
    if kind == "int8":
        return numel + 4 * layer.out_features
    scales = -(-numel // BLOCK)
    if kind == "nf4":
        return -(-numel // 2) + 4 * scales + TABLES[kind]
    return -(-numel // 2) + scales + 4 * -(-scales // BLOCK_OF_SCALES) + TABLES[kind]
