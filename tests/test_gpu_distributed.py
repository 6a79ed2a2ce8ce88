"""On GPUs: what processes that talk by NCCL train is what one process trains on the CPU.

One GPU is enough for a group of one process, in which DDP and FSDP2 do all that they do but talk; tests in two
processes need two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fullrank import METHODS
from tests.distributed.case import Case, each, named
from tests.distributed.comparing import assert_rounded_alike, assert_same_weights, trained_alone
from tests.distributed.launch import Launcher, Outcome, collected, shared_folder
from tests.distributed.loop import Plan, replay
from tests.distributed.test_fused import Fused
from tests.distributed.test_fused import train as train_fused
from tests.distributed.test_options import OPTIONS
from tests.distributed.training import STEPS, gradients, train, weights

GPUS = torch.cuda.device_count()
WORLDS = (1, 2)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
]

PLANS: dict[str, tuple[Plan, str]] = {
    **{f"{method}-{way}": (Plan(method), way) for method in METHODS for way in ("ddp", "fsdp2")},
    **{f"option-{name}": (OPTIONS[name], "fsdp2") for name in ("fira-both", "fira-matrix", "galore-left")},
    "partitioned-ddp": (Plan("fira", {"partition_states": True}), "ddp"),
}
ROUNDED = {f"{method}-bfloat16": (Plan(method, dtype="bfloat16"), "fsdp2") for method in ("fira", "galore", "apollo")}
EXACT_CASES = [Case(name, functools.partial(train, plan=p, way=way), WORLDS) for name, (p, way) in PLANS.items()]
FUSED = {f"fused-{method}-{way}": Fused(Plan(method), way) for method in ("fira", "full") for way in ("ddp", "fsdp2")}
PLANS |= {name: (fused.plan, fused.way) for name, fused in FUSED.items()}
EXACT_CASES += [Case(name, functools.partial(train_fused, case=fused), WORLDS) for name, fused in FUSED.items()]
ROUNDED_CASES = [
    Case(name, functools.partial(train, plan=p, way=way, record=True), WORLDS) for name, (p, way) in ROUNDED.items()
]
CASES = named(*EXACT_CASES, *ROUNDED_CASES)


@pytest.fixture(scope="session")
def gpu_launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Knows the cases of this module, for as many processes as there are GPUs."""
    asked = {world: names for world, names in collected(request, __name__).items() if world <= GPUS}
    return Launcher(shared_folder(request, tmp_path_factory) / "distributed-gpu", asked, "cuda")


@pytest.fixture
def outcome(gpu_launcher: Launcher) -> Callable[[Case, int], list[Outcome]]:
    """What each process returned from a case: ``outcome(case, world)``."""

    def results(case: Case, world: int) -> list[Outcome]:
        if world > GPUS:
            pytest.skip(f"needs {world} CUDA devices, there are {GPUS}")
        return gpu_launcher.results(case.name, world)

    return results


@each(EXACT_CASES)
def test_as_one_process_on_the_cpu(case: Case, world: int, outcome: Any) -> None:
    found = weights(outcome(case, world)[0])
    assert_same_weights(found, trained_alone(PLANS[case.name][0], STEPS), tolerance=1e-7)


@each(ROUNDED_CASES)
def test_bfloat16(case: Case, world: int, outcome: Any) -> None:
    """The CPU is given the gradients of the GPUs, whose products it rounds otherwise."""
    found = outcome(case, world)
    alone = replay(ROUNDED[case.name][0], gradients(found)).weights()
    assert_rounded_alike(weights(found[0]), alone, share=0.2)
