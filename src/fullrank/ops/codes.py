"""Weights kept as bitsandbytes' codes, decoded from the tensors that such a layer's state dict has.

int8: codes (m x n, int8) and SCB, the largest size of each row (m, float32); a weight is code * SCB / 127.
4-bit: codes (two to a byte), the largest size of each block, and a table of 16 values; the statistics may be
encoded themselves (nested, "double quantization"), which bitsandbytes decodes.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError
from fullrank.ops.sparse import GRANULARITIES, Layout, flat_units, put_

ENTRY_PARTS = ENTRY_UNITS, ENTRY_VALUES, ENTRY_LAYOUT = "sparse_units", "sparse_values", "sparse_layout"
"""Trained entries that stand beside the codes: what their units are kept by, values, and how units are counted."""
QUANT_STATE = ".quant_state.bitsandbytes__"
"""In the name of the tensor that says how a 4-bit weight is to be decoded; nf4 or fp4 follows."""
ROW_SCALES, ROW_FORMAT = "SCB", "weight_format"
WEIGHT = "weight"


def coded_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer of each weight that is kept as codes -> the names, within it, of the tensors that decode it.

    Args:
        names: All tensors of a model or a file by name.
    """
    names = set(names)
    found: dict[str, list[str]] = {}
    for name in names:
        if QUANT_STATE in name:
            layer = name.partition(f"{WEIGHT}{QUANT_STATE}")[0]
            found[layer] = sorted(n.removeprefix(layer) for n in names if n.startswith(f"{layer}{WEIGHT}"))
        elif name.rpartition(".")[2] == ROW_SCALES:
            layer = name.removesuffix(ROW_SCALES)
            found[layer] = [n for n in (WEIGHT, ROW_SCALES, ROW_FORMAT) if f"{layer}{n}" in names]
    for layer, parts in found.items():
        parts += [n for n in ENTRY_PARTS if f"{layer}{n}" in names]
    return found


def decoded_shape(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a coded weight.

    Args:
        tensors: Of its layer, those that say how it is decoded.
        shape: Of its codes.
    """
    packed = [tensor for name, tensor in tensors.items() if QUANT_STATE in name]
    return tuple(json.loads(bytes(packed[0].tolist()))["shape"]) if packed else shape


def decode(tensors: Mapping[str, Tensor]) -> Tensor:
    """A weight (m x n, float32) from the tensors of its layer, with the trained entries in their places.

    Raises:
        UnsupportedError: For a 4-bit weight where bitsandbytes is not installed.
    """
    weight = _decoded(tensors)
    if ENTRY_LAYOUT in tensors:
        kept, values, layout = unpack_entries(tensors)
        if kept is not None and values is not None:
            put_(weight, flat_units(kept, layout), values.view(-1), layout)
    return weight


def pack_entries(kept: Tensor | None, values: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Trained entries as tensors with names: their layout alone where nothing was chosen yet.

    Args:
        kept: What their units are kept by; None before the choice.
        values: Of the entries.
        layout: How units are counted.
    """
    number = GRANULARITIES.index(layout.granularity)
    how = torch.tensor([kept is not None, number, layout.block_size, layout.per_row, *layout.shape])
    return {ENTRY_LAYOUT: how} if kept is None else {ENTRY_LAYOUT: how, ENTRY_UNITS: kept, ENTRY_VALUES: values}


def has_all_entries(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all parts are here of what ``pack_entries`` has made: they may come from several files."""
    return ENTRY_LAYOUT in tensors and (not tensors[ENTRY_LAYOUT][0] or set(ENTRY_PARTS) <= tensors.keys())


def unpack_entries(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Layout]:
    """What ``pack_entries`` was given: what units are kept by, values, and the layout; no units before a choice."""
    _, granularity, block_size, per_row, *shape = tensors[ENTRY_LAYOUT].tolist()
    layout = Layout(tuple(shape), GRANULARITIES[granularity], block_size, bool(per_row))
    return tensors.get(ENTRY_UNITS), tensors.get(ENTRY_VALUES), layout


def _decoded(tensors: Mapping[str, Tensor]) -> Tensor:
    """What the codes of a layer stand for (m x n, float32)."""
    codes = tensors[WEIGHT]
    if ROW_SCALES in tensors:
        return codes.float() * (tensors[ROW_SCALES].float() / 127.0).unsqueeze(1)
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise UnsupportedError(
            "4-bit weights are decoded by bitsandbytes, which is not installed. Install it: pip install "
            "'fullrank[quant]'."
        ) from error
    statistics = {n.removeprefix(f"{WEIGHT}."): t for n, t in tensors.items() if n.startswith(f"{WEIGHT}.")}
    state = QuantState.from_dict(statistics, device=codes.device)
    return decode_flat(dequantize_4bit, codes, state)


def decode_flat(dequantize_4bit: Any, codes: Tensor, state: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 4-bit weight (m x n) by bitsandbytes' function and state, decoded as one row, in this type.

    Blocks of 64 entries go on across rows, which its routine for CPUs forgets (version 0.50) where n is even and no
    multiple of 64.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size((1, math.prod(state.shape)))
    decoded: Tensor = dequantize_4bit(codes, flat)
    return decoded.reshape(state.shape).to(dtype)
