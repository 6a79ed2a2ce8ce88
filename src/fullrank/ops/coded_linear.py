"""A linear layer whose weight is kept as codes, of which some entries train and stand beside them.

    W   decoded (M x N) in the type of the product, the trained entries put in; it lives for one product
    X   inputs (T x N),   dY  gradients of the outputs (T x M)

    forward     Y = X W^T + b;   kept for the backward pass are X, and what the entries are
    backward    dX = dY W,  with W decoded again;   then dW = dY^T X, or the chosen rows or blocks of it

All codes are multiplied with in this one way, and inputs are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.ops.sliced import sliced_product
from fullrank.ops.sparse import Layout, flat_units, put_

Read = Callable[[torch.dtype], Tensor]
"""Decodes a weight (M x N) into this type."""


class CodedLinear(torch.autograd.Function):
    """``y = x W^T + b`` where W is decoded for each product.

    Inputs: x (... x N); gate (M x N), a tensor without content that takes the gradient of all of W, or None; bias (M)
    or None; values (K) of the trained entries and what their units are kept by, or None twice; read; layout. Values
    that require a gradient get that of their rows or blocks alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        bias: Tensor | None,
        values: Tensor | None,
        kept: Tensor | None,
        read: Read,
        layout: Layout,
    ) -> Tensor:
        """The dense product, in the type of the inputs, or in the autocast dtype where autocast is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x)
        # Not saved by autograd: a checkpointed pass may be computed again after the choice, with entries at last.
        ctx.entries, ctx.version = (values, kept), None if values is None else values._version
        ctx.read, ctx.layout = read, layout
        return F.linear(x, _weight(x.dtype, values, kept, read, layout), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the weight, of bias and values; autograd casts them to what these are."""
        (x,), (values, kept) = ctx.saved_tensors, ctx.entries
        if values is not None and values._version != ctx.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"values of trained entries, at version {values._version}; expected version {ctx.version} instead. "
                "Take the backward pass before the optimizer's step."
            )
        wants_x, wants_weight, wants_bias, wants_values, *_ = ctx.needs_input_grad
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ _weight(grad.dtype, values, kept, ctx.read, ctx.layout) if wants_x else None
        grad_weight = grad_values = None
        if wants_weight or wants_values:
            inputs = x.reshape(-1, x.shape[-1])
            if wants_weight:  # only now: the decoded weight is gone
                grad_weight = flat_grad.t() @ inputs
            else:
                grad_values = sliced_product(flat_grad, inputs, kept, ctx.layout)
        return grad_x, grad_weight, flat_grad.sum(0) if wants_bias else None, grad_values, None, None, None


def _weight(dtype: torch.dtype, values: Tensor | None, kept: Tensor | None, read: Read, layout: Layout) -> Tensor:
    """What the layer computes with: decoded, with the trained entries in their places, rounded to this type."""
    weight = read(dtype)
    if values is not None and kept is not None:
        put_(weight, flat_units(kept, layout), values.reshape(-1), layout)
    return weight
