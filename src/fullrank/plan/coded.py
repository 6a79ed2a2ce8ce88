"""A base whose linear layers are kept as codes (``model.quantization``): layers that hold and allocate as these do.

bitsandbytes' layers as far as memory goes, made of plain operations, so that a plan needs no library: a weight is
decoded for its product, forward and backward. With int8 a layer's input is kept by a plain attribute, which gradient
checkpointing does not see: it stays until the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.factors.quantize import BLOCK, plain_linears
from fullrank.plan.network import Network
from fullrank.sharding import own_bytes
from fullrank.train.coded import heads

BLOCK_OF_SCALES = 256
"""Scales of bitsandbytes' 4-bit codes that share one of their own where they are codes too."""
TABLE, TABLE_OF_SCALES = 16, 256
"""Numbers that codes of a weight, and codes of scales, stand for; every layer has its own table."""


def coded_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a plain model that become codes."""
    kept: Any = model
    return list(plain_linears(model, heads(kept)).values())


def saved_bytes(network: Network, kind: str) -> int:
    """Bytes of weights that codes save."""
    layers = coded_layers(network.whole)
    return sum(own_bytes(layer.weight) - code_bytes(layer, kind) for layer in layers)


def decoded_bytes(network: Network) -> int:
    """Bytes of the largest weight that is decoded."""
    return max((own_bytes(layer.weight) for layer in coded_layers(network.whole)), default=0)


def keep_as_codes_(layers: Iterable[nn.Linear], model: nn.Module, kind: str) -> None:
    """Let layers hold codes in place of their weights, whose shapes they still show, and compute with these.

    Args:
        layers: Of the model.
        model: Which has its factors already.
        kind: Of codes, as in ``model.quantization``.
    """
    wrapped = {getattr(module, "base_layer", None) for module in model.modules()}
    for layer in layers:
        for name, codes in _codes(layer, kind).items():
            layer.register_buffer(name, codes)
        # of the weight one number stays, which stands for all
        weight = torch.empty((), dtype=layer.weight.dtype, device=layer.weight.device).expand(layer.weight.shape)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        is_copied = kind != "int8" and layer in wrapped  # PEFT's layer copies the outputs of 4-bit ones
        layer.forward = partial(_forward, layer, kind, is_copied)  # type: ignore[method-assign]


def code_bytes(layer: nn.Linear, kind: str) -> int:
    """Bytes of the codes of a weight and of what decodes them."""
    return sum(map(own_bytes, _codes(layer, kind).values()))


def _codes(layer: nn.Linear, kind: str) -> dict[str, Tensor]:
    """Codes of a weight and what decodes them, without content."""
    numel = layer.weight.numel()
    made = partial(torch.empty, device="meta")
    if kind == "int8":
        return {"codes": made(numel, dtype=torch.int8), "scales": made(layer.out_features)}
    scales = -(-numel // BLOCK)
    held = {"codes": made(-(-numel // 2), dtype=torch.uint8), "table": made(TABLE)}
    if kind == "nf4":
        return {**held, "scales": made(scales)}
    nested = {"scales_of_scales": made(-(-scales // BLOCK_OF_SCALES)), "table_of_scales": made(TABLE_OF_SCALES)}
    return {**held, "scales": made(scales, dtype=torch.uint8), **nested, "offset": made(())}


def _forward(layer: nn.Linear, kind: str, is_copied: bool, inputs: Tensor) -> Tensor:
    function: Any = _Int8 if kind == "int8" else _FourBit
    outputs: Tensor = function.apply(inputs, layer.weight, layer.bias, layer)
    return outputs.clone() if is_copied else outputs


class _FourBit(torch.autograd.Function):
    """Decode, multiply, forget."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        """The layer's outputs."""
        ctx.layer = layer
        return F.linear(inputs, _decoded(layer, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of the inputs."""
        return grads[0] @ _decoded(ctx.layer, ctx.layer.weight.dtype).to(grads[0].dtype), None, None, None


class _Int8(torch.autograd.Function):
    """The same, and the input is kept, beyond the reach of checkpointing."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        """The layer's outputs."""
        ctx.layer, ctx.inputs = layer, inputs
        return F.linear(inputs, _decoded(layer, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of the inputs."""
        return grads[0] @ _decoded(ctx.layer, grads[0].dtype), None, None, None


def _decoded(layer: Any, dtype: torch.dtype) -> Tensor:
    """A weight from its codes; where the scales are codes too these are decoded first."""
    scales = layer.scales
    if hasattr(layer, "offset"):
        scales = torch.empty_like(scales, dtype=torch.float32)
        scales = scales + layer.offset
    return torch.empty(layer.weight.shape, dtype=dtype)
