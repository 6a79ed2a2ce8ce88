"""The fixture that runs cases in several processes: all that were collected, by one launch a number of processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.case import Case
from tests.distributed.launch import Launcher, Outcome


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Knows every case that a test of this session asks for."""
    asked: dict[int, list[str]] = {}
    for item in request.session.items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        if not isinstance(case, Case):
            continue
        for world in case.worlds:
            name = f"{item.module.__name__}:{case.name}"  # type: ignore[attr-defined]
            if name not in asked.setdefault(world, []):
                asked[world].append(name)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base  # of pytest-xdist: one launch for all
    return Launcher(shared / "distributed", asked)


@pytest.fixture
def outcome(launcher: Launcher) -> Callable[[Case, int], list[Outcome]]:
    """What each process returned from a case: ``outcome(case, world)``."""
    return lambda case, world: launcher.results(case.name, world)
