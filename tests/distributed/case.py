"""What is run in several processes: a case, and where a process that runs it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Place:
    """One process of several."""

    rank: int
    world: int
    folder: Path
    """Shared by all processes and all numbers of processes, which come in rising order."""


@dataclass(frozen=True)
class Case:
    """A function that all processes run, and that returns tensors and plain values by name.

    A test module has its cases by name in ``CASES``, and a test that asks for ``outcome`` with a parameter ``case``
    gets what it returned.
    """

    name: str
    """Also a folder's name."""
    run: Callable[[Place], dict[str, Any]]
    worlds: tuple[int, ...] = (2, 3)
    """Numbers of processes that it runs in."""


def named(*cases: Case) -> dict[str, Case]:
    """The cases of a module by name."""
    return {case.name: case for case in cases}


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a test by ``case`` and ``world``: every number of processes that a case runs in."""
    both = [pytest.param(case, world, id=f"{case.name}-{world}") for case in cases for world in case.worlds]
    return pytest.mark.parametrize(("case", "world"), both)
