"""Layers of bitsandbytes whose weight is kept as codes: found, read, saved, brought back, and made plain again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import CheckpointError
from fullrank.ops.codes import ROW_FORMAT, ROW_SCALES, WEIGHT, decode_flat, decoded_shape

KINDS = ("Params4bit", "Int8Params")
ORIGIN = "_fullrank_origin"
"""Attribute of such a layer: the fingerprint of its weight before it was rounded to codes, where that is known."""
DECODER = "_fullrank_decoder"
"""Attribute of a layer that stands for one with codes in a plan: makes what these decode to, in the given type."""
WAITING = "_fullrank_waiting"
"""Attribute of a layer that takes states whole: parts that came without the others, as from one of several files."""
STEP = 7.874015718698502e-3
"""What bitsandbytes takes for 1 / 127."""


def is_quantized(weight: Any) -> bool:
    """Whether a weight is kept as bitsandbytes' codes."""
    return type(weight).__name__ in KINDS and not getattr(weight, "has_fp16_weights", False)


def layers_with_codes(model: nn.Module) -> dict[str, Any]:
    """Name of each weight that is kept as codes -> its layer; PEFT's layers show that of the one they wrap."""
    return {f"{name}.{WEIGHT}".lstrip("."): module for name, module in model.named_modules() if _has_codes(module)}


def layer_with_codes(model: nn.Module, name: str) -> Any:
    """The layer whose weight has this name, if it is kept as codes; else None."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return module if attribute == WEIGHT and _has_codes(module) else None


def shape_of(layer: Any) -> tuple[int, int]:
    """Rows and columns of the weight of a layer; what is stored of 4-bit ones is packed."""
    return layer.out_features, layer.in_features


def num_entries(weight: Tensor) -> int:
    """Entries of a weight, which may be kept as codes: two of 4 bits to a byte."""
    state: Any = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def dtype_beside(parameters: Iterable[Tensor], default: torch.dtype = torch.float32) -> torch.dtype:
    """The type of a model's weights, read off the first one that is no codes; the default where all are."""
    return next((p.dtype for p in parameters if p.is_floating_point() and not is_quantized(p)), default)


def is_encoded(layer: Any) -> bool:
    """Whether the codes are there yet: bitsandbytes makes them when a layer is moved to its device."""
    weight = layer.weight
    if hasattr(layer, DECODER):
        return True
    return weight.quant_state is not None if type(weight).__name__ == "Params4bit" else weight.dtype == torch.int8


def read_codes(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The decoded weight of a layer (M x N), rounded once to this type."""
    weight: Any = layer.weight
    if (decoder := getattr(layer, DECODER, None)) is not None:
        stand_in: Tensor = decoder(dtype)
        return stand_in
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes import functional

        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # turns the layout that bitsandbytes uses for inference on CPUs back
        return decode_flat(functional.dequantize_4bit, weight.data, weight.quant_state, dtype)
    codes, scales = _int8(layer)
    return codes.float().mul_(scales.view(-1, 1)).mul_(STEP).to(dtype)  # bitsandbytes' own order, with one temporary


def codes_of(layer: Any) -> dict[str, Tensor]:
    """Codes of a layer and what decodes them, by bitsandbytes' own names."""
    beside = (WEIGHT, ROW_SCALES, ROW_FORMAT)
    return {n: t for n, t in layer.state_dict().items() if n in beside or n.startswith(f"{WEIGHT}.")}


def keep_codes_(layer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put codes into a layer, with what decodes them: what ``codes_of`` gave."""
    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        statistics = {name: tensor for name, tensor in tensors.items() if name != WEIGHT}
        found = type(weight).from_prequantized(tensors[WEIGHT], statistics, device=weight.device)
        weight.data, weight.quant_state = found.data, found.quant_state
        layer.quant_state = weight.quant_state
    else:
        keep_int8_(layer, tensors[WEIGHT].to(weight.device), tensors[ROW_SCALES].to(weight.device))


def keep_int8_(layer: Any, codes: Tensor, scales: Tensor) -> None:
    """Put 8-bit codes and their scales into a layer."""
    layer.weight.data = codes
    holder = layer.state if layer.state.CB is not None else layer.weight
    holder.CB, holder.SCB = codes, scales


def accept_states(model: nn.Module) -> None:
    """Let every layer with codes take them out of a state dict together with what decodes them, and never without.

    bitsandbytes' own layers refuse what decodes 4-bit codes, and take plain weights for 8-bit ones. The parts may come
    one after the other, from several state dicts (``strict=False``); one that brings a part again starts anew.
    """
    for layer in layers_with_codes(model).values():
        if not hasattr(layer, DECODER) and not hasattr(layer, WAITING):
            setattr(layer, WAITING, {})
            layer.register_load_state_dict_pre_hook(_load_codes)


def plain_layer(
    layer: Any, weight: Tensor, dtype: torch.dtype, *, device: torch.device | str | None = "cpu"
) -> nn.Linear:
    """A linear layer with a weight in the place of codes, and the bias of the layer that had these.

    Args:
        layer: With codes.
        weight: What they stand for, or what has become of it.
        dtype: Data type of the new weight.
        device: Where it lies; None: where the given one does.
    """
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(device or weight.device, dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of this name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _load_codes(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: Any,
    error_msgs: Any,
) -> None:
    """Put codes that are in a state dict into their layer, if all that decodes them is there or was before."""
    if not is_encoded(layer):  # bitsandbytes makes codes of plain weights when such a layer is moved
        return
    waiting: dict[str, Tensor] = getattr(layer, WAITING)
    own = codes_of(layer).keys() - {ROW_FORMAT}  # there is one format, and bitsandbytes takes its number out first
    given = {name: state_dict.pop(prefix + name) for name in sorted(own) if prefix + name in state_dict}
    if not given:
        return
    if WEIGHT in given:
        state_dict[prefix + WEIGHT] = layer.weight  # for torch, which would miss it, to copy onto itself
        codes = given[WEIGHT]
        if (codes.dtype, codes.shape) != (layer.weight.dtype, layer.weight.shape):
            waiting.clear()
            raise _no_codes(layer, prefix, codes.dtype, codes.shape)
    missing_keys.extend(prefix + name for name in sorted(own - given.keys() - {WEIGHT}))  # torch says so of the weight
    if given.keys() & waiting.keys():
        waiting.clear()
    waiting |= given
    if waiting.keys() == own:
        parts = dict(waiting)
        waiting.clear()
        if (shape := decoded_shape(parts, tuple(parts[WEIGHT].shape))) != shape_of(layer):
            raise _no_codes(layer, prefix, parts[WEIGHT].dtype, shape)
        keep_codes_(layer, parts)


def _no_codes(layer: Any, prefix: str, dtype: torch.dtype, shape: tuple[int, ...]) -> CheckpointError:
    own, found = layer.weight, str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"{prefix}{WEIGHT} is kept as codes ({str(own.dtype).removeprefix('torch.')} of {tuple(own.shape)}, for "
        f"{' x '.join(map(str, shape_of(layer)))} entries), and this state has {found} of {tuple(shape)} for it. Load "
        "plain weights into the plain model, before its layers are made codes or after dequantize_; load codes where "
        "the layers are of the same size and kind."
    )


def _has_codes(module: nn.Module) -> bool:
    return is_quantized(module._parameters.get(WEIGHT)) or hasattr(module, DECODER)


def _int8(layer: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales of an 8-bit layer: with the weight until the first forward pass, then in the layer's state."""
    holder = layer.state if layer.state.CB is not None else layer.weight
    return holder.CB, holder.SCB
