"""Whole models: spread by FSDP2, or wrapped by DDP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from fullrank.errors import UnsupportedError
from fullrank.sharding.split import is_sharded


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
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
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


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) has been applied to a model or a part of it."""
    return bool(_spread_modules(model))


def sum_over_copies(model: nn.Module, is_due: bool) -> None:
    """Whether the next backward pass sums gradients over the copies of the model (HSDP), or the one after it."""
    sharded: Any = model
    sharded.set_requires_all_reduce(is_due)


def wrapper_of(module: nn.Module) -> Any:
    """The DistributedDataParallel around this very module whose forward pass is under way, or None."""
    active: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return active if active is not None and active.module is module else None


def _spread_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called for."""
    known = sys.modules.get("torch.distributed.fsdp")
    return [] if known is None else [module for module in model.modules() if isinstance(module, known.FSDPModule)]
