"""How the moments of an optimizer are kept: in float32, bfloat16, ..., or as 8-bit codes with scales.

Every optimizer of ours reads and writes its moments here, so that its arithmetic sees numbers. An 8-bit moment
``exp_avg`` is two tensors of the state, the codes ``exp_avg`` and the scales ``exp_avg_scale`` (``ops.blockwise``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.ops import blockwise
from fullrank.saved_state import StateSpec
from fullrank.sharding import split_of

EIGHT_BIT = "8bit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Names of the types that moments may have, beside ``EIGHT_BIT``."""
SCALE = "_scale"
"""What the key of a moment ends with under which its scales are."""
SMALLEST = 4096
"""Numbers of a parameter from which on its moments are worth 8-bit codes, as in bitsandbytes."""
PIECE = 1 << 22
"""Numbers of a parameter that is not projected that are stepped in float32 at a time."""
SHORTEST = 8
"""Numbers of a row from which on a scale for each is worth its bytes."""

Kept = torch.dtype | str
"""How a moment is kept: a data type, or ``EIGHT_BIT``."""


def dtype_name(dtype: Any) -> Any:
    """A torch dtype by its name, as groups hold it so that they save as plain values; anything else as it is."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def is_squared(key: str) -> bool:
    """Whether a moment is one of squares: at least 0, and kept by its root."""
    return key != "exp_avg"


def kept_as(name: str | None, dtype: torch.dtype) -> Kept:
    """How moments are kept under an option ``state_dtype`` for weights of a data type.

    None is the weights' own, but float32 for float16, in which squares of gradients vanish. Of float64 weights they are
    float64.
    """
    if name == EIGHT_BIT:
        return EIGHT_BIT
    if dtype == torch.float64:
        return torch.float64
    if name is not None:
        return DTYPES[name]
    return torch.float32 if dtype == torch.float16 else dtype


def suits_codes(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape that is not projected has 8-bit moments where these are asked for.

    A vector has not: a process may hold any part of it, which no block fits.
    """
    return len(shape) >= 2 and math.prod(shape[1:]) >= SHORTEST and math.prod(shape) >= SMALLEST


def spec_of(keys: Iterable[str], shape: Sequence[int], kept: Kept, *, flat: bool = False) -> StateSpec:
    """Shape and dtype of every tensor that keeps these moments.

    Args:
        keys: Of the moments.
        shape: Of each.
        kept: How.
        flat: Of 8-bit codes, whether blocks run over all numbers as one vector, not within rows.
    """
    spec: StateSpec = {}
    for key in keys:
        if isinstance(kept, str):
            spec[key] = (tuple(shape), torch.uint8)
            spec[key + SCALE] = (blockwise.scales_shape(shape, flat=flat), torch.float32)
        else:
            spec[key] = (tuple(shape), kept)
    return spec


def is_coded(state: Mapping[str, Any], key: str) -> bool:
    """Whether a state keeps this moment as codes."""
    return key + SCALE in state


def read(state: Mapping[str, Tensor], key: str) -> Tensor:
    """A moment as numbers: the tensor of the state itself, or decoded from its codes (float32)."""
    if not is_coded(state, key):
        return state[key]
    return blockwise.decode(state[key], state[key + SCALE], squared=is_squared(key))


def coded(key: str, values: Tensor, *, flat: bool) -> dict[str, Tensor]:
    """The tensors of a state that keep these numbers as codes."""
    codes, scales = blockwise.encode(values, squared=is_squared(key), flat=flat)
    return {key: codes, key + SCALE: scales}


def write_(state: Mapping[str, Tensor], key: str, values: Tensor) -> None:
    """Keep these numbers as a moment, in place."""
    if not is_coded(state, key):
        state[key].copy_(values)
        return
    scales = state[key + SCALE]
    for name, found in coded(key, values, flat=scales.ndim == 1).items():
        state[name].copy_(found)


def zero_code(key: str) -> int:
    """The code that stands for zero in a moment that is kept as codes."""
    return blockwise.zero_code(squared=is_squared(key))


@contextmanager
def opened(
    state: dict[str, Tensor], keys: Iterable[str], dtype: torch.dtype | None = None
) -> Iterator[dict[str, Tensor]]:
    """A state in which these moments are numbers, to be changed in place; what is a copy is written back at the end.

    Args:
        state: As it is kept.
        keys: Of the moments.
        dtype: Of the numbers; None: as they are kept, float32 where that is as codes.
    """
    numbers = {key: read(state, key) for key in keys}
    if dtype is not None:
        numbers = {key: values.to(dtype) for key, values in numbers.items()}
    copies = {key: values for key, values in numbers.items() if values is not state[key]}
    yield {**state, **copies} if copies else state
    for key, values in copies.items():
        write_(state, key, values)


def in_pieces(
    weight: Tensor, grad: Tensor, state: dict[str, Tensor], keys: Iterable[str]
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
    """A parameter with its gradient and its moments, some rows at a time: number, weight, gradient, state of each.

    So that what a step in float32 holds for its time is bounded, and not a multiple of an embedding. Blocks of codes
    never straddle rows, so the numbers are those of a step of the whole, to rounding. Scalars, vectors and flat blocks
    are one piece.
    """
    mine = [name for key in keys for name in (key, key + SCALE) if name in state]
    is_whole = weight.ndim < 2 or any(state[name].ndim < 2 for name in mine)
    rows = max(1, PIECE // max(1, math.prod(weight.shape[1:])))
    if is_whole or rows >= len(weight):
        yield 0, weight, grad, state
        return
    for number, start in enumerate(range(0, len(weight), rows)):
        part = slice(start, start + rows)
        yield number, weight[part], grad[part], state | {name: state[name][part] for name in mine}


def layout_of(key: str, parameter: Tensor) -> str:
    """How a state tensor that goes with a parameter's numbers is spread (``sharding.make_state``)."""
    if not key.endswith(SCALE):
        return "like"
    split = split_of(parameter)
    return "rows" if split is not None and split.dim is not None else "whole"


def refuse_columns(name: str, parameter: Tensor, spec: StateSpec) -> None:
    """Raise UnsupportedError for 8-bit moments of a parameter whose columns are spread over processes."""
    split = split_of(parameter)
    if split is None or not split.dim or torch.uint8 not in {dtype for _, dtype in spec.values()}:
        return
    raise UnsupportedError(
        f"{name} {tuple(parameter.shape)} is cut along dimension {split.dim}, across the blocks of its 8-bit moments. "
        "Cut it along the first (leave shard_placement_fn out), or use state_dtype float32."
    )


def dtype_problems(group: Mapping[str, Any], *names: str) -> list[str]:
    """What is wrong with the options of a group that say how moments are kept, one sentence each.

    Codes need a library, but on the meta device, where none is ever made.
    """
    known = (*DTYPES, EIGHT_BIT)
    problems = [
        f"{name} must be one of {', '.join(known)} or None, got {group[name]!r}."
        for name in names
        if group[name] not in (*known, None)
    ]
    if any(group[name] == EIGHT_BIT for name in names) and any(not p.is_meta for p in group["params"]):
        problems += blockwise.library_problems()
    return problems
