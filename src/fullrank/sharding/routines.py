"""What needs more than a process's own part of a tensor: generators that ask, answered for many at once.

A routine yields a `Request` and is sent the answer; ``run_together`` runs many routines and answers requests of one
kind by one collective for all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fullrank.sharding.processes import all_reduce, buckets
from fullrank.sharding.split import Split


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a routine asks of all processes that hold parts of its tensor.

    Kinds: ``to_rows``: a tensor (M x ...) summed over them, of which this process gets its part of the rows;
    ``max`` and ``sum``: over them, whole; ``all_rows``: everyone's part of the rows, joined to ``num_rows`` rows.
    """

    kind: str
    tensor: Tensor
    num_rows: int = 0


Routine = Generator[Request, Tensor, None]
"""Yields requests, is sent their answers."""


Asking = Generator[Request, Tensor, Tensor]
"""A part of a routine that returns a tensor."""


ORDER = ("to_rows", "max", "sum", "all_rows")
"""In which waiting requests are answered: what comes first in a step goes first, so that the rest wait together."""


def run_alone(routine: Routine) -> None:
    """Run a routine on whole tensors, which asks for nothing."""
    for request in routine:
        raise AssertionError(f"a routine on a whole tensor asked for {request.kind}")


def run_together(routines: Iterable[tuple[Routine, Split]]) -> None:
    """Run routines on parts to their ends, one collective for all requests of one kind that wait at a time.

    Every process must come with the same routines in the same order.
    """
    waiting: dict[int, tuple[Routine, Split, Request]] = {}
    for number, (routine, split) in enumerate(routines):
        _go_on(waiting, number, routine, split, None)
    while waiting:
        kind = next(kind for kind in ORDER if any(request.kind == kind for _, _, request in waiting.values()))
        turn = {number: entry for number, entry in sorted(waiting.items()) if entry[2].kind == kind}
        answers = _answer(kind, [(split, request) for _, split, request in turn.values()])
        for (number, (routine, split, _)), answer in zip(turn.items(), answers, strict=True):
            _go_on(waiting, number, routine, split, answer)


def _go_on(
    waiting: dict[int, tuple[Routine, Split, Request]],
    number: int,
    routine: Routine,
    split: Split,
    answer: Tensor | None,
) -> None:
    waiting.pop(number, None)
    try:
        request = next(routine) if answer is None else routine.send(answer)
    except StopIteration:
        return
    waiting[number] = (routine, split, request)


def _answer(kind: str, asked: list[tuple[Split, Request]]) -> list[Tensor]:
    """The answers to requests of one kind, in their order: a bucket of like ones at a time."""
    answers: dict[int, Tensor] = {}
    sizes = [_size(request, split) for split, request in asked]
    for numbers in buckets([(request.tensor, split.group) for split, request in asked], sizes):
        split = asked[numbers[0]][0]
        tensors = [asked[number][1].tensor for number in numbers]
        if kind == "to_rows":
            found = _to_rows(tensors, split)
        elif kind == "all_rows":
            found = _all_rows(tensors, [asked[number][1].num_rows for number in numbers], split)
        else:
            found = all_reduce(tensors, split.group, kind)
        answers |= dict(zip(numbers, found, strict=True))
    return [answers[number] for number in range(len(asked))]


def _size(request: Request, split: Split) -> int:
    """Numbers that a request sends: the same in all processes, whatever their parts, as they must bucket alike."""
    if request.kind != "all_rows":
        return request.tensor.numel()
    return -(-request.num_rows // split.num) * request.tensor.shape[1:].numel()


def _to_rows(tensors: list[Tensor], split: Split) -> list[Tensor]:
    """Sums over the group, of each this process's rows: one reduce-scatter, rows padded to equal parts."""
    pieces = []
    for part in range(split.num):
        for tensor in tensors:
            share = -(-len(tensor) // split.num)
            piece = tensor[part * share : (part + 1) * share].reshape(-1)
            pieces += [piece, piece.new_zeros(share * tensor[:1].numel() - piece.numel())]
    flat = torch.cat(pieces)
    out = flat.new_empty(len(flat) // split.num)
    reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before 2.13
    reduce_scatter(out, flat, group=split.group)
    answers, at = [], 0
    for tensor in tensors:
        start, end = split.bounds(len(tensor))
        width = tensor[:1].numel()
        answers.append(out[at : at + (end - start) * width].view(end - start, *tensor.shape[1:]))
        at += -(-len(tensor) // split.num) * width
    return answers


def _all_rows(tensors: list[Tensor], num_rows: list[int], split: Split) -> list[Tensor]:
    """Everyone's rows joined, by one all-gather, rows padded to equal parts."""
    shares = [-(-rows // split.num) for rows in num_rows]
    pieces = []
    for tensor, share in zip(tensors, shares, strict=True):
        pieces += [tensor.reshape(-1), tensor.new_zeros((share - len(tensor)) * tensor.shape[1:].numel())]
    flat = torch.cat(pieces)
    out = flat.new_empty(split.num * len(flat))
    all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before 2.13
    all_gather(out, flat, group=split.group)
    answers, at, table = [], 0, out.view(split.num, -1)
    for tensor, share, rows in zip(tensors, shares, num_rows, strict=True):
        width = tensor.shape[1:].numel()
        joined = table[:, at : at + share * width].reshape(split.num * share, *tensor.shape[1:])
        answers.append(joined[:rows])
        at += share * width
    return answers
