"""The only file that knows DTensor and torch.distributed: how a tensor is spread, and sums over its parts.

A parameter may be whole in every process (one process, DDP), or spread over several along one dimension
(FSDP2's ``fully_shard``, HSDP, one-dimensional tensor parallelism). A ``Split`` says how. What needs more than a
process's own part is written as a routine, a generator that yields a `Request` and is sent the answer;
``run_together`` runs many routines at once and answers requests of one kind by one collective for all of them.

Parts are those of ``torch.chunk``: equal, but for the last ones, which may be shorter or empty.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fullrank.errors import UnsupportedError

BUCKET = 1 << 24
"""Numbers that are copied into one buffer for a collective, at most; a larger tensor goes by itself."""


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


# Routines: what needs more than a process's own part.


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
    for numbers in _buckets([(request.tensor, split.group) for split, request in asked], sizes):
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


def _buckets(entries: Sequence[tuple[Tensor, Any]], sizes: Sequence[int]) -> list[list[int]]:
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


# Whole tensors in several processes, as under DDP.


def num_processes() -> int:
    """Processes that train together: of the default group, or what torchrun says before there is one."""
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
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast(tensors: Sequence[Tensor], source: int, group: Any = None) -> None:
    """Overwrite these tensors by those of one process, buckets of one dtype at a time.

    Args:
        tensors: Of the same shapes and dtypes in all processes; whole tensors, or local parts in ``group``.
        source: Number of the process in the default group.
        group: Processes that take part; None: all.
    """
    for numbers in _buckets([(tensor, None) for tensor in tensors], [tensor.numel() for tensor in tensors]):
        several = [tensors[number] for number in numbers]
        if len(several) == 1 and several[0].is_contiguous():
            dist.broadcast(several[0], src=source, group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in several])
        dist.broadcast(flat, src=source, group=group)
        for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
            tensor.copy_(part.view(tensor.shape))


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


# A model that DDP has wrapped, beside whose collectives others run.


def wrapper_of(module: nn.Module) -> Any:
    """The DistributedDataParallel around this very module whose forward pass is under way, or None."""
    active: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return active if active is not None and active.module is module else None


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


def mean_(tensors: Sequence[Tensor], group: Any) -> None:
    """Overwrite these tensors by their means over a group's processes, buckets of one dtype at a time."""
    for numbers in _buckets([(tensor, None) for tensor in tensors], [tensor.numel() for tensor in tensors]):
        several = [tensors[number].div_(dist.get_world_size(group)) for number in numbers]
        for tensor, total in zip(several, all_reduce(several, group), strict=True):
            if total is not tensor:
                tensor.copy_(total)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has been applied to a model or a part of it."""
    known = sys.modules.get("torch.distributed.fsdp")
    return known is not None and any(isinstance(module, known.FSDPModule) for module in model.modules())


def any_part(flag: Tensor, split: Split | None) -> bool:
    """Whether a flag (0-d) is set in any process that holds a part: a collective; None: there is one part."""
    if split is None or split.num == 1:
        return bool(flag)
    return bool(all_reduce([flag.to(torch.int32).view(1)], split.group, "max")[0])


# A whole model, and the processes that train it.


def shard_model(
    model: nn.Module, blocks: Sequence[nn.Module], *, device: torch.device, shard_size: int | None = None
) -> None:
    """Spread a model's parameters over all processes by FSDP2: those of each block together, then all others.

    Its weights must be the same in all processes. Parameters are replaced: put hooks and optimizers on afterwards. A
    process that is alone makes a group of one, which ``disconnect`` ends.

    Args:
        model: On any device; what a process keeps of it lies on ``device`` afterwards.
        blocks: Its layers, gathered one at a time by a forward and a backward pass.
        device: Of this process.
        shard_size: Processes that one copy of the model is spread over, the others repeat it (HSDP); None: all.

    Raises:
        UnsupportedError: If the parameters that train in one block are of several data types.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device.type)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = shard_size or dist.get_world_size()
    copies = dist.get_world_size() // size
    shape, names = ((size,), ("shard",)) if copies == 1 else ((copies, size), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    inside: set[nn.Parameter] = set()
    for module in (*blocks, model):
        own = [parameter for parameter in module.parameters() if parameter not in inside]
        if len(dtypes := {parameter.dtype for parameter in own if parameter.requires_grad}) > 1:
            raise UnsupportedError(
                f"FSDP2 gathers what trains in a {type(module).__name__} at once, and it is of several data types: "
                f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}. Give all of them one, or "
                "train under DDP."
            )
        fully_shard(module, mesh=mesh)
        inside.update(module.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what the last forward pass has gathered of a model that FSDP2 has spread; it would go stale.

    So the modules hold their spread parameters again. A model that is not spread stays as it is.
    """
    for module in _spread_modules(model):
        module.reshard()


def gathered_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a model that FSDP2 has spread, by what is gathered at once; of any other model none."""
    reshard(model)
    groups: dict[int, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()

    def visit(module: Any, group: list[nn.Parameter]) -> None:
        if module in spread_modules:
            # Modules that were given to fully_shard together have one state.
            group = groups.setdefault(id(module._get_fsdp_state()), [])
        own = [p for p in module.parameters(recurse=False) if is_sharded(p) and p not in seen]
        seen.update(own)
        group.extend(own)
        for child in module.children():
            visit(child, group)

    if spread_modules := set(_spread_modules(model)):
        visit(model, [])
    return list(groups.values())


def _spread_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called for."""
    known = sys.modules.get("torch.distributed.fsdp")
    return [] if known is None else [module for module in model.modules() if isinstance(module, known.FSDPModule)]


def sum_over_copies(model: nn.Module, is_due: bool) -> None:
    """Whether the next backward pass sums gradients over the copies of the model (HSDP), or the one after it."""
    sharded: Any = model
    sharded.set_requires_all_reduce(is_due)


def disconnect() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_disconnection(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other processes are gone, or do not answer in time."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())
