"""Collectives over groups of processes: sums, means and broadcasts of several tensors at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fullrank.sharding.split import Split, split_of

BUCKET = 1 << 24
"""Numbers that are copied into one buffer for a collective, at most; a larger tensor goes by itself."""


_alone = ContextVar("_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Around what is of this process only, such as a rehearsal of a step: it counts as the only one meanwhile."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def num_processes() -> int:
    """Processes that train together: of the default group, or what torchrun says before there is one."""
    if _alone.get():
        return 1
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_number() -> int:
    """This process's number among them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def is_connected() -> bool:
    """Whether there is a group of several processes."""
    return not _alone.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensors: Sequence[Tensor], group: Any = None, kind: str = "sum") -> list[Tensor]:
    """These tensors of one dtype, summed over a group (or ``max``) by one collective; the given ones may change."""
    op = dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], op=op, group=group)
        return [tensors[0]]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, op=op, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def mean_(tensors: Sequence[Tensor], group: Any) -> None:
    """Overwrite these tensors by their means over a group's processes, buckets of one dtype at a time."""
    for numbers in buckets([(tensor, None) for tensor in tensors], [tensor.numel() for tensor in tensors]):
        several = [tensors[number].div_(dist.get_world_size(group)) for number in numbers]
        for tensor, total in zip(several, all_reduce(several, group), strict=True):
            if total is not tensor:
                tensor.copy_(total)


def start_mean(tensor: Tensor, group: Any) -> Callable[[], None]:
    """Begin to overwrite a tensor by its mean over a group's processes; what comes back waits for the end of it."""
    tensor.div_(dist.get_world_size(group))
    sent = tensor if tensor.is_contiguous() else tensor.contiguous()
    work: Any = dist.all_reduce(sent, group=group, async_op=True)

    def wait() -> None:
        work.wait()
        if sent is not tensor:
            tensor.copy_(sent)

    return wait


def broadcast(tensors: Sequence[Tensor], source: int, group: Any = None) -> None:
    """Overwrite these tensors by those of one process, buckets of one dtype at a time.

    Args:
        tensors: Of the same shapes and dtypes in all processes; whole tensors, or local parts in ``group``.
        source: Number of the process in the default group.
        group: Processes that take part; None: all.
    """
    for numbers in buckets([(tensor, None) for tensor in tensors], [tensor.numel() for tensor in tensors]):
        several = [tensors[number] for number in numbers]
        if len(several) == 1 and several[0].is_contiguous():
            dist.broadcast(several[0], src=source, group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in several])
        dist.broadcast(flat, src=source, group=group)
        for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def any_part(flag: Tensor, split: Split | None) -> bool:
    """Whether a flag (0-d) is set in any process that holds a part: a collective; None: there is one part."""
    if split is None or split.num == 1:
        return bool(flag)
    return bool(all_reduce([flag.to(torch.int32).view(1)], split.group, "max")[0])


def sum_of_parts(found: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Whole numbers found of tensors, each in the process that holds that part and 0 in the others: in all of them."""
    joined = list(found)
    groups: dict[Any, list[int]] = {}
    for number, tensor in enumerate(tensors):
        split = split_of(tensor)
        if split is not None and split.num > 1:
            groups.setdefault(split.group, []).append(number)
    for group, numbers in groups.items():
        sums = all_reduce([found[number].to(torch.int32) for number in numbers], group)
        for number, total in zip(numbers, sums, strict=True):
            joined[number] = total.to(found[number].dtype)
    return joined


def own_group(group: Any) -> Any:
    """Another group of a group's processes, whose collectives may come between those of the first: a collective."""
    is_part = dist.get_world_size(group) < dist.get_world_size()
    return dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=is_part)


def leave_group(group: Any) -> None:
    """Give up a group that ``own_group`` made; all of its processes do."""
    if dist.get_world_size(group) == dist.get_world_size():  # torch would give the name of a smaller one to the next
        dist.destroy_process_group(group)


def first_process(group: Any) -> int:
    """Number of a group's first process in the default group."""
    return dist.get_process_group_ranks(group)[0]


def disconnect() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_disconnection(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other processes are gone, or do not answer in time."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())


def buckets(entries: Sequence[tuple[Tensor, Any]], sizes: Sequence[int]) -> list[list[int]]:
    """Positions of tensors that go into one collective: of one dtype, device and group, up to ``BUCKET`` numbers."""
    made: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}
    for number, (tensor, group) in enumerate(entries):
        key = (tensor.dtype, tensor.device, group)
        bucket, held = last.get(key, ([], 0))
        if not bucket or held + sizes[number] > BUCKET:
            bucket, held = [], 0
            made.append(bucket)
        bucket.append(number)
        last[key] = bucket, held + sizes[number]
    return made
