"""What torchrun starts: runs cases one after the other in one process group, and writes what each of them found.

``python -m tests.distributed.worker FOLDER MODULE:CASE...``. Where a case raises in one process, the others stop
waiting for it after a time, and the next case starts with a new group. How a case ended goes through torchrun's
store, which stands apart from the group.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
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

PATIENCE = datetime.timedelta(seconds=30)
"""After which a process gives up waiting for the others."""


def main(folder: Path, asked: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    launched = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=4 * PATIENCE)
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
    main(Path(sys.argv[1]), sys.argv[2:])
