"""A model spread over processes by FSDP2, and checkpoints that are those of one process.

Whatever the strategy and the number of processes, a checkpoint holds whole weights and whole optimizer states under
the names and numbers of a run in one process. So a run goes on under another number of processes, or another strategy.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from fullrank import sharding
from fullrank.errors import CheckpointError, ConfigError
from fullrank.train.config import RunConfig
from fullrank.train.report import num_processes
from fullrank.weights import Stored

logger = logging.getLogger(__name__)

DDP, FSDP2 = "ddp", "fsdp2"
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP of accelerate",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config of accelerate",
}
"""What ``accelerate launch`` sets where its own configuration asks for another engine."""


def strategy_of(config: RunConfig) -> str:
    """How the processes of a run share its model: ``ddp`` or ``fsdp2``."""
    return str(config.trainer.get("strategy") or DDP)


def refuse_launch(config: RunConfig) -> None:
    """Check that the run can be spread over the processes that were started as its trainer section asks for.

    Raises:
        ConfigError: If the launcher asks for another engine, ``shard_size`` does not divide the processes, or states
            are divided twice.
    """
    for variable, engine in LAUNCHED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ConfigError(
                f"{variable} is set: this process was started for {engine}, under which a method would not see its "
                "matrices. Start it with torchrun, or with a configuration of accelerate without it, and set "
                "trainer.strategy to ddp or fsdp2."
            )
    size, processes = config.trainer.get("shard_size"), num_processes()
    if size is not None and processes % size:
        raise ConfigError(
            f"trainer.shard_size must divide the number of processes, {processes}, got {size}. Set it to the GPUs of "
            "one machine, or leave it out to spread the model over all."
        )
    if strategy_of(config) == FSDP2 and getattr(config.method, "partition_states", False):
        raise ConfigError(
            "method.partition_states divides states over the processes of trainer.strategy ddp, and fsdp2 divides them "
            "already. Leave one of them out."
        )
    if processes > 1 and not (sharding.is_connected() or "MASTER_ADDR" in os.environ):
        raise ConfigError(
            f"WORLD_SIZE is {processes}, and there is no MASTER_ADDR at which the processes could meet. Start them "
            "with torchrun, or unset WORLD_SIZE."
        )


def agree_on_start(step: int, content_hash: str, folder: Path, device: torch.device) -> None:
    """Check that all processes go on from the same step with the same data; a collective where there are several.

    Raises:
        CheckpointError: If they see different checkpoints.
        ConfigError: If they have read different text, or have different tokenizers.
    """
    if not sharding.is_connected():
        return
    content = int.from_bytes(hashlib.sha256(content_hash.encode()).digest()[:6], "big")  # float64 holds 6 bytes
    mine = torch.tensor([float(step), float(content)], dtype=torch.float64, device=device)
    largest, smallest = sharding.all_reduce([mine.clone(), -mine], kind="max")
    if int(largest[0]) != -int(smallest[0]):
        raise CheckpointError(
            f"one process would go on from step {int(largest[0])}, and another from step {-int(smallest[0])}: they do "
            f"not see the same files in {folder}. Put it on a file system that all machines share."
        )
    if int(largest[1]) != -int(smallest[1]):
        raise ConfigError(
            "the processes have read different text, or have different tokenizers. Give all of them the same files in "
            "the data section, on a file system that all machines share."
        )


def spread_model(model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Spread a model over the processes as its run asks for: layer by layer, then what is around them."""
    blocks = blocks_of(model)
    sharding.shard_model(model, blocks, device=device, shard_size=config.trainer.get("shard_size"))
    logger.info("%d layers, and what is around them, are spread over %d processes", len(blocks), num_processes())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, outermost: those that transformers never splits, else what its lists hold.

    A block that shares a parameter with another is left out, so that both are gathered together.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in kinds]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = list(_outermost(named)) or [module for each in _outermost(lists) for module in each]
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    shared = {parameter for parameter, count in owners.items() if count > 1}
    return [block for block in found if (own := set(block.parameters())) and not own & shared]


def _outermost(modules: list[Any]) -> Iterator[Any]:
    inside: set[nn.Module] = set()
    for module in modules:  # in the order of model.modules(): the outer one first
        if module not in inside:
            inside.update(module.modules())
            yield module


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer without what accelerate puts around it."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def consolidate(optimizer: Any) -> None:
    """Bring states together that are divided over processes (``partition_states``), for the first one to save."""
    together = getattr(bare(optimizer), "consolidate_state_dict", None)
    if together is not None:
        together()


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The ``state_dict`` of a spread model on the CPU; a collective, one tensor at a time.

    Args:
        model: All processes call with theirs.
        keep: Whether this process wants them; else what comes back is empty.
    """
    state = model.state_dict()
    named = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[nn.Parameter, str] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first = seen.setdefault(named[name], name) if name in named else name
        gathered = None if first != name else sharding.whole(tensor)
        if keep:  # a tied weight is one tensor: that is how save_pretrained knows it
            found[name] = found[first] if gathered is None else gathered.cpu()
    return found


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Take the weights of a checkpoint into a spread model, one tensor at a time; nothing is sent."""
    stored = Stored(folder)
    for name, tensor in model.state_dict().items():
        if name in stored.shapes:
            sharding.keep_(tensor, stored.read(name))


def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer of a spread model, on the CPU; a collective, one tensor at a time.

    Args:
        optimizer: All processes call with theirs.
        keep: Whether this process wants it; else what comes back is empty.
    """
    given = optimizer.state_dict()
    gathered: dict[Any, dict[str, Any]] = {}
    for number, state in sorted(given["state"].items()):
        for key, value in sorted(state.items()):
            found = sharding.whole(value) if torch.is_tensor(value) else value
            if keep:
                gathered.setdefault(number, {})[key] = found.cpu() if torch.is_tensor(found) else found
    groups = tree_map(_gathered, given["param_groups"])  # in which SIFT keeps the gradients of a choice that waits
    return {"state": gathered, "param_groups": groups} if keep else {}


def _gathered(value: Any) -> Any:
    return sharding.whole(value).cpu() if torch.is_tensor(value) and sharding.is_sharded(value) else value


def load_state(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take the optimizer's state of a checkpoint, which is whole, into an optimizer of whole or spread weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    is_spread = any(sharding.is_sharded(parameter) for parameter in parameters)
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=is_spread)
    if is_spread:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        owners = dict(zip(numbers, parameters, strict=False))  # the optimizer itself refuses another number of them
        saved["state"] = {
            number: _parts(state, owners.get(number), own=hasattr(optimizer, "state_spec"))
            for number, state in saved["state"].items()
        }
    optimizer.load_state_dict(saved)


def _parts(state: Mapping[str, Any], parameter: Tensor | None, *, own: bool) -> dict[str, Any]:
    """One parameter's state as torch's optimizers have it: spread like the parameter where it has its shape.

    Args:
        state: Whole tensors.
        parameter: That they belong to.
        own: Whether the optimizer is one of ours, which takes its part by itself.
    """
    if own or parameter is None or not sharding.is_sharded(parameter):
        return dict(state)
    return {
        key: sharding.part_of(value, parameter)
        if torch.is_tensor(value) and value.shape == parameter.shape and not key.startswith("sparse_")
        else value
        for key, value in state.items()
    }
