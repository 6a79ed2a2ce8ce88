"""The only file that knows DTensor and torch.distributed."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over several processes."""
    known = sys.modules.get("torch.distributed.tensor")  # not imported: there are none, and it costs 100 MB
    return known is not None and isinstance(tensor, known.DTensor)


def refuse_sharded(tensor: Tensor, *, optimizer: str) -> None:
    """Raise UnsupportedError for a parameter that is spread over several processes.

    Data parallel training (DDP) keeps whole parameters on every rank and is fine. A sharded
    parameter (FSDP2, tensor parallel) would silently be stepped as if its shard were the matrix.
    """
    if is_sharded(tensor):
        placements = getattr(tensor, "placements", None)
        raise UnsupportedError(
            f"{optimizer} cannot step a sharded parameter yet: got a DTensor of shape {tuple(tensor.shape)} "
            f"with placements {placements}. Train with DistributedDataParallel (torchrun), which keeps "
            "whole parameters on every rank."
        )


def refuse_several_processes(method: str) -> None:
    """Raise UnsupportedError where this process is one of several that train together.

    A hook sees the gradient of its own rank, before DDP averages it, so ranks would drift apart silently.
    """
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if ready else int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        raise UnsupportedError(
            f"{method} trains in one process yet, and this one is of {processes}. Start it without torchrun, or use "
            "a method that runs under DDP: fira, galore, apollo, full."
        )
