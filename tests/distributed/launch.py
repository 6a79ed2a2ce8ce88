"""Starts the cases once for each number of processes, and reads what they found there."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.case import Case
from tests.distributed.loop import DEVICE_VARIABLE

ROOT = Path(__file__).parents[2]
LIMIT = 1200
"""Seconds after which a launch is given up: it hangs."""


@dataclass(frozen=True)
class Outcome:
    """What one process returned from a case."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Launcher:
    """Runs the asked cases, when the first of their results is wanted.

    Args:
        folder: For results; several pytest processes share it, and the first one runs the cases.
        asked: ``module:case`` for each number of processes.
        device: What the processes train on, ``cpu`` or ``cuda``.
    """

    def __init__(self, folder: Path, asked: dict[int, list[str]], device: str = "cpu") -> None:
        self.folder = folder
        self.asked = asked
        self.device = device

    def results(self, case: str, world: int) -> list[Outcome]:
        """What each of ``world`` processes returned; fails the test with their tracebacks if one raised."""
        for earlier in sorted(number for number in self.asked if number <= world):
            self.launch(earlier)
        folder = self.folder / f"world{world}" / case
        read = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
        if errors := [f"process {rank}:\n{entry['error']}" for rank, entry in enumerate(read) if entry["error"]]:
            pytest.fail("\n".join(errors), pytrace=False)
        if len(read) < world:
            pytest.fail(f"{case} ended in {len(read)} of {world} processes.\n{self.log(world)}", pytrace=False)
        return [Outcome(load_file(folder / f"{rank}.safetensors"), entry["values"]) for rank, entry in enumerate(read)]

    def log(self, world: int) -> str:
        """The end of what a launch wrote."""
        return (self.folder / f"world{world}.log").read_text(encoding="utf-8")[-4000:]

    def launch(self, world: int) -> None:
        """Run all cases of this number of processes, once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"world{world}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            log = self.folder / f"world{world}.log"
            if log.exists():
                return
            command = [sys.executable, "-m", "tests.distributed.worker", str(world), str(self.folder)]
            with log.open("wb") as output:
                run_limited([*command, *self.asked[world]], output=output, environment={DEVICE_VARIABLE: self.device})


def collected(request: pytest.FixtureRequest, package: str) -> dict[int, list[str]]:
    """Every case that a test of this session in a package (or a module) asks for, for each number of processes."""
    asked: dict[int, list[str]] = {}
    for item in request.session.items:
        case, module = getattr(item, "callspec", None) and item.callspec.params.get("case"), item.module.__name__  # type: ignore[attr-defined]
        if isinstance(case, Case) and f"{module}.".startswith(f"{package}."):
            for world in case.worlds:
                asked.setdefault(world, []).append(f"{module}:{case.name}")
    return {world: list(dict.fromkeys(names)) for world, names in sorted(asked.items())}


def shared_folder(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Path:
    """A folder of this session; of pytest-xdist's processes all have the same, so that one launch serves them."""
    base = factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


def run_limited(command: list[str], *, output: Any, environment: Mapping[str, str], limit: float = LIMIT) -> int:
    """Run a program and what it starts; returns the exit status, of a killed one too."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    running = subprocess.Popen(
        command, env=settings, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return running.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        return running.wait()
