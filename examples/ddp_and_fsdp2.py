"""Fira in several processes, in a plain PyTorch loop: under DDP, and sharded by FSDP2; saved by DCP and restored.

pip install fullrank scikit-learn
python examples/ddp_and_fsdp2.py
torchrun --standalone --nproc_per_node 2 examples/ddp_and_fsdp2.py
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fullrank import FiraAdamW, divide_params

LEARNING_RATE, STEPS, BATCH = 1e-3, 300, 60


def connect() -> torch.device:
    """Join the processes that torchrun started; alone, make a group of one."""
    on_gpu = torch.cuda.is_available()
    if "RANK" in os.environ:
        # gloo beside nccl: checkpoints and offloaded states send tensors of the host
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not on_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def build(strategy: str, device: torch.device) -> tuple[nn.Module, FiraAdamW]:
    """The model as it trains, and its optimizer."""
    torch.manual_seed(0)  # the same weights in all processes
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 250), nn.ReLU())
    model = nn.Sequential()
    model.add_module("mlp", mlp)
    model.add_module("head", nn.Linear(250, 10))
    model.to(device)
    if strategy == "fsdp2":  # first, because it replaces the parameters
        for layer in (mlp[0], mlp[2]):
            fully_shard(layer)
        fully_shard(model)
    optimizer = FiraAdamW(divide_params(model, ["mlp"], rank=8), lr=LEARNING_RATE, partition_states=strategy == "zero")
    if strategy in ("ddp", "zero"):  # afterwards: the optimizer takes the parameters by their plain names
        return DistributedDataParallel(model), optimizer
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """A training loop as anywhere; each process takes its share of every batch."""
    order = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=order)[dist.get_rank() :: dist.get_world_size()]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def main() -> None:
    """Train under each strategy; print accuracy, what this process holds, and whether a checkpoint gives it back."""
    device = connect()
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16.0
    labels = torch.tensor(digits.target, device=device)
    num = 1500  # the rest is the test set
    for strategy in ("ddp", "zero", "fsdp2"):
        model, optimizer = build(strategy, device)
        train(model, optimizer, images[:num], labels[:num])
        with torch.no_grad():
            scores = model(images[num:])
        line = f"{strategy:5} accuracy {(scores.argmax(1) == labels[num:]).float().mean().item():.1%}"
        held = sum(local(tensor).nbytes for state in optimizer.state.values() for tensor in state.values())
        line += f", optimizer state of process {dist.get_rank()}: {held:,} bytes"
        if strategy != "zero":  # its state is saved by consolidate_state_dict() and state_dict()
            line += f", restored: {restores(strategy, model, optimizer, scores, images[num:], device)}"
        print(f"{line}\n", end="", flush=True)  # in one piece: other processes print too
    dist.destroy_process_group()


def restores(
    strategy: str, model: nn.Module, optimizer: FiraAdamW, scores: Tensor, images: Tensor, device: torch.device
) -> bool:
    """Whether a checkpoint, read into a fresh model, gives the same scores; any number of processes could read it."""
    fresh, fresh_optimizer = build(strategy, device)
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)  # that of the first process
        weights, states = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=folder[0])

        weights, states = get_state_dict(fresh, fresh_optimizer)
        checkpoint.load({"model": weights, "optimizer": states}, checkpoint_id=folder[0])
        dist.barrier()  # all have read it
    set_state_dict(fresh, fresh_optimizer, model_state_dict=weights, optim_state_dict=states)
    with torch.no_grad():
        return torch.equal(fresh(images), scores)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main()
