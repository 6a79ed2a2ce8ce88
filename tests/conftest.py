"""For all tests: who runs which, one thread, and one small problem for each kind of weight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import SHAPES, make_gradients, make_weight

with contextlib.suppress(ImportError):  # pytest-xdist is not there, or switched off
    from tests import scheduling

Problem = tuple[Tensor, list[Tensor]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In each of pytest-xdist's processes."""
    if hasattr(config, "workerinput"):
        scheduling.sort_long_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Ours in place of the usual one."""
    if config.getvalue("dist") != "load":
        return None
    config.option.loadscopereorder = False
    return scheduling.LongFirst(config, log)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Matrices this small lose time to threads, and tests may run in several processes."""
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:  # what tests start would else take all cores, for each worker
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """A maker of (weight, gradients) by the name of a shape: ``problem("tall", steps=12)``."""

    def make(name: str, steps: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
        shape = SHAPES[name]
        weight = make_weight(shape, seed=seed, dtype=dtype)
        return weight, make_gradients(shape, steps, seed=seed, dtype=dtype)

    return make
