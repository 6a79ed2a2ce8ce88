"""A linear layer whose weight gradient is computed for the chosen rows or blocks alone.

The forward pass is the dense one. In the backward pass the product dY^T X, a third of a layer's work,
shrinks to its chosen part:

    X   inputs (T x N),   dY  gradients of the outputs (T x M),   T tokens
    rows      dY[:, rows]^T X               (R x N)
    blocks    dY[:, I]^T X[:, J]            (B x B) for each block (I, J)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.ops.sparse import Layout, block_places


class SlicedLinear(torch.autograd.Function):
    """``y = x W^T + b`` where only the chosen entries of W, held in ``values``, get a gradient.

    Inputs: x (... x N), weight (M x N), bias (M) or None, values (K), units (U), layout. The values
    are not read: they are entries of the weight already, and take its place in the graph.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, units: Tensor, layout: Layout
    ) -> Tensor:
        """The dense product, in the autocast dtype where autocast is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, weight, units)
        ctx.layout, ctx.values_dtype = layout, values.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias and values."""
        x, weight, units = ctx.saved_tensors
        wants_x, _, wants_bias, wants_values, _, _ = ctx.needs_input_grad
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight.to(grad.dtype) if wants_x else None
        grad_bias = flat_grad.sum(0) if wants_bias else None
        grad_values = None
        if wants_values:
            inputs = x.reshape(-1, x.shape[-1]).to(grad.dtype)
            grad_values = sliced_product(flat_grad, inputs, units, ctx.layout).to(ctx.values_dtype)
        return grad_x, None, grad_bias, grad_values, None, None


def sliced_product(grad: Tensor, inputs: Tensor, units: Tensor, layout: Layout) -> Tensor:
    """The entries of dY^T X in the chosen rows or blocks, unit by unit (K)."""
    if layout.granularity == "row":
        return (grad.index_select(1, units).t() @ inputs).reshape(-1)
    size, columns = layout.block_size, layout.grid[1]
    outer, inner = grad.unflatten(1, (-1, size)), inputs.unflatten(1, (-1, size))
    parts = []
    for chunk in units.split(columns):  # what is copied at a time is at most as large as X
        rows, cols = block_places(chunk, columns)
        parts.append(torch.bmm(outer[:, rows].permute(1, 2, 0), inner[:, cols].transpose(0, 1)))
    return torch.cat(parts).reshape(-1)
