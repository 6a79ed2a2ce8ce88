"""Small files of what sparse training changed: written, checked against their base, put on and taken off again.

``adapter.safetensors`` holds the places (int32) and what was added to each (bfloat16 or float32): 6 bytes an
entry in bfloat16. Weights that trained densely are in it whole. ``adapter.json`` says what base they
belong to. Several adapters can lie on one model; taking one off restores the exact weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fullrank.errors import CheckpointError, ConfigError
from fullrank.ops import sparse
from fullrank.ops.sparse import GRANULARITIES, Layout
from fullrank.sharding import local, own_places, sum_of_parts

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLE = 64
"""Entries of a parameter that its fingerprint is made of."""
SPREAD = 2654435761
"""Step between them, modulo their number: 2^32 over the golden ratio, so that they lie in all rows and columns."""
STACK = "_sparse_adapters"
"""Attribute of a model: the adapters on it, in order, and the fingerprint of the bare model."""


@dataclass(frozen=True, slots=True)
class Change:
    """What training added to one weight: units (host), the entries' differences (K, host), how units are counted."""

    units: Tensor
    delta: Tensor
    layout: Layout


@torch.no_grad()
def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """A short hash for each parameter: of its shape and of 64 entries spread over it, rounded to bfloat16.

    A model loaded in bfloat16 and the same one in float32 agree. Empty on the meta device.
    """
    if any(parameter.is_meta for parameter in parameters.values()):
        return {}
    samples = []
    for parameter in parameters.values():
        count = min(SAMPLE, parameter.numel())
        places = torch.arange(count, device=parameter.device) * SPREAD % max(parameter.numel(), 1)
        is_here, places = own_places(places, parameter)
        part = local(parameter).detach()
        taken = sparse.take(part, places, Layout(tuple(part.shape))).to(torch.bfloat16).view(torch.int16)
        samples.append(taken.new_zeros(count).masked_scatter_(is_here, taken))
    samples = sum_of_parts(samples, list(parameters.values()))
    hashes = {}
    for (name, parameter), sample in zip(parameters.items(), _to_host(samples), strict=True):
        content = repr(tuple(parameter.shape)).encode() + sample.numpy().tobytes()
        hashes[name] = hashlib.sha256(content).hexdigest()[:16]
    return hashes


def save_adapter(
    folder: str | Path,
    changes: Mapping[str, Change],
    dense: Mapping[str, Tensor],
    *,
    base: Mapping[str, str],
    settings: Mapping[str, Any],
    model: nn.Module,
    dtype: str = "bfloat16",
) -> int:
    """Write an adapter into a folder; an older one there is replaced when the new one is whole.

    Returns:
        Bytes of the tensors' file.

    Raises:
        ConfigError: If dtype is neither bfloat16 nor float32, or the folder is a file.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype of an adapter must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the adapter's folder {path} is a file. Choose another.")
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        tensors[f"{name}.units"] = change.units.cpu().contiguous()
        tensors[f"{name}.delta"] = change.delta.to("cpu", DTYPES[dtype]).contiguous()
    for name, weight in dense.items():
        tensors[f"{name}.dense"] = weight.detach().to("cpu", copy=True).contiguous()
    partial = path / f"{TENSORS}.partial"
    save_file(tensors, partial)
    description = {
        "format": FORMAT,
        "method": "sift",
        "settings": dict(settings),
        "dtype": dtype,
        "model": _about(model),
        "weights": {name: _about_layout(change.layout) for name, change in changes.items()},
        "dense": list(dense),
        "base": dict(base),
        "sha256": _digest(partial),
        "versions": {"fullrank": _version("fullrank"), "torch": torch.__version__},
    }
    partial_description = path / f"{DESCRIPTION}.partial"
    partial_description.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    partial.replace(path / TENSORS)
    partial_description.replace(path / DESCRIPTION)
    return (path / TENSORS).stat().st_size


class SparseAdapter:
    """What sparse training added to a base model, on the host until it is applied."""

    def __init__(self, description: dict[str, Any], changes: dict[str, Change], dense: dict[str, Tensor]) -> None:
        self.description = description
        self.changes = changes
        self.dense = dense

    @property
    def num_entries(self) -> int:
        """Entries that it changes; densely trained ones not counted."""
        return sum(change.delta.numel() for change in self.changes.values())

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Add it to a model, in place and on top of others that are on it.

        Raises:
            ConfigError: If the model is not the base it was trained from, or has this very adapter on it.
        """
        parameters = _plain_parameters(model)
        stack = _stack(model)
        if any(adapter is self for adapter, _ in stack):
            raise ConfigError("this adapter is on the model already. Call its remove(model) first.")
        if not stack:
            model.__dict__[STACK + "_base"] = fingerprint(parameters)
        self._check_base(parameters, model.__dict__[STACK + "_base"])
        stack.append((self, self._put_on(parameters)))

    @torch.no_grad()
    def remove(self, model: nn.Module) -> None:
        """Take it off again: the model is bit for bit what it would be without it.

        Raises:
            ConfigError: If it is not on the model.
        """
        stack = _stack(model)
        place = next((i for i, (adapter, _) in enumerate(stack) if adapter is self), None)
        if place is None:
            raise ConfigError("this adapter is not on the model. Call apply(model) first.")
        parameters, above = _plain_parameters(model), stack[place + 1 :]
        for adapter, backup in reversed(stack[place:]):
            adapter._take_off(parameters, backup)
        del stack[place:]
        for adapter, _ in above:
            stack.append((adapter, adapter._put_on(parameters)))

    def _check_base(self, parameters: Mapping[str, Tensor], found: Mapping[str, str]) -> None:
        base: dict[str, str] = self.description["base"]
        shapes = {name: change.layout.shape for name, change in self.changes.items()}
        shapes |= {name: tuple(weight.shape) for name, weight in self.dense.items()}
        wrong = [name for name in base if base[name] != found.get(name)]
        wrong += [name for name, s in shapes.items() if name not in parameters or tuple(parameters[name].shape) != s]
        if wrong:
            missing = "" if wrong[0] in parameters else ", which this model lacks"
            name = self.description["model"]["name"]
            raise ConfigError(
                f"this adapter was trained from another base{f' ({name})' if name else ''}: {len(set(wrong))} of its "
                f"{len({*base, *shapes})} weights differ, first {wrong[0]}{missing}. Load that base; nothing was "
                "changed."
            )

    def _put_on(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Change the weights; returns what was there (on the host)."""
        backup = {}
        for name, change in self.changes.items():
            weight = parameters[name].detach()
            units = change.units.to(weight.device)
            before = sparse.take(weight, units, change.layout)
            wide = torch.promote_types(weight.dtype, torch.float32)
            sparse.put_(weight, units, before.to(wide) + change.delta.to(weight.device, wide), change.layout)
            backup[name] = before.cpu()
        for name, values in self.dense.items():
            weight = parameters[name].detach()
            backup[name] = weight.to("cpu", copy=True)
            weight.copy_(values)
        return backup

    def _take_off(self, parameters: Mapping[str, Tensor], backup: Mapping[str, Tensor]) -> None:
        for name, change in self.changes.items():
            weight = parameters[name].detach()
            sparse.put_(weight, change.units.to(weight.device), backup[name].to(weight.device), change.layout)
        for name in self.dense:
            parameters[name].detach().copy_(backup[name])


def load_adapter(folder: str | Path) -> SparseAdapter:
    """Read an adapter from its folder; ``apply`` puts it on a model.

    Raises:
        CheckpointError: If a file is missing, damaged, of another format, or does not fit the other.
    """
    path = Path(folder)
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {description['format']}, this version reads {FORMAT}. Update it.")
        if _digest(path / TENSORS) != description["sha256"]:
            raise CheckpointError(f"{path / TENSORS} is damaged or of another adapter. Copy the folder again.")
        tensors = load_file(path / TENSORS)
        if not isinstance(description["base"], dict) or not description["base"]:
            raise ValueError("base must say which weights it belongs to")
        changes = {name: _change(name, entry, tensors) for name, entry in description["weights"].items()}
        dense = {name: tensors[f"{name}.dense"] for name in description["dense"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not an adapter that can be read: {type(error).__name__} {error}. It needs {DESCRIPTION} and "
            f"{TENSORS}, as save_adapter writes them."
        ) from error
    return SparseAdapter(description, changes, dense)


def _about(model: nn.Module) -> dict[str, Any]:
    """The class of a model and what its configuration says of its origin."""
    config = getattr(model, "config", None)
    return {
        "architecture": type(model).__name__.removeprefix("FSDP"),  # which fully_shard puts before a class's name
        "name": getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None),
        "num_labels": getattr(config, "num_labels", None),
    }


def _about_layout(layout: Layout) -> dict[str, Any]:
    return {"shape": list(layout.shape), "granularity": layout.granularity, "block_size": layout.block_size}


def _change(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
    layout = Layout(tuple(entry["shape"]), entry["granularity"], entry["block_size"])
    units, delta = tensors[f"{name}.units"], tensors[f"{name}.delta"]
    if layout.granularity not in GRANULARITIES or layout.num_units * layout.unit_numel != math.prod(layout.shape):
        raise ValueError(f"{name} cannot be divided into {entry}")
    if units.dtype not in (torch.int32, torch.int64) or delta.dtype not in DTYPES.values():
        raise ValueError(f"{name} has places of {units.dtype} and differences of {delta.dtype}")
    if units.ndim != 1 or delta.ndim != 1 or len(units) * layout.unit_numel != len(delta):
        raise ValueError(f"{name} has {tuple(units.shape)} places for {tuple(delta.shape)} entries")
    if len(units) and (int(units[0]) < 0 or int(units[-1]) >= layout.num_units or bool((units.diff() <= 0).any())):
        raise ValueError(f"{name} has places outside {layout.shape}, or out of order")
    return Change(units, delta, layout)


def _plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    if any(hasattr(parameter, "train_num") for parameter in parameters.values()):
        raise ConfigError("this model is being trained by SIFT, which would undo the change. Call its detach() first.")
    return dict(parameters)


def _stack(model: nn.Module) -> list[tuple[SparseAdapter, dict[str, Tensor]]]:
    stack: list[tuple[SparseAdapter, dict[str, Tensor]]] = model.__dict__.setdefault(STACK, [])
    return stack


def _to_host(samples: Iterable[Tensor]) -> list[Tensor]:
    """Small tensors to the host in one transfer a device."""
    samples = list(samples)
    if len({sample.device for sample in samples}) != 1:
        return [sample.cpu() for sample in samples]
    return list(torch.cat(samples).cpu().split([len(sample) for sample in samples]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
