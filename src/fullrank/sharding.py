"""The only file that knows DTensor and torch.distributed."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError


def refuse_sharded(tensor: Tensor, *, optimizer: str) -> None:
    """Raise UnsupportedError for a parameter that is spread over several processes.

    Data parallel training (DDP) keeps whole parameters on every rank and is fine. A sharded
    parameter (FSDP2, tensor parallel) would silently be stepped as if its shard were the matrix.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        raise UnsupportedError(
            f"{optimizer} cannot step a sharded parameter yet: got a DTensor of shape {tuple(tensor.shape)} "
            f"with placements {tensor.placements}. Train with DistributedDataParallel (torchrun), which keeps "
            "whole parameters on every rank."
        )
