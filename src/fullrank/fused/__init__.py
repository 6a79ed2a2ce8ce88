"""Update during backward: each parameter is stepped as its gradient arrives, and the gradient freed."""

from fullrank.fused.backward import FusedBackward, fused_on

__all__ = ["FusedBackward", "fused_on"]
