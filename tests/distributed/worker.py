"""What a launch starts: several processes that run cases, one after the other, in one process group.

``python -m tests.distributed.worker WORLD FOLDER MODULE:CASE...`` imports everything once and splits into that many
processes, each with the variables that torchrun would give it; what each of them found is written to the folder.
Where a case raises in one process, the others stop waiting for it after a time, and the next case starts with a new
group. How a case ended goes through a store that stands apart from the group, in the process that splits.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from tests.distributed.case import Case, Place
from tests.distributed.loop import DEVICE

PATIENCE = datetime.timedelta(minutes=3)
"""After which a process gives up waiting for the others: only where one of them has failed, so not for a slow one."""
HEAVY = ("peft", "transformers.trainer", "torch.distributed.fsdp", "torch.distributed.checkpoint")
"""What cases import when they run, so that it is there before the processes split."""


def split(world: int, folder: Path, asked: list[str]) -> int:
    """Run the cases in so many processes, and wait for all of them; returns how many failed or were ended."""
    if DEVICE.type == "cpu":  # some of it starts CUDA, which no process may take over from another
        for module in (*HEAVY, *(name.partition(":")[0] for name in asked)):
            importlib.import_module(module)
    assert threading.active_count() == 1, "a process that splits has one thread"
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    processes = []
    for rank in range(world):
        if not (number := os.fork()):
            os._exit(begin(rank, world, port, folder, asked))
        processes.append(number)
    store = distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    failed = 0
    while processes:
        number, status = os.wait()
        processes.remove(number)
        if status:
            failed += 1
            for other in processes:  # which would wait for it
                os.kill(other, signal.SIGKILL)
    del store
    return failed


def begin(rank: int, world: int, port: int, folder: Path, asked: list[str]) -> int:
    """What one of the processes does; returns its exit status."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in (ranks | meeting).items()})
    try:
        main(rank, world, port, folder, asked)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main(rank: int, world: int, port: int, folder: Path, asked: list[str]) -> None:
    """Run the cases."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    backend = "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    launched = distributed.TCPStore("127.0.0.1", port, timeout=4 * PATIENCE)
    store = distributed.PrefixStore("cases", launched)
    for number, name in enumerate(asked):
        if not distributed.is_initialized():
            group_store = distributed.PrefixStore(f"group{number}", store)
            distributed.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=PATIENCE)
        error = run(find(name), Place(rank, world, folder), folder / f"world{world}")
        store.set(f"outcome/{number}/{rank}", "raised" if error else "done")
        outcomes = [store.get(f"outcome/{number}/{other}") for other in range(world)]
        if b"raised" in outcomes and distributed.is_initialized():
            distributed.destroy_process_group()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    (folder / f"world{world}" / f"finished{rank}").touch()


def find(name: str) -> Case:
    """A case by the module that has it and its name."""
    module, _, case = name.partition(":")
    found: Case = importlib.import_module(module).CASES[case]
    return found


def run(case: Case, place: Place, folder: Path) -> str | None:
    """Run one case and write what it returns, or how it failed; returns the error."""
    error, found, start = None, {}, time.monotonic()
    torch.manual_seed(place.rank)  # what is drawn without a seed must not matter
    try:
        found = case.run(place)
    except Exception:
        error = traceback.format_exc()
    write(folder / case.name / str(place.rank), {**found, "seconds": time.monotonic() - start}, error)
    return error


def write(file: Path, found: Mapping[str, object], error: str | None) -> None:
    """Tensors beside everything else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in found.items() if isinstance(value, Tensor)}
    save_file(tensors, file.with_suffix(".safetensors"))
    values = {key: value for key, value in found.items() if not isinstance(value, Tensor)}
    file.with_suffix(".json").write_text(json.dumps({"error": error, "values": values}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(split(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
