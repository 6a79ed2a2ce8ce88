"""Training has not changed unnoticed: losses and gradient norms of a tiny run against a recorded one.

The first steps must agree closely; later ones drift with the rounding of another processor, so the bounds are on
the largest and on the mean relative difference.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from fullrank import METHODS
from tests.golden.record import PATH, golden_run

RECORDED = json.loads(PATH.read_text())["runs"]


def test_every_method_is_recorded() -> None:
    assert RECORDED.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradient_norms_are_the_recorded_ones(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLRANK_CACHE", str(tmp_path / "cache"))
    found = golden_run(method, tmp_path)
    assert len(found) == len(RECORDED[method]) == 20
    for column, name in enumerate(("loss", "gradient norm")):
        pairs = [(now[column], then[column]) for now, then in zip(found, RECORDED[method], strict=True)]
        differences = [abs(now - then) / abs(then) for now, then in pairs]
        assert max(differences[:3]) < 1e-4, name
        assert max(differences) < 2e-2, name
        assert statistics.fmean(differences) < 5e-3, name
