"""Bytes: of weights, gradients, the optimizer's state as held, of AdamW's beside it, and of the process at its peak.

Of what is spread over processes this one's part is counted.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fullrank.errors import UnsupportedError
from fullrank.factors.quantize import statistic_bytes
from fullrank.methods import METHODS
from fullrank.methods.full import FullConfig
from fullrank.sharding import local, own_bytes


def held_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in an optimizer's state, counted from its storage."""
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                storage = local(value).untyped_storage()
                storages[storage.data_ptr() or id(value)] = storage.nbytes()
    return sum(storages.values())


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients that an optimizer reads at a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(own_bytes(parameter) for parameter in parameters if parameter.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they train: LoRA's factors too, shared ones once, codes with what decodes them."""
    return sum(own_bytes(parameter) for parameter in model.parameters()) + statistic_bytes(model)


def adamw_state_bytes(model: nn.Module) -> int:
    """Bytes of state of full-rank AdamW on this model, the yardstick."""
    return METHODS["full"].state_bytes(model, FullConfig())


def peak_memory_bytes() -> int:
    """The most memory allocated on the GPU so far, or without one the peak resident size of the process.

    Linux's own number of a program counts from its start; that of `getrusage` goes on from the process that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Tracked:
    """What was allocated in a block."""

    peak: int = 0
    """The most bytes at a time; 0 until the block has ended."""
    left: int = 0
    """Bytes that were not freed in it."""


@contextmanager
def tracked_peak(device: torch.device | str = "cpu") -> Iterator[Tracked]:
    """Measure the most bytes that torch allocates at a time in a block.

    On the CPU every allocation is recorded by torch's profiler, so the block is slower, and counts what is allocated
    within it: make the model there. On a GPU it is the allocator's own count, of all that lives there.

    Args:
        device: Where to count.

    Raises:
        UnsupportedError: If this version of torch does not tell allocations apart.
    """
    found, place = Tracked(), torch.device(device)
    gc.collect()  # what an earlier block has left, and would else be freed in this one
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        yield found
        torch.cuda.synchronize(place)
        found.peak = torch.cuda.max_memory_allocated(place)
        found.left = torch.cuda.memory_allocated(place) - before
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    try:
        events = recorded.profiler.kineto_results.events()
    except AttributeError as error:
        raise UnsupportedError(
            f"torch {torch.__version__} does not say what its profiler has recorded ({error}). Measure on a GPU."
        ) from error
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    for _, size in changes:
        found.left += size
        found.peak = max(found.peak, found.left)
