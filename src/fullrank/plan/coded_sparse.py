"""A base of codes beside which chosen entries train: layers that stand for such ones where a step is traced.

What trains beside the codes is the real method; these layers have as many bytes in place of a weight, and are decoded
into a tensor without content, with the temporaries that decoding has.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.coded import DECODER, ORIGIN
from fullrank.factors.quantize import plain_linears
from fullrank.methods import METHODS
from fullrank.ops.coded_linear import CodedLinear
from fullrank.ops.sparse import Layout
from fullrank.plan.coded import code_bytes
from fullrank.train.coded import heads


class StandIn(nn.Linear):
    """A linear layer whose weight is kept as codes, as far as memory goes."""

    def forward(self, input: Tensor) -> Tensor:
        """The product where nothing of the weight trains."""
        function: Any = CodedLinear  # autograd functions carry no types
        layout = Layout((self.out_features, self.in_features))
        outputs: Tensor = function.apply(input, None, self.bias, None, None, getattr(self, DECODER), layout)
        return outputs


def keep_beside_entries_(model: Any, method: str, options: Any, kind: str) -> None:
    """Let the linear layers of a model on the meta device stand for ones with codes, but for those that stay plain."""
    keeps = METHODS[method].beside_codes
    kept: Collection[str] = heads(model) | set(() if keeps is None else keeps(model, options))
    for layer in plain_linears(model, kept).values():
        dtype = layer.weight.dtype
        codes = torch.empty(code_bytes(layer, kind), dtype=torch.uint8, device="meta")
        layer.weight = nn.Parameter(codes, requires_grad=False)
        setattr(layer, DECODER, partial(_decoded, (layer.out_features, layer.in_features), dtype, kind))
        setattr(layer, ORIGIN, "planned")
        layer.__class__ = StandIn


def _decoded(shape: tuple[int, int], kept: torch.dtype, kind: str, dtype: torch.dtype) -> Tensor:
    """8-bit codes are decoded in float32, 4-bit ones in the type that they were made of."""
    return torch.empty(shape, dtype=torch.float32 if kind == "int8" else kept).to(dtype)
