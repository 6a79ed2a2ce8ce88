"""The fixture that runs cases in several processes: all that were collected, by one launch a number of processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.case import Case
from tests.distributed.launch import Launcher, Outcome, collected, shared_folder


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Knows every case that a test of this session asks for."""
    folder = shared_folder(request, tmp_path_factory) / "distributed"
    return Launcher(folder, collected(request, "tests.distributed"))


@pytest.fixture
def outcome(launcher: Launcher) -> Callable[[Case, int], list[Outcome]]:
    """What each process returned from a case: ``outcome(case, world)``."""
    return lambda case, world: launcher.results(case.name, world)
