"""Which saved state an optimizer of ours may load: one of the same groups, options, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import CheckpointError, UnsupportedError
from fullrank.sharding import is_sharded, local, own_shape, split_of, spread

StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""State key -> shape and dtype."""

GUEST = "sparse_"
"""State under keys that start so is not an optimizer's own: SIFT keeps what belongs to a parameter there."""


def bytes_of(spec: StateSpec) -> int:
    """Bytes of all tensors of a state."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def paired(optimizer: Any, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor, dict[str, Any]]]:
    """The number of each saved state, with the parameter and the group of the optimizer that it belongs to."""
    for saved_group, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(saved_group["params"], group["params"], strict=True):
            if index in state_dict["state"]:
                yield index, parameter, group


def own_entries(state: dict[str, Any]) -> dict[str, Any]:
    """What of a parameter's state is the optimizer's own."""
    return {key: value for key, value in state.items() if not key.startswith(GUEST)}


def without_own(state: dict[str, Any]) -> dict[str, Any]:
    """What of a parameter's state belongs to a guest."""
    return {key: value for key, value in state.items() if key.startswith(GUEST)}


def check_loadable(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Refuse a saved state that is not of this ``MethodOptimizer``.

    Raises:
        CheckpointError: If it is of another optimizer, of other groups, options, shapes or dtypes, or sharded where
            the parameters are whole.
        UnsupportedError: If an option that it brings cannot work on how the parameters are spread.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            f"this is not an optimizer's state: it holds {sorted(map(str, state_dict))}, expected state and "
            "param_groups. Load what optimizer.state_dict() returned."
        )
    kind = type(optimizer).__name__
    _check_groups(optimizer, state_dict["param_groups"])
    known = {index for group in state_dict["param_groups"] for index in group["params"]}
    if strange := sorted(map(str, state_dict["state"].keys() - known)):
        raise CheckpointError(
            f"this state holds {len(strange)} parameters that are in none of its groups, first {strange[0]}: it was "
            "cut short or joined from two. Load what optimizer.state_dict() returned."
        )
    for index, parameter, group in paired(optimizer, state_dict):
        saved = own_entries(state_dict["state"][index])
        expected = optimizer.state_spec(_as_saved(parameter, state_dict["state"][index]), group)
        found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items() if torch.is_tensor(value)}
        if found != expected or len(found) != len(saved):
            raise CheckpointError(
                f"this state does not belong to this {kind}: for a parameter of shape "
                f"{tuple(parameter.shape)} it holds {_show(found, saved)}, expected {_show(expected, expected)}. "
                "Build the model and the optimizer as they were when it was saved."
            )
        for key, value in saved.items():
            if is_sharded(value):
                _check_spread(optimizer, key, value, parameter, group)


def _as_saved(parameter: Tensor, saved: dict[str, Any]) -> Tensor:
    """A parameter as it is once a state is loaded: a guest may bring it another size, of as many dimensions."""
    values = saved.get(GUEST + "values")
    if is_sharded(parameter) or not torch.is_tensor(values) or values.ndim != parameter.ndim:
        return parameter
    return torch.empty(values.shape, dtype=parameter.dtype, device="meta")


def _check_groups(optimizer: Any, saved_groups: list[dict[str, Any]]) -> None:
    """Refuse groups of other sizes, of another kind of state, or with options that cannot be."""
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if saved_sizes != sizes:
        raise CheckpointError(
            f"this state is for parameter groups of {saved_sizes} parameters, this {type(optimizer).__name__} has "
            f"{sizes}. Build the model and the groups as they were when it was saved."
        )
    for saved_group, group in zip(saved_groups, optimizer.param_groups, strict=True):
        for key in optimizer.structural:
            if key not in saved_group or saved_group[key] != group[key]:
                raise CheckpointError(
                    f"this state was saved with {key} {saved_group.get(key, 'not set')!r}, this optimizer has "
                    f"{group[key]!r}. Build the optimizer with the options it was saved with."
                )
        brought = {**group, **saved_group, "params": group["params"]}
        if problems := optimizer.option_problems(brought):
            raise CheckpointError(f"this state brings options that cannot be: {' '.join(problems)} Save it again.")
        for name, parameter, owner in optimizer.named(trainable=False):
            if owner is group:
                _check_layout(optimizer, name, parameter, group, brought)


def _check_layout(optimizer: Any, name: str, parameter: Tensor, group: dict[str, Any], brought: dict[str, Any]) -> None:
    """Refuse options that a state brings and that cannot work on how a parameter is spread."""
    optimizer.refuse_layout(name, parameter, group)
    try:
        optimizer.refuse_layout(name, parameter, brought)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"with the options that this state was saved with, {error} They come with its param_groups: change "
            "them there before it is loaded."
        ) from None


def _check_spread(optimizer: Any, key: str, value: Tensor, parameter: Tensor, group: dict[str, Any]) -> None:
    """Refuse a sharded tensor whose parts are not those that this process's part of the parameter needs."""
    split = split_of(parameter)
    if split is not None:
        wanted = own_shape(value.shape, parameter, split, optimizer.state_layout(key, parameter, group))
        if tuple(local(value).shape) == wanted:
            return
    where = "whole" if split is None else "spread otherwise"
    raise CheckpointError(
        f"this state is sharded over processes ({key} of shape {tuple(value.shape)}), and its parameter is "
        f"{where}. Load it by torch.distributed.checkpoint, or gather it: get_optimizer_state_dict(..., "
        "options=StateDictOptions(full_state_dict=True))."
    )


def placed(optimizer: Any, key: str, value: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A copy of a saved tensor where its parameter is, and spread as its state has to be."""
    if key == "step":
        return value.to("cpu", copy=True)
    split = split_of(parameter)
    if split is None or is_sharded(value):
        return value.to(parameter.device, copy=True)
    layout, part = optimizer.state_layout(key, parameter, group), value
    if layout == "rows":
        part = split.rows(value)
    elif layout == "like" and split.dim is not None:
        start, end = split.bounds(value.shape[split.dim])
        part = value.narrow(split.dim, start, end - start)
    part = part.to(parameter.device, copy=True, memory_format=torch.contiguous_format)
    return spread(part, value.shape, split, layout)


def _show(tensors: StateSpec, everything: dict[str, Any]) -> str:
    parts = [f"{key} {list(shape)} {str(dtype).removeprefix('torch.')}" for key, (shape, dtype) in tensors.items()]
    parts += [f"{key} ({type(value).__name__})" for key, value in everything.items() if key not in tensors]
    return ", ".join(parts)
