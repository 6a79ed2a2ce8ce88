"""How a tensor is spread over processes: whole, or cut along one dimension, and what a process holds of it.

A parameter may be whole in every process (one process, DDP), or spread over several along one dimension (FSDP2's
``fully_shard``, HSDP, one-dimensional tensor parallelism). A ``Split`` says how. Parts are those of ``torch.chunk``:
equal, but for the last ones, which may be shorter or empty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Split:
    """How a tensor is spread over processes: along ``dim``, in ``num`` parts, of which this process has ``part``."""

    mesh: Any
    """torch's DeviceMesh."""
    mesh_dim: int
    """Dimension of the mesh along which the parts lie; along others they are repeated (HSDP)."""
    dim: int | None
    """Dimension of the tensor that is cut; None: whole in every process."""
    num: int
    part: int

    @property
    def group(self) -> Any:
        """The processes that hold the parts of one copy."""
        return self.mesh.get_group(self.mesh_dim)

    @property
    def is_cut(self) -> bool:
        """Whether a process has a part only: false for a tensor that is whole everywhere, and in a group of one."""
        return self.dim is not None and self.num > 1

    def bounds(self, size: int) -> tuple[int, int]:
        """First row, and the one after the last, of this process's part of so many rows."""
        share = -(-size // self.num)
        return min(self.part * share, size), min((self.part + 1) * share, size)

    def rows(self, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor along its first dimension (a view)."""
        start, end = self.bounds(len(tensor))
        return tensor[start:end]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, spread over several processes."""
    known = sys.modules.get("torch.distributed.tensor")  # not imported: there are none, and it costs 100 MB
    return known is not None and isinstance(tensor, known.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: its part of a DTensor, any other as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part: Tensor = sharded._local_tensor  # to_local() would be a new tensor each time, and unknown to autograd's counts
    return part


def own_bytes(tensor: Tensor) -> int:
    """Bytes of what this process holds of a tensor."""
    return local(tensor).numel() * tensor.element_size()


def split_of(tensor: Tensor, *, name: str = "a parameter") -> Split | None:
    """How a parameter is spread; None if it is no DTensor.

    Raises:
        UnsupportedError: If it is cut along more than one dimension (FSDP with tensor parallelism), or holds sums
            that are still to be taken.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    cut = [number for number, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    many = [number for number in cut if mesh.size(number) > 1]
    if len(many) > 1 or any(type(placements[number]) is not Shard for number in many):
        raise UnsupportedError(
            f"{name} of shape {tuple(tensor.shape)} is spread as {tuple(placements)}, along more than one dimension of "
            "the mesh (FSDP2 together with tensor parallelism?), which these methods cannot train. Shard it along "
            "one: fully_shard with a mesh of (replicas, shards), or tensor parallelism alone."
        )
    cut = [number for number in cut if isinstance(placements[number], Shard)]
    number = (many or cut or [0])[0]
    dim = placements[number].dim if cut else None
    if dim is not None and dim and tensor.ndim > 2:
        raise UnsupportedError(
            f"{name} of shape {tuple(tensor.shape)} is cut along dimension {dim}, and a weight of more than two "
            "dimensions can be cut along the first alone. Leave shard_placement_fn out for it."
        )
    return Split(mesh, number, dim, mesh.size(number) if cut else 1, mesh.get_local_rank(number) if cut else 0)


def gradient_of(parameter: Tensor) -> Tensor:
    """This process's part of a parameter's gradient, spread as the parameter is."""
    grad: Any = parameter.grad
    assert grad is not None
    if is_sharded(parameter) and is_sharded(grad):
        owner: Any = parameter
        if grad.placements != owner.placements:
            grad = grad.redistribute(placements=owner.placements)
    return local(grad)


def make_state(shape: Sequence[int], dtype: torch.dtype, parameter: Tensor, split: Split | None, how: str) -> Tensor:
    """Zeros for the state of a parameter: a plain tensor, or a DTensor where the parameter is one.

    Args:
        shape: Of the whole.
        dtype: Data type.
        parameter: Says where; its own placements for ``how="like"``.
        split: Of the parameter.
        how: ``rows``: cut along the first dimension as a parameter would be; ``whole``: in every process;
            ``like``: as the parameter, of the same shape.
    """
    device = local(parameter).device
    if split is None:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return spread(torch.zeros(own_shape(shape, parameter, split, how), dtype=dtype, device=device), shape, split, how)


def own_shape(shape: Sequence[int], parameter: Tensor, split: Split, how: str) -> tuple[int, ...]:
    """Shape of this process's part of a state tensor (see ``make_state``)."""
    if how == "like":
        return tuple(local(parameter).shape)
    if how == "rows":
        start, end = split.bounds(shape[0])
        return (end - start, *shape[1:])
    return tuple(shape)


def spread(part: Tensor, shape: Sequence[int], split: Split, how: str) -> Tensor:
    """A DTensor of this shape from every process's part of it; nothing is sent (``how`` as in ``make_state``)."""
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    placements: list[Placement] = [Replicate()] * split.mesh.ndim
    dim = {"rows": 0, "like": split.dim, "whole": None}[how]
    if dim is not None:
        placements[split.mesh_dim] = Shard(dim)
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    made: Tensor = DTensor.from_local(part, split.mesh, placements, run_check=False, shape=size, stride=stride)
    return made


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, spread as the DTensor ``like``; nothing is sent."""
    split = split_of(like)
    assert split is not None
    if split.dim is None:
        return spread(whole, whole.shape, split, "whole")
    start, end = split.bounds(whole.shape[split.dim])
    part = whole.narrow(split.dim, start, end - start).clone(memory_format=torch.contiguous_format)
    return spread(part, whole.shape, split, "like")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process: a collective if it is a DTensor."""
    sharded: Any = tensor
    found: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return found


def keep_(tensor: Tensor, whole: Tensor) -> None:
    """Overwrite a tensor by a whole one, the same in all processes: each keeps its part; nothing is sent."""
    local(tensor).copy_(local(part_of(whole, tensor)) if is_sharded(tensor) else whole)


def own_places(places: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Which of some entries of a whole tensor this process holds, and where.

    Args:
        places: Their row-major numbers in the whole.
        tensor: A DTensor or any other.

    Returns:
        A mask over the places, and the row-major numbers of those in this process's part.
    """
    split = split_of(tensor)
    if split is None or split.dim is None:
        return torch.ones_like(places, dtype=torch.bool), places
    size, inner = tensor.shape[split.dim], tensor.shape[split.dim + 1 :].numel()
    start, end = split.bounds(size)
    along = places // inner % size
    here = (along >= start) & (along < end)
    outer = places // (size * inner)
    return here, ((outer * (end - start) + along - start) * inner + places % inner)[here]


def refuse_sharded(tensor: Tensor, *, optimizer: str) -> None:
    """Raise UnsupportedError for a tensor that is spread over several processes, where only whole ones will do."""
    if is_sharded(tensor):
        raise UnsupportedError(
            f"{optimizer} cannot work on a sharded parameter: got a DTensor of shape {tuple(tensor.shape)} with "
            f"placements {getattr(tensor, 'placements', None)}. Train with DistributedDataParallel (torchrun), which "
            "keeps whole parameters in every process."
        )


def refuse_flattened(tensor: Tensor, *, name: str, user: str) -> None:
    """Raise UnsupportedError for a parameter that an engine has cut into flat pieces, in which no matrix is left."""
    if hasattr(tensor, "ds_id") or getattr(tensor, "_fsdp_flattened", False):
        engine = "DeepSpeed ZeRO" if hasattr(tensor, "ds_id") else "FSDP1 (FullyShardedDataParallel)"
        raise UnsupportedError(
            f"{name} belongs to {engine}, which cuts weights into flat pieces, so {user} would see no matrices. Shard "
            "the model by torch.distributed.fsdp.fully_shard (FSDP2), or train under DDP."
        )
