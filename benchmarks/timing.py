"""Fair timing: a clock for each device, works stepped in turn, and decompositions that need no waiting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Seconds of one call: CUDA events on a GPU, the wall elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def round_robin(clock: Clock, works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times of every work, one call each a round, each round starting one further down the list."""
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(works[name]))
    return times


@contextlib.contextmanager
def one_svd_per_shape() -> Iterator[None]:
    """Let ``torch.linalg.svd`` decompose the first matrix of each shape and return copies for the others."""
    real = torch.linalg.svd
    known: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def remembered(matrix: Tensor, full_matrices: bool = True, **options: Any) -> tuple[Tensor, ...]:
        key = (tuple(matrix.shape), matrix.dtype, full_matrices)
        if key not in known:
            known[key] = tuple(real(matrix, full_matrices=full_matrices, **options))
        return tuple(part.clone() for part in known[key])

    torch.linalg.svd = remembered
    try:
        yield
    finally:
        torch.linalg.svd = real
