"""The ways to train in several processes, as a user of a bare loop would start each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import loop
from tests.distributed.loop import Plan, Run


def ddp(plan: Plan) -> Run:
    """The method on the plain model, then DDP around it; a parameter is unused, which DDP must look for."""
    model = plan.network()
    built = plan.build(model)
    return Run(plan, DistributedDataParallel(model, find_unused_parameters=True), built)


def fsdp2(plan: Plan, **options: Any) -> Run:
    """Every block and the root sharded, then the method on the sharded parameters."""
    model: Any = plan.network()
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return Run(plan, model, plan.build(model))


def hsdp(plan: Plan) -> Run:
    """Two replicas, each spread over two processes."""
    return fsdp2(plan, mesh=init_device_mesh(loop.DEVICE.type, (2, 2), mesh_dim_names=("replicas", "shards")))


def columns(plan: Plan) -> Run:
    """Matrices cut along their columns wherever FSDP2 can: where these divide by the number of processes."""
    _, world = loop.place()

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % world == 0 else None

    return fsdp2(plan, shard_placement_fn=placement)


def mixed(plan: Plan) -> Run:
    """Weights and reduced gradients in float32, all else in bfloat16."""
    return fsdp2(plan, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp1(plan: Plan) -> Run:
    """FSDP's first version, which cuts flat pieces out of the weights."""
    model = FullyShardedDataParallel(plan.network(), use_orig_params=True, device_id=loop.DEVICE)
    return Run(plan, model, plan.build(model))


WAYS: dict[str, Callable[[Plan], Run]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "columns": columns,
    "mixed": mixed,
    "fsdp1": fsdp1,
}
